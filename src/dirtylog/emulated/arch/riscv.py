"""riscv: Sv39x4 G-stage tables, three levels, 41-bit addresses.

=======  =====================================================================================
bits     meaning
=======  =====================================================================================
0        V, valid
1        R, readable; an entry above the last level with R is a block (2 MiB at the second)
2        W, writable; **taken away to log a page**
3        X, executable
4        U, user: G-stage accesses are checked as user accesses
6        A, accessed
7        D, dirty: KVM keeps it set, so that hardware never has to
53:10    page frame number
=======  =====================================================================================

The root has 2048 entries (16 KiB): that is the x4. Sources: RISC-V Privileged Specification, Sv39x4 in the H extension;
Linux arch/riscv/include/asm/pgtable-bits.h, arch/riscv/kvm/gstage.c (GSTAGE_OP_WP).
"""

from __future__ import annotations

from typing import ClassVar

from dirtylog.emulated.port import RadixProtectPort
from dirtylog.emulated.tables import EntryFormat

VALID = 1 << 0
READ = 1 << 1
WRITE = 1 << 2
EXECUTE = 1 << 3
USER = 1 << 4
ACCESSED = 1 << 6
DIRTY = 1 << 7
PFN_MASK = ((1 << 44) - 1) << 10


class RiscvPort(RadixProtectPort):
    """Sv39x4: a page is logged by its W bit."""

    name = "riscv"
    how = "Sv39x4 W bit"
    isa = "riscv64"
    format: ClassVar[EntryFormat] = EntryFormat(
        byte_order="little",
        index_bits=(11, 9, 9),
        address_mask=PFN_MASK,
        address_shift=2,
        leaf=VALID | READ | EXECUTE | USER | ACCESSED | DIRTY,
        present=VALID,
        table=VALID,
        table_present=VALID,
        table_address_mask=PFN_MASK,
        table_address_shift=2,
        write=WRITE,
        block=VALID | READ | EXECUTE | USER | ACCESSED | DIRTY,
        block_mask=READ,
    )

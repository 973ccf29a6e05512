"""mips: KVM's guest-physical page table of a 64-bit host with 4 KiB pages, three levels.

=======  =====================================================================================
bits     meaning
=======  =====================================================================================
0        software: present
1        software: write, the slot is writable
2        software: accessed
3        software: modified; **taken away to log a page**
6, 7     no-execute, no-read
8        G, global      (from here on the entry, shifted right by 8, is the TLB's EntryLo)
9        V, valid
10       D, dirty, which means write-enable: a store to a page without it raises TLB Modified;
         **taken away with modified**
13:11    cache attribute (3: cacheable)
14...    page frame number
=======  =====================================================================================

An entry above the leaves is the kernel-virtual address of the next table, here in the cached window of XKPHYS. (The kernel
marks empty ones with the address of an invalid table; here they are 0.) KVM maps no huge pages in this table. Sources: MIPS64
Architecture volume III, EntryLo0; Linux arch/mips/include/asm/pgtable-bits.h (the order with RIXI, huge pages and special
entries), arch/mips/include/asm/mipsregs.h, arch/mips/kvm/mmu.c (kvm_mips_mkclean_gpa_pt), up to v6.17.
"""

from __future__ import annotations

from typing import ClassVar

from dirtylog.emulated.port import RadixProtectPort
from dirtylog.emulated.tables import EntryFormat

PRESENT = 1 << 0
WRITE = 1 << 1
ACCESSED = 1 << 2
MODIFIED = 1 << 3
VALID = 1 << 9
DIRTY = 1 << 10
CACHEABLE = 3 << 11
PFN_SHIFT = 14
XKPHYS_CACHED = 0x9800 << 48


class MipsPort(RadixProtectPort):
    """MIPS guest-physical table: a page is logged by its D bit, so that a store raises TLB Modified."""

    name = "mips"
    how = "D (write-enable) bit"
    isa = "mips"
    format: ClassVar[EntryFormat] = EntryFormat(
        byte_order="big",
        index_bits=(10, 9, 9),
        address_mask=((1 << 50) - 1) & ~((1 << PFN_SHIFT) - 1),
        address_shift=12 - PFN_SHIFT,
        leaf=PRESENT | ACCESSED | VALID | CACHEABLE,
        present=PRESENT,
        table=XKPHYS_CACHED,
        table_present=XKPHYS_CACHED,
        write=DIRTY | MODIFIED,
        writable_slot=WRITE,
    )

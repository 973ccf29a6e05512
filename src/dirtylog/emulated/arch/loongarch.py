"""loongarch: the secondary MMU's page tables, four levels of 512 entries (4 KiB pages).

=======  =====================================================================================
bits     meaning
=======  =====================================================================================
0        V, valid
1        D, dirty: a store to a page without it is an exception; **taken away to log a page**
5:4      memory access type (1: coherent, cached)
6        huge: the entry of the last level but one is a block, 2 MiB
7        software: present
8        W, writable; **taken away with D**
9        software: writeable, the page may be given D and W again
47:12    address
=======  =====================================================================================

An entry above the leaves is the plain address of the next table. (The kernel marks empty ones with the address of an
invalid table; here they are 0.) Sources: LoongArch Reference Manual volume 1, 5.4 and 7.5; Linux
arch/loongarch/include/asm/pgtable-bits.h, arch/loongarch/include/asm/kvm_mmu.h (KVM_PAGE_WRITEABLE, kvm_pte_mkclean),
arch/loongarch/kvm/mmu.c (kvm_mkclean_pte, kvm_split_huge).

Unicorn has no LoongArch: guests of this port run on the trace CPU.
"""

from __future__ import annotations

from typing import ClassVar

from dirtylog.emulated.port import RadixProtectPort
from dirtylog.emulated.tables import EntryFormat

VALID = 1 << 0
DIRTY = 1 << 1
COHERENT_CACHED = 1 << 4
HUGE = 1 << 6
PRESENT = 1 << 7
WRITE = 1 << 8
KVM_WRITEABLE = 1 << 9


class LoongArchPort(RadixProtectPort):
    """LoongArch secondary MMU: a page is logged by its D and W bits."""

    name = "loongarch"
    how = "D and W bits"
    isa = "trace"
    format: ClassVar[EntryFormat] = EntryFormat(
        byte_order="little",
        index_bits=(9, 9, 9, 9),
        address_mask=(1 << 48) - 4096,
        leaf=VALID | COHERENT_CACHED | PRESENT,
        present=PRESENT,
        table=0,
        table_present=(1 << 48) - 4096,
        write=DIRTY | WRITE,
        writable_slot=KVM_WRITEABLE,
        writable_slot_block=KVM_WRITEABLE,
        block=VALID | COHERENT_CACHED | PRESENT | HUGE,
        block_mask=HUGE,
    )

"""arm (32-bit): stage-2 tables of the large physical address extension (LPAE), three levels, 40-bit addresses.

=======  =====================================================================================
bits     meaning
=======  =====================================================================================
1:0      3: a table, or a page at the last level; 1: a block (2 MiB at the second level)
5:2      memory attributes (1111: normal, write-back)
7:6      HAP, access permissions: 01 read-only, 11 read-write; **11 becomes 01 to log a page**
9:8      shareability (3: inner)
10       AF, access flag
39:12    address
=======  =====================================================================================

The root has 1024 entries: two tables side by side. Sources: ARM DDI 0406C, B3.6.2 (LPAE descriptors); Linux up to v5.6,
arch/arm/include/asm/pgtable-3level.h (L_PTE_S2_RDONLY, L_PTE_S2_RDWR), arch/arm/include/asm/kvm_mmu.h, virt/kvm/arm/mmu.c
(stage2_wp_range).
"""

from __future__ import annotations

from typing import ClassVar

from dirtylog.emulated.port import RadixProtectPort
from dirtylog.emulated.tables import EntryFormat

VALID = 1 << 0
TABLE_OR_PAGE = 1 << 1
NORMAL_MEMORY = 0b1111 << 2
HAP_READ = 0b01 << 6
HAP_WRITE = 0b10 << 6
INNER_SHAREABLE = 0b11 << 8
ACCESS_FLAG = 1 << 10


class ArmPort(RadixProtectPort):
    """LPAE stage 2: a page is logged by its HAP field."""

    name = "arm"
    how = "LPAE HAP field"
    isa = "arm"
    format: ClassVar[EntryFormat] = EntryFormat(
        byte_order="little",
        index_bits=(10, 9, 9),
        address_mask=(1 << 40) - 4096,
        leaf=VALID | TABLE_OR_PAGE | NORMAL_MEMORY | HAP_READ | INNER_SHAREABLE | ACCESS_FLAG,
        present=VALID,
        table=VALID | TABLE_OR_PAGE,
        table_present=VALID,
        write=HAP_WRITE,
        block=VALID | NORMAL_MEMORY | HAP_READ | INNER_SHAREABLE | ACCESS_FLAG,
        block_mask=TABLE_OR_PAGE,
    )

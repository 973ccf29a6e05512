"""arm64: VMSAv8-64 stage-2 tables, 4 KiB granule, 40-bit addresses, three levels (1 to 3).

=======  =====================================================================================
bits     meaning
=======  =====================================================================================
0        valid
1        1: a table, or a page at level 3; 0: a block (2 MiB at level 2)
5:2      memory attributes (1111: normal, write-back)
6        S2AP read
7        S2AP write; **taken away to log a page**
9:8      shareability (3: inner)
10       AF, access flag
47:12    address
58:55    software
=======  =====================================================================================

The root has 1024 entries: two concatenated tables. Sources: Arm ARM (DDI 0487), D8.3 (descriptor formats) and D8.4
(stage-2 permissions); Linux arch/arm64/kvm/hyp/pgtable.c (KVM_PTE_LEAF_ATTR_LO_S2_*, kvm_pgtable_stage2_wrprotect).
"""

from __future__ import annotations

from typing import ClassVar

from dirtylog.emulated.port import RadixProtectPort
from dirtylog.emulated.tables import EntryFormat

VALID = 1 << 0
TABLE_OR_PAGE = 1 << 1
NORMAL_MEMORY = 0b1111 << 2
S2AP_READ = 1 << 6
S2AP_WRITE = 1 << 7
INNER_SHAREABLE = 0b11 << 8
ACCESS_FLAG = 1 << 10


class Arm64Port(RadixProtectPort):
    """VMSAv8-64 stage 2: a page is logged by the write bit of S2AP."""

    name = "arm64"
    how = "stage-2 S2AP write bit"
    isa = "arm64"
    format: ClassVar[EntryFormat] = EntryFormat(
        byte_order="little",
        index_bits=(10, 9, 9),
        address_mask=(1 << 48) - 4096,
        leaf=VALID | TABLE_OR_PAGE | NORMAL_MEMORY | S2AP_READ | INNER_SHAREABLE | ACCESS_FLAG,
        present=VALID,
        table=VALID | TABLE_OR_PAGE,
        table_present=VALID,
        write=S2AP_WRITE,
        block=VALID | NORMAL_MEMORY | S2AP_READ | INNER_SHAREABLE | ACCESS_FLAG,
        block_mask=TABLE_OR_PAGE,
    )

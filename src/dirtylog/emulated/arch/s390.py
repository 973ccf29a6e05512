"""s390: region-third, segment and page tables with page-status-table entries (PGSTE), big-endian.

Page table (256 entries of 4 KiB, 1 MiB together), and 2 KiB after each entry its PGSTE:

===================  =========================================================================
mask                 meaning
===================  =========================================================================
0x400                I, invalid (hardware)
0x200                P, protected (hardware); **set to log a page**
0x020 0x010 0x008    software: write, read, dirty
0x004 0x001          software: young, present
PGSTE 0x8000         UC, user change: **the log**. Set when the page gets write permission, moved into the
                     bitmap when the log is read
===================  =========================================================================

Segment table (2048 entries): origin, 0x20 invalid, 0x1 present; with 0x400 the entry is a block of 1 MiB, 0x200 protects it,
and 0x8000, 0x4000, 0x2000, 0x1000 are software's write, read, dirty, young. Region-third entries (2048) add 0x4 (type) and 0x3
(length). An empty entry of either table is 0x20 here; the kernel writes an empty region-third entry as 0x24, and the hardware looks
at nothing but 0x20.

The log is read by testing and clearing UC, protecting the pages that had it, and flushing. (KVM walks every segment of a slot,
256 PGSTEs at a time; here the faults leave a list of where to look, so that a sync costs what is dirty.) These are the
positions since Linux v6.14; before, UC was 0x0000800000000000, and before v3.13 0x0000400000000000. Sources:
z/Architecture Principles of Operation, chapter 3 (dynamic address translation); Linux arch/s390/include/asm/pgtable.h,
arch/s390/mm/pgtable.c (ptep_test_and_clear_uc, pgste_set_pte), arch/s390/mm/gmap.c (gmap_sync_dirty_log_pmd),
arch/s390/kvm/kvm-s390.c (kvm_arch_sync_dirty_log).
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from dirtylog.emulated.port import RadixPort, SoftwareSyncPort
from dirtylog.emulated.tables import EntryFormat
from dirtylog.words import words_of_pages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dirtylog.emulated.port import TlbOwner
    from dirtylog.memslot import MemorySlot, SlotTable
    from dirtylog.slotbitmap import SlotBitmap

PAGE_INVALID = 0x400
PAGE_PROTECT = 0x200
PAGE_WRITE, PAGE_READ, PAGE_DIRTY, PAGE_YOUNG, PAGE_PRESENT = 0x020, 0x010, 0x008, 0x004, 0x001
SEGMENT_INVALID = 0x20
SEGMENT_LARGE = 0x400
SEGMENT_WRITE, SEGMENT_READ, SEGMENT_DIRTY, SEGMENT_YOUNG = 0x8000, 0x4000, 0x2000, 0x1000
REGION_THIRD, REGION_LENGTH = 0x4, 0x3  # the length's low bit is software's present bit too
PRESENT = 0x1
PGSTE_UC = 0x8000
PGSTE_OFFSET = 2048

ENTRIES = 256


class S390Port(RadixPort, SoftwareSyncPort):
    """PGSTE: a write fault sets UC; the sync moves UC into the bitmap and protects the page again."""

    name = "s390"
    how = "PGSTE user-change bit"
    isa = "s390x"
    leaf_table_bytes = 4096
    format: ClassVar[EntryFormat] = EntryFormat(
        byte_order="big",
        index_bits=(11, 11, 8),
        address_mask=(1 << 52) - 4096,
        leaf=PAGE_PRESENT | PAGE_YOUNG | PAGE_READ | PAGE_DIRTY,
        present=PRESENT,
        table=PRESENT,
        upper_table=REGION_THIRD | REGION_LENGTH,
        table_present=PRESENT,
        protect=PAGE_PROTECT,
        writable_slot=PAGE_WRITE,
        writable_slot_block=SEGMENT_WRITE,
        block=PRESENT | SEGMENT_LARGE | SEGMENT_READ | SEGMENT_DIRTY | SEGMENT_YOUNG,
        block_mask=SEGMENT_LARGE,
        empty_table=SEGMENT_INVALID,
        empty_leaf=PAGE_INVALID,
    )

    def __init__(self, slots: SlotTable, vcpus: Sequence[TlbOwner]) -> None:
        super().__init__(slots, vcpus)
        # The frames whose UC was set since the last sync: where to look. Whether it is set, the PGSTE says.
        self._changed = array("q")

    def start_logging(self, slot: MemorySlot) -> None:
        """Forget what UC holds from before, and protect every page and block."""
        self._collect(slot, None)
        super().start_logging(slot)

    def stop_logging(self, slot: MemorySlot) -> None:
        """Clear UC while the tables that hold it are there."""
        self._collect(slot, None)
        super().stop_logging(slot)

    def sync_dirty_log(self, slot: MemorySlot) -> None:
        """Move UC into the bitmap, and protect those pages again."""
        with self.mmu_lock:
            self._collect(slot, slot.dirty_bitmap)

    def unmap(self, slot: MemorySlot) -> None:
        """Save UC first: a slot that moves keeps its log, and the PGSTEs go with the tables."""
        self._collect(slot, slot.dirty_bitmap)
        super().unmap(slot)

    def _log_write(self, slot: MemorySlot, bitmap: SlotBitmap, gfn: int, offset: int) -> None:  # noqa: ARG002 - the log is the PGSTE
        memory = self.tables.memory
        self._changed.append(gfn)
        memory.store(offset + PGSTE_OFFSET, memory.load(offset + PGSTE_OFFSET) | PGSTE_UC)

    def _collect(self, slot: MemorySlot, bitmap: SlotBitmap | None) -> None:
        """Mark the pages whose UC is set in ``bitmap``, protect them, and clear UC: in this order nothing is ever in neither."""
        frames = np.sort(np.array(self._changed))
        here = (frames >= slot.base_gfn) & (frames < slot.end_gfn)  # a segment may serve two slots
        # While a slot is logged its dirty pages are mapped by leaves, so there is a leaf for each frame.
        gfns, words = frames[here], self.tables.memory.words
        pgstes = self.tables.locate(gfns)[0] + ENTRIES
        changed = words[pgstes] & np.uint64(PGSTE_UC) != 0
        gfns, pgstes = gfns[changed], pgstes[changed]
        if bitmap is not None:
            bitmap.merge(words_of_pages(gfns - slot.base_gfn))
        self.tables.revoke_entries(pgstes - ENTRIES)
        words[pgstes] &= np.uint64(~PGSTE_UC & (1 << 64) - 1)
        self._changed = array("q", frames[~here].tobytes())

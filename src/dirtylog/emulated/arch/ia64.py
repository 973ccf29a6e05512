"""ia64: virtual hash page table (VHPT) in long format, and one dirty log area for the whole machine.

A VHPT entry is four little-endian words: the translation, its size and key, a tag, and (software) the guest-physical address:

===================  =========================================================================
word, bits           meaning
===================  =========================================================================
0: 0                 P, present
0: 4:2               memory attribute (0: write-back)
0: 5                 A, accessed
0: 6                 D, dirty: a store through a translation without it is a dirty-bit fault; **the log hangs on that fault**
0: 11:9              access rights (1 read-execute, 3 read-write-execute)
0: 49:12             physical page number
1: 7:2               page size, as a power of two
2: 62:0, 63          tag; 63: the tag is invalid
===================  =========================================================================

The entry's place is its page number modulo the table's length; a page that falls on a used place takes it. When a translation
with D is inserted, the monitor sets the page's bit in the log area, *indexed by absolute guest frame number*. Reading the log
moves the slot's part of the area into the slot's bitmap and purges all translations. Slots need not start at a multiple of 64
frames, so two may share a word of the area: only the slot's own bits are taken. (KVM copied and zeroed whole words, and marked
a page at every insertion, also for loads.)

Sources: Intel Itanium Architecture SDM volume 2, 4.1 (translation formats, VHPT); Linux up to v3.18,
arch/ia64/include/asm/pgtable.h, arch/ia64/kvm/vtlb.c (mark_pages_dirty, thash_vhpt_insert), arch/ia64/kvm/kvm-ia64.c
(kvm_ia64_sync_dirty_log). Unicorn has no Itanium: guests of this port run on the trace CPU.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.emulated.port import PAGE_SHIFT, SoftwareSyncPort, Translation
from dirtylog.words import PAGES_PER_WORD, DirtyWords, word_count, words_of_pages, words_of_range

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dirtylog.emulated.port import TlbOwner
    from dirtylog.memslot import MemorySlot, SlotTable
    from dirtylog.slotbitmap import SlotBitmap

PRESENT = 1 << 0
ACCESSED = 1 << 5
DIRTY = 1 << 6
READ_EXECUTE = 1 << 9
READ_WRITE_EXECUTE = 3 << 9
PPN_MASK = (1 << 50) - 4096
TAG_INVALID = 1 << 63

VHPT_BITS = 11  # 64 KiB, as KVM gave each vCPU
VHPT_ENTRIES = 1 << VHPT_BITS
_ENTRY = struct.Struct("<4Q")


class Ia64Port(SoftwareSyncPort):
    """VHPT and log area: an insertion with D marks the area; the flush purges every translation."""

    name = "ia64"
    how = "log area per machine"
    isa = "trace"
    max_gfn = 1 << 38

    def __init__(self, slots: SlotTable, vcpus: Sequence[TlbOwner]) -> None:
        super().__init__(slots, vcpus)
        self._area = np.zeros(0, np.uint64)
        self._area_view = self._area.data
        self._tables: dict[int, bytearray] = {}

    def translate(self, vcpu: int, gfn: int, write: bool) -> Translation | None:  # noqa: FBT001 - as declared
        """Look in the vCPU's VHPT; where the entry is missing, or lacks D for a store, insert it."""
        with self.mmu_lock:
            if gfn >= self.max_gfn:
                return None
            table = self.vhpt(vcpu)
            offset = (gfn & VHPT_ENTRIES - 1) * _ENTRY.size
            entry, _, tag, _ = _ENTRY.unpack_from(table, offset)
            if not entry & PRESENT or tag != gfn >> VHPT_BITS or (write and not entry & DIRTY):
                entry = self._insert(table, offset, gfn, write)
                if entry is None:
                    return None
            return entry & PPN_MASK, bool(entry & DIRTY)

    def vhpt(self, vcpu: int) -> bytearray:
        """Return a vCPU's VHPT, of 2048 entries of 32 bytes."""
        table = self._tables.get(vcpu)
        if table is None:
            table = self._tables[vcpu] = bytearray(_ENTRY.pack(0, 0, TAG_INVALID, 0) * VHPT_ENTRIES)
        return table

    def sync_dirty_log(self, slot: MemorySlot) -> None:
        """Move the slot's bits of the log area into its bitmap; the bits of neighbours in shared words stay."""
        with self.mmu_lock:
            self._collect(slot, slot.dirty_bitmap)

    def start_logging(self, slot: MemorySlot) -> None:
        """Forget what the area holds from before, and purge."""
        self._collect(slot, None)
        self._purge()

    def stop_logging(self, slot: MemorySlot) -> None:
        """Nothing to do: the area is cleared when logging starts again."""

    def unmap(self, slot: MemorySlot) -> None:
        """Purge; what the area holds of the slot's old place goes with the slot."""
        self._collect(slot, slot.dirty_bitmap)
        self._purge()

    def flush_tlbs(self, slot: MemorySlot) -> None:
        """Purge every VHPT, then the translations that were loaded from them."""
        with self.mmu_lock:
            self._purge()
        super().flush_tlbs(slot)

    def _insert(self, table: bytearray, offset: int, gfn: int, write: bool) -> int | None:  # noqa: FBT001 - hot path
        slot = self.slots.find(gfn)
        if slot is None or (write and slot.readonly):
            return None
        self.stats.faults += 1
        address = slot.host_address + (gfn - slot.base_gfn << PAGE_SHIFT)
        rights = READ_EXECUTE if slot.readonly else READ_WRITE_EXECUTE
        entry = address | rights | ACCESSED | PRESENT
        if write or (slot.dirty_bitmap is None and not slot.readonly):
            entry |= DIRTY
        if write and slot.dirty_bitmap is not None:
            word = gfn // PAGES_PER_WORD
            if word >= len(self._area):
                self._area = np.concatenate((self._area, np.zeros(word_count(slot.end_gfn) - len(self._area), np.uint64)))
                self._area_view = self._area.data
            self._area_view[word] |= 1 << gfn % PAGES_PER_WORD
        _ENTRY.pack_into(table, offset, entry, PAGE_SHIFT << 2, gfn >> VHPT_BITS, gfn << PAGE_SHIFT)
        return entry

    def _collect(self, slot: MemorySlot, bitmap: SlotBitmap | None) -> None:
        """Mark the slot's pages of the log area in ``bitmap``, and clear just their bits."""
        first = slot.base_gfn // PAGES_PER_WORD
        area = self._area[first : word_count(slot.end_gfn)]
        dirty = np.flatnonzero(area)
        own = words_of_range(slot.base_gfn % PAGES_PER_WORD, slot.npages)
        values = area[dirty] & own.values[dirty]
        if bitmap is not None:
            gfns = DirtyWords(dirty + first, values).pages()
            bitmap.merge(words_of_pages(gfns - slot.base_gfn))
        area[dirty] &= ~values

    def _purge(self) -> None:
        for table in self._tables.values():
            table[:] = _ENTRY.pack(0, 0, TAG_INVALID, 0) * VHPT_ENTRIES

"""ppc hv: the hashed page table of a 64-bit server, whose hardware keeps a changed bit in each entry.

An entry (HPTE) is two big-endian doublewords; eight make a group, chosen by a hash:

===================  =========================================================================
word, mask           meaning
===================  =========================================================================
0: bits 63:62        segment size (1: 1 TiB)
0: bits 61:7         AVPN, the abbreviated virtual page number: virtual page >> 11
0: 0x20              software: absent, set while the dirty bit is being collected
0: 0x02              H, the entry lies in its secondary group
0: 0x01              V, valid
1: 0x0ffffffffffff000 real page number
1: 0x100             R, referenced
1: 0x080             C, changed: **set by the hardware, collected and cleared by the log**
1: 0x010             M, memory coherence
1: 0x003             PP, protection: 2 read-write, 3 read-only
===================  =========================================================================

The guest runs in the virtual real mode area (VRMA), one segment of 1 TiB with VSID 0x1ffffff, so a virtual page is the VSID and
the guest frame; its hash is VSID ^ VSID << 25 ^ frame. A segment has one base page size, 4 KiB here: there are no huge mappings
to split.

*C may be written late.* A processor that has changed a page holds that in its TLB, and writes C back when it pleases. To
collect C of a page, the entry is made absent and invalidated, which forces the write. While vCPUs run, a page whose C is not
written yet will be reported by a later get; when none runs there may be no later one, so every writable entry is forced (KVM
6c576e74fd91). Here a write-back is late by one get, or until its vCPU flushes.

Sources: Power ISA 2.07 book III-S, 5.7.7 (page table); Linux arch/powerpc/include/asm/book3s/64/mmu-hash.h,
arch/powerpc/include/asm/kvm_book3s_64.h, arch/powerpc/kvm/book3s_64_mmu_hv.c (kvm_test_clear_dirty_npages).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.emulated.hashed import HashedTable
from dirtylog.emulated.port import PAGE_SHIFT, SoftwareSyncPort, Translation
from dirtylog.words import words_of_pages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dirtylog.emulated.port import TlbOwner
    from dirtylog.memslot import MemorySlot, SlotTable
    from dirtylog.slotbitmap import SlotBitmap

VALID = 0x01
SECONDARY = 0x02
ABSENT = 0x20
SEGMENT_1T = 1 << 62
REAL_PAGE = 0x0FFF_FFFF_FFFF_F000
REFERENCED = 0x100
CHANGED = 0x080
COHERENT = 0x010
PP_READ_WRITE = 2
PP_READ_ONLY = 3
PP_MASK = 3

VRMA_VSID = 0x1FF_FFFF
VRMA_FRAMES = 1 << 28
# The bytes of a big-endian entry that hold V and absent, and C.
_VALID_BYTE = 7
_CHANGED_BYTE = 15
MIN_GROUPS = 1 << 11  # the eleven bits of the page number that AVPN leaves out must choose the group


def _first_word(gfn: int) -> int:
    return SEGMENT_1T | (VRMA_VSID << 28 | gfn) >> 11 << 7 | VALID


def _hash(gfn: int) -> int:
    return VRMA_VSID ^ VRMA_VSID << 25 ^ gfn


@dataclass(slots=True)
class _LateWrites:
    """Entries whose C bit a processor has still to write: since the last sync, and from before it."""

    young: set[int] = field(default_factory=set)
    old: set[int] = field(default_factory=set)


class PpcHvPort(SoftwareSyncPort):
    """HPT with hardware changed bits: the sync collects C."""

    name = "ppc-hv"
    how = "hardware C bit, harvested"
    isa = "ppc64"
    max_gfn = VRMA_FRAMES

    def __init__(self, slots: SlotTable, vcpus: Sequence[TlbOwner]) -> None:
        super().__init__(slots, vcpus)
        self.table = HashedTable(8, MIN_GROUPS, tag=_first_word, hash_of=_hash, secondary=SECONDARY)
        self._late: dict[int, _LateWrites] = {}
        # Entries whose C was written since it was last cleared: where a sync looks. Whether it is set, the entry says.
        self._changed = np.empty(0, np.int64)

    def translate(self, vcpu: int, gfn: int, write: bool) -> Translation | None:  # noqa: FBT001 - as declared
        """Search the table as the processor does. A store to a page with C clear is what will set C."""
        with self.mmu_lock:
            if gfn >= self.max_gfn:  # the hash would take it for another frame
                return None
            found = self.table.find(gfn)
            if found is None:
                found = self._enter(gfn)
                if found is None:
                    return None
            entry, second = found
            if write:
                if second & PP_MASK == PP_READ_ONLY:
                    return None
                if not second & CHANGED:
                    self._late.setdefault(vcpu, _LateWrites()).young.add(entry)
            return second & REAL_PAGE, write or bool(second & CHANGED)

    def sync_dirty_log(self, slot: MemorySlot) -> None:
        """Collect C of every entry of the slot into the bitmap, and clear it."""
        with self.mmu_lock:
            self._write_back_late()
            self._collect(slot, slot.dirty_bitmap)

    def start_logging(self, slot: MemorySlot) -> None:
        """Forget the changes from before."""
        self._write_back_all()
        self._collect(slot, None)

    def stop_logging(self, slot: MemorySlot) -> None:
        """Nothing to do: the hardware keeps C whether anyone asks or not."""

    def unmap(self, slot: MemorySlot) -> None:
        """Free the slot's entries; C is saved first, for a slot that moves keeps its log."""
        self._write_back_all()
        self._collect(slot, slot.dirty_bitmap)
        self.table.invalidate(self.table.of_range(slot.base_gfn, slot.npages))

    def tlb_flushed(self, vcpu: int) -> None:
        """Write back what the TLB held."""
        with self.mmu_lock:
            self._write_back(vcpu)

    def _enter(self, gfn: int) -> tuple[int, int] | None:
        """Make the entry of a page of the VRMA, as the host does on the first touch."""
        slot = self.slots.find(gfn)
        if slot is None:
            return None
        self.stats.faults += 1
        address = slot.host_address + (gfn - slot.base_gfn << PAGE_SHIFT)
        second = address | REFERENCED | COHERENT | (PP_READ_ONLY if slot.readonly else PP_READ_WRITE)
        entry = self.table.insert(gfn, second)
        while entry is None:
            self._write_back_all()  # it goes by the number of the entry, which changes now
            self.table.grow()
            self._changed = np.flatnonzero(self._bytes(_CHANGED_BYTE) & CHANGED != 0)
            entry = self.table.insert(gfn, second)
        return entry, second

    def _write_back_late(self) -> None:
        """Let C bits arrive: all those of a vCPU that is not running, of others those that have been late for one get."""
        for vcpu, late in self._late.items():
            if vcpu < len(self.vcpus) and self.vcpus[vcpu].in_guest:
                self._set_changed(late.old)
                late.old, late.young = late.young, set()
            else:
                self._write_back(vcpu)

    def _write_back(self, vcpu: int) -> None:
        late = self._late.get(vcpu)
        if late is not None:
            self._set_changed(late.old)
            self._set_changed(late.young)
            late.old, late.young = set(), set()

    def _write_back_all(self) -> None:
        for vcpu in self._late:
            self._write_back(vcpu)

    def _set_changed(self, entries: set[int]) -> None:
        if entries:
            numbers = np.fromiter(entries, np.int64, len(entries))
            self._changed = np.concatenate((self._changed, numbers))
            self._bytes(_CHANGED_BYTE)[numbers] |= np.uint8(CHANGED)

    def _bytes(self, number: int) -> NDArray[np.uint8]:
        """Return this byte of every entry, a view."""
        return self.table.octets[number :: self.table.entry_bytes]

    def _collect(self, slot: MemorySlot, bitmap: SlotBitmap | None) -> None:
        """Mark the slot's pages whose C is set in ``bitmap``, and clear C; the entries are absent meanwhile."""
        valid, changed = self._bytes(_VALID_BYTE), self._bytes(_CHANGED_BYTE)
        gfns = self.table.frames[self._changed]
        here = (gfns >= slot.base_gfn) & (gfns < slot.end_gfn)
        set_here = here & (changed[self._changed] & CHANGED != 0)
        entries, gfns = self._changed[set_here], gfns[set_here]
        if bitmap is not None:
            bitmap.merge(words_of_pages(gfns - slot.base_gfn))
        valid[entries] ^= np.uint8(VALID | ABSENT)
        changed[entries] &= ~np.uint8(CHANGED)
        valid[entries] ^= np.uint8(VALID | ABSENT)
        self._changed = self._changed[~here]
        # The invalidation that follows forces the write of C by every processor: what is late of these pages is in this report.
        for late in self._late.values():
            if late.old or late.young:
                late.old.difference_update(entries.tolist())
                late.young.difference_update(entries.tolist())

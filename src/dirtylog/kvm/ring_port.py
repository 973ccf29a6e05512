"""The dirty ring as a port: whoever gets, a collector, and a vCPU that is full, harvest the rings into the slots' bitmaps.

*Harvest, mark and reset are one critical section of mmu_lock.* A get takes marks under mmu_lock too; so it cannot take the mark
of a page that is harvested but not yet protected again: such a page could be written after the get without being logged.
Marks come before the flag that gives an entry to the kernel, so whatever ends a harvest early, an entry is marked or still there.

*Before a get harvests, every vCPU leaves the guest once.* Hardware that logs into a buffer of its own (Intel's page-modification
log) is emptied into the ring only then.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.errors import CoverageLostError, InvalidArgumentError, UnsupportedError
from dirtylog.guests.vcpu import leave_guest
from dirtylog.kvm import abi
from dirtylog.kvm.abi import Cap
from dirtylog.kvm.ports import KvmPort
from dirtylog.kvm.ring import PIECE, DirtyRing, Place
from dirtylog.linux.signals import block_signals, without_signals
from dirtylog.memslot import SlotFlags
from dirtylog.options import MAX_ENTRIES
from dirtylog.port import SyncPort
from dirtylog.words import word_count, words_of_pages, words_of_range

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from dirtylog.guests.vcpu import Vcpu
    from dirtylog.kvm.arch.architecture import Architecture
    from dirtylog.kvm.vcpu import KvmVcpu
    from dirtylog.kvm.vm import KvmVm
    from dirtylog.memslot import MemorySlot, SlotTable

# The collector harvests from this share of a ring on: so that a vCPU seldom finds its ring full.
_SHARE = 4
# Entries a second that one vCPU may make, for how often the collector looks: a first store costs it half a microsecond at least.
_ENTRIES_PER_SECOND = 2_000_000
_RESET_TRIES = 3


@dataclass(slots=True)
class RingStats:
    """Counters. ``overflows`` are those after which every page was reported, for entries had been lost."""

    harvested: int = 0
    resets: int = 0
    full_exits: int = 0
    overflows: int = 0


def choose_ring(check_extension: Callable[[Cap], int], architecture: Architecture) -> tuple[Cap, bool]:
    """Return the capability that this VM's rings are enabled with, and whether a bitmap goes with them.

    Raises :class:`UnsupportedError` where there are none, or where a ring alone is known to lose pages: without the bitmap,
    arm64 maps huge pages while it logs and reports one page of each (seen on Linux 6.12 and 7.3).
    """
    cap = Cap.DIRTY_LOG_RING_ACQ_REL if check_extension(Cap.DIRTY_LOG_RING_ACQ_REL) else Cap.DIRTY_LOG_RING
    if not architecture.ring_offset_pages or not check_extension(cap):
        raise UnsupportedError("this host's KVM has no dirty rings (Linux 5.11 has them, on x86)", remedy="use the bitmap")
    with_bitmap = bool(check_extension(Cap.DIRTY_LOG_RING_WITH_BITMAP))
    if architecture.ring_alone_loses_pages and not with_bitmap:
        raise UnsupportedError(
            "dirty rings on this architecture lose pages unless a bitmap goes with them",
            reason="its KVM lacks KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP (Linux 6.2 has it)",
            remedy="use the bitmap",
        )
    return cap, with_bitmap


class KvmRingPort(KvmPort, SyncPort):
    """KVM_CAP_DIRTY_LOG_RING. ``entries`` is the length of each vCPU's ring, a power of two; before any vCPU or slot."""

    name = "kvm-ring"
    how = "dirty ring, harvested and reset"

    def __init__(
        self, vm: KvmVm, architecture: Architecture, slots: SlotTable, vcpus: Sequence[Vcpu], *, entries: int = MAX_ENTRIES
    ) -> None:
        super().__init__(vm)
        if entries < 1 or entries & (entries - 1):
            raise InvalidArgumentError(f"a dirty ring of {entries} entries: it must be a power of two", remedy="such as 4096")
        cap, self._with_bitmap = choose_ring(vm.check_extension, architecture)
        vm.enable_dirty_ring(cap, entries * abi.DIRTY_GFN.itemsize)
        if self._with_bitmap:
            vm.enable_cap(Cap.DIRTY_LOG_RING_WITH_BITMAP)
        self.entries = entries
        self.stats = RingStats()
        self._offset_pages = architecture.ring_offset_pages
        self._slots = slots
        self._vcpus = vcpus
        self._rings: list[DirtyRing] = []
        # Whether entries were lost, and every page has still to be reported for it.
        self._all_due = False
        self._copies: dict[MemorySlot, NDArray[np.uint64]] = {}
        # By vCPU: where its ring stood when it last came with a full one.
        self._stuck_at: dict[int, int] = {}
        self._collector: threading.Thread | None = None
        self._closing = threading.Event()
        self._failure: BaseException | None = None

    def add_ring(self, vcpu: KvmVcpu) -> None:
        """Map the ring of a new vCPU."""
        memory = vcpu.map_ring(self._offset_pages, self.entries * abi.DIRTY_GFN.itemsize)
        with self.mmu_lock:
            self._rings.append(DirtyRing(np.frombuffer(memory, abi.DIRTY_GFN), vcpu.hold))

    def start_logging(self, slot: MemorySlot) -> None:
        """Set the slot's flag; the first time, start the collector."""
        super().start_logging(slot)
        if self._collector is None and not self._closing.is_set():
            self._collector = threading.Thread(target=self._collect_for_ever, name="kvm-ring-collector", daemon=True)
            self._collector.start()

    def stop_logging(self, slot: MemorySlot) -> None:
        """Clear the slot's flag, and drop what the rings still hold of it."""
        super().stop_logging(slot)
        self._copies.pop(slot, None)
        if self._failure is None:
            self.collect()

    def sync_dirty_log(self, slot: MemorySlot) -> None:
        """Harvest every ring into the bitmaps, and have the pages protected again."""
        if self._failure is not None:
            raise CoverageLostError("the dirty rings can no longer be harvested", reason=str(self._failure)) from self._failure
        leave_guest(self._vcpus)
        with self.mmu_lock:
            self.collect()
            if self._with_bitmap and slot.dirty_bitmap is not None:
                # Last: what was written without a running vCPU is there, and the kernel's get takes it. So it stays in the copy
                # until it is merged, and what an interrupt has left there is merged before the next get writes over it.
                copy = self._copies.setdefault(slot, np.zeros(word_count(slot.npages), np.uint64))
                slot.dirty_bitmap.merge_all(copy)
                self._vm.get_dirty_log(slot.id, copy)
                slot.dirty_bitmap.merge_all(copy)
                copy[:] = 0

    def collect(self) -> int:
        """Harvest every ring, mark, and reset; return how many entries there were. Called with mmu_lock held.

        Ring after ring, so that what the kernel says it has reset is of one ring: that is how its place in each is known.
        """
        for ring in self._rings:
            if ring.given:
                self._resume(ring)
        before = self.stats.harvested
        for ring in self._rings:
            self._harvest(ring)
        if self._all_due:
            self._report_everything()
        return self.stats.harvested - before

    def ring_full(self, vcpu: int) -> None:
        """Make room for a vCPU that may not go on before there is some. Called on its thread, which waits."""
        with self.mmu_lock:
            self.stats.full_exits += 1
            ring = self._rings[vcpu]
            before = ring.next
            self.collect()
            # Full, and nothing to harvest: either somebody harvested since it left the guest; or, when it comes back full and
            # nobody has, a gap is so long that the vCPU may not run, and so cannot show where it ends. It is more than a quarter.
            if ring.next == before and self._stuck_at.get(vcpu) == before:
                self._lose(ring)
                ring.fill(ring.size // _SHARE)
                ring.give(ring.size // _SHARE)
                if self._reset(ring):
                    ring.place = Place.GAP
                self._report_everything()
            self._stuck_at[vcpu] = ring.next

    def end_collector(self) -> None:
        """End the collector for good: from now on only gets and vCPUs that are full harvest."""
        self._closing.set()
        if self._collector is not None:
            self._collector.join()
            self._collector = None

    def close(self) -> None:
        """End the collector and let go of the rings."""
        self.end_collector()
        with self.mmu_lock:
            self._rings.clear()

    def _mark_ahead(self, ring: DirtyRing, count: int) -> None:
        for start in range(0, count, PIECE):
            self._mark(ring.ahead(min(PIECE, count - start), start))

    def _mark(self, entries: NDArray[np.void]) -> None:
        """Set the bits of harvested entries. An entry of a slot that has gone, or shrunk since, is of no use to anyone."""
        slots, offsets = entries["slot"], entries["offset"]
        while len(slots):
            ours = slots == slots[0]
            alone = bool(ours.all())
            slot = self._slots.get(int(slots[0]))
            if slot is not None and slot.dirty_bitmap is not None:
                mine = offsets if alone else offsets[ours]
                inside = mine < np.uint64(slot.npages)
                slot.dirty_bitmap.merge(words_of_pages((mine if inside.all() else mine[inside]).astype(np.int64)))
            if alone:
                break
            slots, offsets = slots[~ours], offsets[~ours]

    def _harvest(self, ring: DirtyRing) -> None:
        if ring.place is Place.KNOWN and (count := ring.waiting()):
            self._mark_ahead(ring, count)
            ring.give(count)
            # After the flags are set and before the reset: what is written over from here on the kernel does not reset.
            if count == ring.size or ring.came_round():
                self._lose(ring)
            self._reset(ring)
        if ring.place is Place.LOST or (ring.place is Place.GAP and ring.in_use()):
            self._recover(ring)

    def _lose(self, ring: DirtyRing) -> None:
        self._all_due = True
        ring.place = Place.LOST

    def _recover(self, ring: DirtyRing) -> None:
        """With its vCPU held, have everything reset that is in use for sure: a step towards the kernel's place."""
        with ring.hold():
            count = ring.in_use()
            if count == ring.size:
                self._lose(ring)
            ring.fill(count)
            self._mark_ahead(ring, count)
            ring.give(count)
            if self._reset(ring):
                ring.place = Place.KNOWN if ring.place is Place.GAP and count else Place.GAP

    def _reset(self, ring: DirtyRing) -> bool:
        """Have what the ring has given to the kernel reset; return False if that was not to be had for all of it."""
        tries = 0
        while ring.given and tries < _RESET_TRIES:
            done = without_signals(self._vm.reset_dirty_rings)
            ring.taken(done)
            self.stats.resets += 1
            self.stats.harvested += done
            tries = 0 if done else tries + 1
            # It ended early. Since Linux 6.17 the pages that it had gathered until then may not be protected.
            self._all_due |= ring.given > 0
        if not ring.given:
            return True
        # The kernel has written over what is left, and does not take it for harvested: as if it had never been given.
        self._lose(ring)
        ring.take_back()
        return False

    def _resume(self, ring: DirtyRing) -> None:
        """Go on where a harvest was interrupted."""
        self._all_due = True
        if ring.given == ring.size or ring.came_round():
            # Then nobody can tell what of it the kernel has reset.
            self._failure = CoverageLostError("a harvest of a dirty ring was interrupted while the ring was full")
            raise self._failure
        ring.take_back()

    def _report_everything(self) -> None:
        """Protect every page of every logged slot, and mark it: entries were lost, and nobody knows which."""
        self.stats.overflows += 1
        for slot in self._slots:
            bitmap = slot.dirty_bitmap
            if bitmap is None:
                continue
            flags = slot.flags
            try:
                # Off and on again: to switch logging on protects every page, and flushes in any case.
                slot.flags = flags & ~SlotFlags.LOG_DIRTY_PAGES
                self.place(slot)
            finally:
                slot.flags = flags
                self.place(slot)
                bitmap.merge(words_of_range(0, slot.npages))
        self._all_due = False

    def _collect_for_ever(self) -> None:
        block_signals()
        share = max(1, self.entries // _SHARE)
        interval = min(max(share / _ENTRIES_PER_SECOND, 0.001), 0.01)
        try:
            while not self._closing.wait(interval):
                if any(ring.reaches(share) for ring in self._rings):
                    with self.mmu_lock:
                        self.collect()
        except BaseException as error:  # noqa: BLE001 - kept for the next get: a thread has nobody to raise it to
            self._failure = error

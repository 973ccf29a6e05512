"""Writes to process memory, logged by a userfaultfd's asynchronous write protection and taken with PAGEMAP_SCAN.

A page is written when its page table entry lacks the userfaultfd's mark: also when there is no entry. So memory is *armed* by
setting the mark everywhere. What the kernel discards (madvise) loses it, and counts as written: rightly, for it reads as zeros now.

An entry for each page that is not there would cost a huge and mostly empty mapping eight bytes a page, and report every one of them
at first. Such a mapping is watched as *sparse*: only pages that are there are armed, the others count as written by themselves once
they come; and that a page has been discarded shows in a second scan, for holes where pages were.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from dirtylog.bitmap import DirtyBitmap
from dirtylog.errors import AccessDeniedError, DirtyLogError, TargetGoneError
from dirtylog.linux import abi
from dirtylog.linux.abi import Category
from dirtylog.linux.holes import words_in_holes
from dirtylog.linux.mappings import read_mappings
from dirtylog.linux.pagemap import POPULATED, Pagemap, Scanner
from dirtylog.linux.probe import sees_discarded_tables
from dirtylog.linux.watch import Watch
from dirtylog.port import Exactness, SyncPort
from dirtylog.words import DirtyWords, words_of_range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from dirtylog.linux.userfaultfd import Userfaultfd
    from dirtylog.memslot import MemorySlot

BLIND_SPOTS = (
    "writes through another mapping of the same memory, by another process, or to a mapped file by write(2)",
    "DMA into pinned pages (io_uring registered buffers, VFIO, RDMA), and O_DIRECT reads that are in flight during a get",
    "discards of shared memory and of huge pages: MADV_REMOVE, fallocate, truncate; MADV_DONTNEED on hugetlbfs",
    "MADV_DONTNEED of changed pages of a private file mapping, which then show the file again",
    "what another one who scans the same memory takes away (PAGEMAP_SCAN with PM_SCAN_WP_MATCHING)",
)

_THERE = np.uint64(POPULATED)
# Up to so many pages a mapping is armed throughout, and above that if one in so many is there.
_SMALL = 1 << 16
_POPULATED = 8


class UffdPort(SyncPort):
    """WP_ASYNC and PAGEMAP_SCAN: the kernel keeps a bit in each page table entry, and takes, arms and flushes in one call."""

    name = "uffd"
    how = "userfaultfd WP_ASYNC, PAGEMAP_SCAN"
    exactness: ClassVar[Exactness] = Exactness.SUPERSET
    """A store that meets a scan can be reported twice, and what is mapped anew is reported as a whole."""
    blind_spots: ClassVar[tuple[str, ...]] = BLIND_SPOTS

    def __init__(self, open_descriptors: Callable[[], tuple[Userfaultfd, Pagemap]]) -> None:
        super().__init__()
        self._open_descriptors = open_descriptors
        self._uffd: Userfaultfd | None = None
        self._pagemap: Pagemap | None = None
        self._scanner: Scanner | None = None
        # It guards the scanner too, which several memories of this process share, and is held throughout a scan.
        self.mmu_lock = threading.RLock()
        self._watched: dict[MemorySlot, Watch] = {}
        self.always: dict[MemorySlot, DirtyWords] = {}
        """Pages that count as written at every sync: pinned for a device, which writes them without a fault."""

    # --- hooks

    def start_logging(self, slot: MemorySlot) -> None:
        """Register the slot, and arm it: what was written before does not count."""
        watch = Watch(slot, slot.host_address, slot.host_address + slot.nbytes, slot.page_size.bit_length() - 1)
        with self.mmu_lock:
            uffd, scanner = self._descriptors()
            # A scan that was interrupted may have left pages in the vector: to arm is to scan, and would overwrite them.
            scanner.settle(self._deliver_anywhere)
            self._watched[slot] = watch
            try:
                for start, end in self._unshared(watch.start, watch.end, watch):
                    uffd.register_afresh(start, end - start)
            except DirtyLogError as error:
                self._cannot_arm(watch, error)
                return
            try:
                self._arm(watch, scanner)
            except AccessDeniedError:
                # What another slot watches has lost its watch, or this one was mapped anew or moved meanwhile.
                self._watch_anew(watch, scanner)
            except DirtyLogError as error:
                scanner.settle(self._deliver_anywhere)
                self._cannot_arm(watch, error)

    def stop_logging(self, slot: MemorySlot) -> None:
        """Let go of the slot's memory."""
        with self.mmu_lock:
            self.always.pop(slot, None)
            watch = self._watched.pop(slot, None)
            if watch is not None and self._uffd is not None and not self._uffd.closed:
                for start, end in self._unshared(watch.start, watch.end, watch):
                    self._uffd.unregister(start, end - start)

    def mark_contents(self, slot: MemorySlot) -> None:
        """Set the bits of the pages that are there; of all pages where one that is not there is not zeros."""
        watch = self._watched[slot]
        if watch.contents is None:
            super().mark_contents(slot)
        else:
            watch.mark(watch.contents)

    def sync_dirty_log(self, slot: MemorySlot) -> None:
        """Take the written pages, and arm them."""
        with self.mmu_lock:
            watch = self._watched[slot]
            watch.contents = None
            _, scanner = self._descriptors()
            scanner.settle(self._deliver_anywhere)
            try:
                if watch.new:
                    # An interrupt came before all that is foreign had been marked.
                    self._watch_anew(watch, scanner)
                else:
                    self._take(watch, scanner)
            except AccessDeniedError:
                self._watch_anew(watch, scanner)
            except TargetGoneError:
                self._address_space_gone()
                scanner.settle(self._deliver_anywhere)
                self.mark_all(watch)
            always = self.always.get(slot)
            if always is not None:
                watch.mark(always)

    def flush_tlbs(self, slot: MemorySlot) -> None:
        """Do nothing: the kernel flushes before the scan returns."""

    def refuses(self, start: int, nbytes: int) -> DirtyLogError | None:
        """Return why memory cannot be watched, or None if it is from now on."""
        with self.mmu_lock:
            uffd, _ = self._descriptors()
            try:
                for first, end in self._unshared(start, start + nbytes):
                    uffd.register(first, end - first)
            except DirtyLogError as error:
                return error
        return None

    def open(self) -> None:
        """Have the descriptors now, which are otherwise had when they are needed; raises what keeps them away."""
        with self.mmu_lock:
            self._descriptors()

    def close(self) -> None:
        """Close the descriptors: the kernel forgets what was registered."""
        with self.mmu_lock:
            self._watched.clear()
            for descriptor in (self._uffd, self._pagemap):
                if descriptor is not None:
                    descriptor.close()
            self._uffd = self._pagemap = self._scanner = None

    # --- for kinds of memory

    def _neighbours(self, watch: Watch) -> list[Watch]:  # noqa: ARG002 - for those who have some
        """Return other slots that lie on the same pages: what is taken for one is taken for all. Mappings never overlap."""
        return []

    def _unshared(self, start: int, end: int, of: Watch | None = None) -> Iterator[tuple[int, int]]:  # noqa: ARG002 - as above
        """Yield the parts of a range of addresses that no slot watches, but for one."""
        yield start, end

    def _cannot_arm(self, watch: Watch, error: DirtyLogError) -> None:  # noqa: ARG002 - for those who can go on
        """Raise that a slot cannot be armed, or go on without."""
        raise error

    def _address_space_gone(self) -> None:
        """Raise what there is to say of that; if it returns, all pages count as written."""

    # --- scans, with mmu_lock held

    def _descriptors(self) -> tuple[Userfaultfd, Scanner]:
        # Closed, and not by a fork: a close was interrupted.
        if self._uffd is None or self._scanner is None or (self._uffd.closed and not self._uffd.left_to_parent):
            if self._pagemap is not None:
                self._pagemap.close()
            self._uffd, self._pagemap = self._open_descriptors()
            self._scanner = Scanner(self._pagemap)
        return self._uffd, self._scanner

    def _arm(self, watch: Watch, scanner: Scanner) -> None:
        """Arm a slot, and note what is there. What was written before counts for its neighbours only."""
        there: list[DirtyWords] = []

        def note(regions: NDArray[np.void]) -> None:
            if watch.slot.anonymous:
                there.append(watch.words(regions[(regions["categories"] & _THERE) != 0]))
            for neighbour in self._neighbours(watch):
                neighbour.deliver(regions)

        returned = Category.WRITTEN | POPULATED
        if watch.slot.anonymous:
            # First what is there; then, if the holes are to be armed too, what has come to be there meanwhile.
            scanner.take(watch.start, watch.end, note, anyof=POPULATED, returned=returned)
            # What a neighbour has armed, or a slot before this one, was not written since, and is there all the same.
            scanner.populated(watch.start, watch.end, lambda regions: there.append(watch.words(regions)))
            if self._is_sparse(watch.slot, sum(int(np.bitwise_count(words.values).sum()) for words in there)):
                watch.populated = DirtyBitmap(watch.slot.npages)
            else:
                scanner.take(watch.start, watch.end, note, returned=returned)
            watch.contents = _union(watch.slot.npages, there)
            if watch.populated is not None:
                watch.populated.set_words(watch.contents)
        else:
            scanner.take(watch.start, watch.end, note)

    def _is_sparse(self, slot: MemorySlot, populated: int) -> bool:
        return not sees_discarded_tables() or (slot.npages > _SMALL and populated * _POPULATED < slot.npages)

    def _take(self, watch: Watch, scanner: Scanner) -> None:
        def deliver(regions: NDArray[np.void]) -> None:
            watch.deliver(regions)
            for neighbour in self._neighbours(watch):
                neighbour.deliver(regions)

        if watch.populated is None:
            scanner.take(watch.start, watch.end, deliver, careful=watch.careful)
            return
        scanner.take(watch.start, watch.end, deliver, anyof=POPULATED)
        gone: list[DirtyWords] = []
        scanner.holes(watch.start, watch.end, lambda regions: self._discarded(watch, regions, gone))
        for words in gone:
            # They are armed as they are: should they come, and be discarded again before the next scan, they are holes again.
            for region in watch.regions(words):
                scanner.take(int(region["start"]), int(region["end"]), deliver)

    def _discarded(self, watch: Watch, holes: NDArray[np.void], found: list[DirtyWords]) -> None:
        """Report the pages that had an entry before and lie in holes now."""
        populated = watch.populated
        if populated is None:
            return
        first = (holes["start"].astype(np.int64) - watch.start) >> watch.shift
        end = (holes["end"].astype(np.int64) - watch.start) >> watch.shift
        gone = words_in_holes(populated.nonzero_words(), first, end)
        if gone:
            watch.mark(gone)
            for neighbour in self._neighbours(watch):
                neighbour.deliver(watch.regions(gone))
            found.append(gone)

    def _watch_anew(self, watch: Watch, scanner: Scanner) -> None:
        """Register a slot again, part of which was mapped anew or moved: all that it holds counts as written."""
        scanner.settle(self._deliver_anywhere)
        watch.careful = True
        watch.new = True
        try:
            self._descriptors()[0].register_afresh(watch.start, watch.end - watch.start)
            self._take(watch, scanner)
            if watch.populated is not None:
                self._mark_foreign(watch)
            watch.new = False
        except DirtyLogError:
            # It is being mapped right now, or somebody else watches it: until that ends every get reports all of it.
            scanner.settle(self._deliver_anywhere)
            self.mark_all(watch)

    def mark_all(self, watch: Watch) -> None:
        """Count every page of a slot as written, and of its neighbours."""
        for one in (watch, *self._neighbours(watch)):
            if one.populated is not None:
                # Whatever has come to be there meanwhile has been reported now, and may be discarded later.
                one.populated.set_range(0, one.slot.npages)
            if one.slot.dirty_bitmap is not None:
                one.slot.dirty_bitmap.merge(words_of_range(0, one.slot.npages))

    def _mark_foreign(self, watch: Watch) -> None:
        """Count as written what of a sparse slot is a mapping of a file now: there a page that is not there is no zeros."""
        assert self._pagemap is not None  # noqa: S101 - it was scanned a moment ago
        for mapping in read_mappings(self._pagemap.pid):
            if not mapping.anonymous and mapping.start < watch.end and watch.start < mapping.end:
                span = np.array([(mapping.start, mapping.end, 0)], abi.PAGE_REGION)
                for one in (watch, *self._neighbours(watch)):
                    one.deliver(span)

    def _deliver_anywhere(self, regions: NDArray[np.void]) -> None:
        """Deliver what an earlier scan left, to whichever slots it belongs."""
        for watch in self._watched.values():
            watch.deliver(regions)


def _union(npages: int, parts: Iterable[DirtyWords]) -> DirtyWords:
    union = DirtyBitmap(npages)
    for words in parts:
        union.set_words(words)
    return union.nonzero_words()

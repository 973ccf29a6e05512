"""A slot of process memory that is being watched, in addresses: between the kernel's regions and the slot's bitmap."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.bitmap import DirtyBitmap
from dirtylog.linux import abi
from dirtylog.words import DirtyWords, words_of_runs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dirtylog.memslot import MemorySlot


@dataclass(eq=False, slots=True)
class Watch:
    """A slot that is being logged, in addresses. ``populated`` is there if it is sparse."""

    slot: MemorySlot
    start: int
    end: int
    shift: int
    contents: DirtyWords | None = None
    """The pages that were there at the start; None if every page must be taken to be."""
    populated: DirtyBitmap | None = None
    new: bool = False
    """Whether part of it was found to be mapped anew, and what of that is foreign has not been marked yet."""
    careful: bool = field(init=False)
    """Whether there may be huge pages of hugetlbfs: in memory that is made of them, or that was mapped anew."""

    def __post_init__(self) -> None:
        self.careful = self.slot.page_size != mmap.PAGESIZE

    def runs(self, regions: NDArray[np.void]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the slot's part of ascending regions, in pages: first ones, and those after the last ones."""
        # Addresses of a process are below 2**63.
        first, end = regions["start"].view(np.int64), regions["end"].view(np.int64)
        if len(regions) and (first[0] < self.start or end[-1] > self.end):
            first, end = np.maximum(first, self.start), np.minimum(end, self.end)
            here = first < end
            first, end = first[here], end[here]
        first, end = first - self.start, end + (((1 << self.shift) - 1) - self.start)
        first >>= self.shift
        end >>= self.shift
        return first, end

    def words(self, regions: NDArray[np.void]) -> DirtyWords:
        """Return the slot's part of ascending regions."""
        return words_of_runs(*self.runs(regions))

    def regions(self, words: DirtyWords) -> NDArray[np.void]:
        """Return pages of the slot as regions."""
        runs = DirtyBitmap.from_words(self.slot.npages, words).runs()
        regions = np.zeros(len(runs), abi.PAGE_REGION)
        regions["start"] = (runs[:, 0] << self.shift) + self.start
        regions["end"] = regions["start"] + (runs[:, 1] << self.shift).view(np.uint64)
        return regions

    def deliver(self, regions: NDArray[np.void]) -> None:
        """Set the bits of the slot's part of ascending regions; with mmu_lock held."""
        if self.populated is not None:
            self.mark(self.words(regions))
        elif self.slot.dirty_bitmap is not None:
            self.slot.dirty_bitmap.merge_runs(*self.runs(regions))

    def mark(self, words: DirtyWords) -> None:
        """Set bits of the slot's bitmap; with mmu_lock held. A page that was there must be known before its bit is delivered."""
        if self.populated is not None:
            new = DirtyBitmap.from_words(self.slot.npages, words) - self.populated
            if new:
                self.populated |= new
        if self.slot.dirty_bitmap is not None and words:
            self.slot.dirty_bitmap.merge(words)

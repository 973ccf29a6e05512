"""Heat: which stretches of a slot were written lately, and how much of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dirtylog.words import PAGES_PER_WORD, DirtyWords

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dirtylog.bitmap import DirtyBitmap

CELLS = 4096
"""A range has at most so many cells, however long it is."""
LEVELS = 9
"""Heat is shown in so many levels, each half as hot as the next; 0 is cold."""
_TRACE = 16.0


class Heat:
    """The heat of ``npages`` pages of a slot from page ``first`` on, in cells of a power of two of pages each.

    A round heats a cell to the share of its pages that were written, 0 to 1, unless it is hotter; and heat halves with each
    half-life. Where cells are as long as 64 pages, ``first`` must be a multiple of 64.
    """

    def __init__(self, first: int, npages: int) -> None:
        self.first = first
        self.npages = npages
        self.pages_per_cell = 1 << (-(-npages // CELLS) - 1).bit_length()
        self.sizes = np.full(-(-npages // self.pages_per_cell), float(self.pages_per_cell))
        self.sizes[-1] = npages - self.pages_per_cell * (len(self.sizes) - 1)
        self._cells = np.zeros(len(self.sizes))
        self._time = 0.0

    def add(self, dirty: DirtyBitmap, now: float, half_life: float) -> None:
        """Take account of a round that ended now."""
        self._cells = np.maximum(self.at(now, half_life), self._counts(dirty) / self.sizes)
        self._time = now

    def at(self, now: float, half_life: float) -> NDArray[np.float64]:
        """Return float64[cells]: what is left of the heat now."""
        return np.asarray(self._cells * 2.0 ** ((self._time - now) / half_life))

    def part(self, first: int, npages: int) -> Heat:
        """Return the heat of a range within this one, in finer cells: each as hot as the one here that holds it."""
        part = Heat(first, npages)
        pages = first - self.first + np.arange(len(part.sizes)) * part.pages_per_cell
        part._cells, part._time = self._cells[pages // self.pages_per_cell], self._time
        return part

    def _counts(self, dirty: DirtyBitmap) -> NDArray[np.int64]:
        offsets, values = dirty.nonzero_words()
        ends = (self.first // PAGES_PER_WORD, -(-(self.first + self.npages) // PAGES_PER_WORD))
        low, high = np.searchsorted(offsets, ends)
        words = DirtyWords(offsets[low:high], values[low:high])
        if self.pages_per_cell >= PAGES_PER_WORD:
            # Word by word: a page at a time costs sixty-four times as much.
            cells = (words.offsets - ends[0]) // (self.pages_per_cell // PAGES_PER_WORD)
            counts = np.bincount(cells, np.bitwise_count(words.values), minlength=len(self.sizes))
        else:
            pages = words.pages() - self.first
            within = pages[(pages >= 0) & (pages < self.npages)]
            counts = np.bincount(within // self.pages_per_cell, minlength=len(self.sizes))
        return np.asarray(counts)


def stretches(heat: NDArray[np.float64], sizes: NDArray[np.float64], count: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Show cells in ``count`` stretches: return the heat of each, float64[count], and its first cell, int64[count].

    Where there are more cells than stretches, a stretch has the mean heat of its pages; otherwise several show the same cell.
    """
    first = np.linspace(0, len(heat), count, endpoint=False).astype(np.int64)
    if count >= len(heat):
        return heat[first], first
    return np.add.reduceat(heat * sizes, first) / np.add.reduceat(sizes, first), first


def levels(heat: NDArray[np.float64], npages: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the level of each stretch of so many pages, int64[k]: 9 from a half up, 8 from a quarter up, and so on; 0 is cold.

    The lowest level stays until even the heat of one written page would be a sixteenth of what it was: a single write can be seen
    in a stretch of any length.
    """
    shown = heat >= 1 / (_TRACE * np.maximum(npages, 1))
    exponent = np.floor(np.log2(np.where(shown, heat, 1.0)))
    return np.where(shown, np.clip(exponent + LEVELS + 1, 1, LEVELS), 0).astype(np.int64)

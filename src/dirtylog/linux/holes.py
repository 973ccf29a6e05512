"""Which pages of a set lie in holes: at the cost of the words that the set has, not of the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dirtylog.words import PAGES_PER_WORD, DirtyWords, words_of_pages

if TYPE_CHECKING:
    from numpy.typing import NDArray


def words_in_holes(words: DirtyWords, first: NDArray[np.int64], end: NDArray[np.int64]) -> DirtyWords:
    """Return the pages of ``words`` that lie in the holes ``first`` up to but not ``end``, ascending, none overlapping."""
    if not len(first) or not words:
        return DirtyWords(words.offsets[:0], words.values[:0])
    start = words.offsets * PAGES_PER_WORD
    # The first hole that ends after the word's first page, or the last hole.
    hole = np.minimum(np.searchsorted(end, start, side="right"), len(end) - 1)
    whole = (first[hole] <= start) & (end[hole] >= start + PAGES_PER_WORD)
    part = ~whole & (first[hole] < start + PAGES_PER_WORD) & (end[hole] > start)
    pages = DirtyWords(words.offsets[part], words.values[part]).pages()
    hole = np.minimum(np.searchsorted(end, pages, side="right"), len(end) - 1)
    in_part = words_of_pages(pages[(first[hole] <= pages) & (pages < end[hole])])
    offsets = np.concatenate((words.offsets[whole], in_part.offsets))
    order = np.argsort(offsets, kind="stable")
    return DirtyWords(offsets[order], np.concatenate((words.values[whole], in_part.values))[order])

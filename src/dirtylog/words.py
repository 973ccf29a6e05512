"""The non-zero words of a bitmap: what the generic functions, the ports and the consumers hand to one another."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAGES_PER_WORD = 64
LITTLE_ENDIAN = np.dtype("<u8")
_ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
_ONE = np.uint64(1)
# Words expanded to single bits at a time: 8 MiB of scratch, whatever the size of the bitmap.
_BLOCK = 1 << 17
# From so many pages on, of which one in so many is there, a byte for each costs less than a sort.
_MANY = 512
_DENSE = 16


class DirtyWords(NamedTuple):
    """The non-zero words of a bitmap.

    ``offsets`` is int64[k], word numbers, ascending and without repeats; ``values`` is uint64[k], none of them zero.
    """

    offsets: NDArray[np.int64]
    values: NDArray[np.uint64]

    def __bool__(self) -> bool:
        return len(self.offsets) > 0

    def pages(self) -> NDArray[np.int64]:
        """Return the page offsets of the set bits, int64, ascending."""
        found = np.empty(int(np.bitwise_count(self.values).sum()), np.int64)
        end = 0
        for start in range(0, len(self.offsets), _BLOCK):
            offsets = self.offsets[start : start + _BLOCK]
            octets = self.values[start : start + _BLOCK].astype(LITTLE_ENDIAN).view(np.uint8)
            bits = np.flatnonzero(np.unpackbits(octets, bitorder="little").view(np.bool_))
            begin, end = end, end + len(bits)
            np.add(offsets[bits >> 6] * PAGES_PER_WORD, bits & 63, out=found[begin:end])
        return found


def word_count(npages: int) -> int:
    """Return how many 64-bit words a bitmap of ``npages`` pages has."""
    return -(-npages // PAGES_PER_WORD)


def words_of_pages(pages: NDArray[np.int64]) -> DirtyWords:
    """Return the words in which the bits of ``pages`` (any order, repeats allowed) are set."""
    if not len(pages):
        return DirtyWords(np.empty(0, np.int64), np.empty(0, np.uint64))
    if len(pages) >= _MANY:
        first = int(pages.min()) >> 6
        nwords = (int(pages.max()) >> 6) + 1 - first
        if nwords * PAGES_PER_WORD <= _DENSE * len(pages):
            return _words_of_dense_pages(pages, first, nwords)
    if np.any(pages[1:] <= pages[:-1]):
        pages = np.sort(pages)  # repeats do not matter: they are or-ed
    index = pages >> 6
    bits = _ONE << (pages & 63).astype(np.uint64)
    return _united(index, bits)


def _words_of_dense_pages(pages: NDArray[np.int64], first: int, nwords: int) -> DirtyWords:
    """Do it without a sort, by way of one byte for each page of ``nwords`` words from word ``first`` on."""
    octets = np.zeros(nwords * PAGES_PER_WORD, np.bool_)
    octets[pages - first * PAGES_PER_WORD if first else pages] = True
    values = np.packbits(octets, bitorder="little").view(LITTLE_ENDIAN).astype(np.uint64, copy=False)
    index = np.flatnonzero(values != 0)
    return DirtyWords(index + first, values[index])


def words_of_range(first: int, npages: int) -> DirtyWords:
    """Return the words in which the bits of the pages ``first`` to ``first + npages - 1`` are set."""
    if not npages:
        return words_of_pages(np.empty(0, np.int64))
    last = first + npages - 1
    index = np.arange(first >> 6, (last >> 6) + 1, dtype=np.int64)
    values = np.full(len(index), _ALL)
    values[0] &= _ALL << np.uint64(first & 63)
    values[-1] &= _ALL >> np.uint64(63 - (last & 63))
    return DirtyWords(index, values)


def words_of_runs(first: NDArray[np.int64], end: NDArray[np.int64]) -> DirtyWords:
    """Return the words in which the bits of runs of pages are set: ``first`` up to but not ``end``, ascending, none overlapping."""
    if not len(first):
        return words_of_pages(first)
    last = end - 1
    head, tail = first >> 6, last >> 6
    values = _ALL << (first & 63).astype(np.uint64)
    rest = _ALL >> (63 - (last & 63)).astype(np.uint64)
    within = head == tail
    if within.all():
        return _united(head, values & rest)
    values[within] &= rest[within]
    longer = ~within
    tail, rest = tail[longer], rest[longer]
    # The words between a run's first and its last: all ones.
    inner = tail - head[longer] - 1
    ends = np.cumsum(inner)
    between = np.arange(int(ends[-1])) + np.repeat(head[longer] + 1 - (ends - inner), inner)
    offsets = np.concatenate((head, between, tail))
    order = np.argsort(offsets, kind="stable")
    return _united(offsets[order], np.concatenate((values, np.full(len(between), _ALL), rest))[order])


def pages_of_runs(first: NDArray[np.int64], npages: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return every number of some runs: first, first + 1, ... of each, one run after the other."""
    if (npages == 1).all():
        return first
    before = np.cumsum(npages) - npages
    return np.asarray(np.arange(int(npages.sum())) + np.repeat(first - before, npages))


def _united(offsets: NDArray[np.int64], values: NDArray[np.uint64]) -> DirtyWords:
    """Return words from ascending offsets with repeats, whose values are or-ed."""
    starts = np.flatnonzero(np.concatenate(([True], offsets[1:] != offsets[:-1])))
    return DirtyWords(offsets[starts], np.bitwise_or.reduceat(values, starts))

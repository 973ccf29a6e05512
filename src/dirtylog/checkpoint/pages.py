"""Where the pages of a slot are: runs of pages, and the places of their contents in the store.

Each page that the store ever wrote has a place, a number that grows by one a page and is never used again. A run of pages that were
written one after the other has consecutive places; a run of zero pages has the place ZERO. Contents may move in the store: batches
say where a place is now, and no map changes for it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dirtylog import varint
from dirtylog.errors import CorruptDataError
from dirtylog.words import pages_of_runs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

ZERO = -1
_MISSING = -2
_LEVEL = 1
# How a run's place is written down: zeros, as the run before goes on, or by how far off that is.
_IS_ZERO, _GOES_ON, _OFF = 0, 1, 2


@dataclass(frozen=True, slots=True)
class PageMap:
    """Runs of pages by columns, int64 each: ascending by ``first``, none overlapping."""

    first: NDArray[np.int64]
    npages: NDArray[np.int64]
    place: NDArray[np.int64]

    @classmethod
    def of(cls, parts: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> PageMap:
        """Return a map of pages, each ascending: pairs of (pages, their places)."""
        pairs = list(parts)
        pages = np.concatenate([pages for pages, _ in pairs]) if pairs else np.empty(0, np.int64)
        places = np.concatenate([places for _, places in pairs]) if pairs else np.empty(0, np.int64)
        order = np.argsort(pages, kind="stable")
        pages, places = pages[order], places[order]
        return cls(pages, np.ones(len(pages), np.int64), places).joined()

    @classmethod
    def one_after_another(cls, maps: Sequence[PageMap]) -> PageMap:
        """Return maps as one, each of pages after those of the one before."""
        if not maps:
            return cls.of(())
        return cls(*(np.concatenate([getattr(one, name) for one in maps]) for name in ("first", "npages", "place"))).joined()

    @classmethod
    def layers(cls, npages: int, maps: Iterable[PageMap]) -> PageMap:
        """Return all that maps have of a slot of so many pages, each laid over those before it. What many have costs no more."""
        place = np.full(npages, _MISSING, np.int64)
        for one in maps:
            pages, places = one.places()
            if len(pages) and pages[-1] >= npages:
                raise CorruptDataError(f"a map has page {pages[-1]} of a slot of {npages} pages")
            place[pages] = places
        pages = np.flatnonzero(place != _MISSING)
        return cls(pages, np.ones(len(pages), np.int64), place[pages]).joined()

    @classmethod
    def zeros(cls, npages: int) -> PageMap:
        """Return a map of so many zero pages."""
        return cls(np.array([0]), np.array([npages]), np.array([ZERO]))

    def joined(self) -> PageMap:
        """Return the map with runs that go on from one another made one."""
        if not len(self.first):
            return self
        ends = self.first + self.npages
        goes_on = np.where(self.place[:-1] == ZERO, ZERO, self.place[:-1] + self.npages[:-1]) == self.place[1:]
        begins = np.flatnonzero(np.concatenate(([True], ~((ends[:-1] == self.first[1:]) & goes_on))))
        last = np.concatenate((begins[1:], [len(self.first)])) - 1
        return PageMap(self.first[begins], ends[last] - self.first[begins], self.place[begins])

    def under(self, newer: PageMap) -> PageMap:
        """Return this map with another laid over it: where both have a page, the newer one's place counts."""
        # Sorted runs are merged quickly by a stable sort; np.unique makes a hash table of them.
        edges = np.concatenate((self.first, self.first + self.npages, newer.first, newer.first + newer.npages))
        edges.sort(kind="stable")
        edges = edges[np.diff(edges, prepend=-1) != 0]
        places = np.full(max(len(edges) - 1, 0), ZERO, np.int64)
        there = np.zeros(len(places), np.bool_)
        for one in (self, newer):
            if not len(one.first):
                continue
            run = np.searchsorted(one.first, edges[:-1], side="right") - 1
            inside = (run >= 0) & (edges[:-1] < one.first[run] + one.npages[run])
            found = one.place[run[inside]]
            places[inside] = np.where(found == ZERO, ZERO, found + edges[:-1][inside] - one.first[run[inside]])
            there |= inside
        return PageMap(edges[:-1][there], np.diff(edges)[there], places[there]).joined()

    def places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return every page and its place."""
        places = pages_of_runs(self.place, self.npages)
        return pages_of_runs(self.first, self.npages), np.where(np.repeat(self.place == ZERO, self.npages), ZERO, places)

    def count(self) -> int:
        """Return how many pages it has."""
        return int(self.npages.sum())

    def nonzero(self) -> int:
        """Return how many of them are not zero."""
        return int(self.npages[self.place != ZERO].sum())

    def covers(self, npages: int) -> bool:
        """Return whether it has every page of a slot of this length, and no other."""
        ends = self.first + self.npages
        return self.count() == npages and (not len(ends) or (self.first[0] == 0 and int(ends[-1]) == npages))


def pack(maps: dict[int, PageMap]) -> bytes:
    """Return maps of several slots as octets: deflated LEB128 numbers."""
    parts = [np.array([len(maps)], np.int64)]
    for key, one in maps.items():
        ends = one.first + one.npages
        gaps = one.first.copy()
        gaps[1:] -= ends[:-1]
        expected = np.zeros(len(one.first), np.int64)
        # Zero pages have no place, and what comes after them goes on from what came before.
        stored = np.flatnonzero(one.place != ZERO)
        expected[stored[1:]] = (one.place + one.npages)[stored[:-1]]
        off = one.place - expected
        how = np.where(off == 0, _GOES_ON, _OFF + np.where(off > 0, 2 * off, -2 * off - 1))
        how[one.place == ZERO] = _IS_ZERO
        parts += [np.array([key, len(gaps)], np.int64), gaps, one.npages - 1, how]
    return zlib.compress(varint.encode(np.concatenate(parts)), _LEVEL)


def unpack(data: bytes) -> dict[int, PageMap]:
    """Return what :func:`pack` packed, or raise :class:`CorruptDataError`."""
    try:
        numbers = varint.decode(zlib.decompress(data))
    except zlib.error as error:
        raise CorruptDataError("a map of pages does not inflate", reason=str(error)) from error
    maps: dict[int, PageMap] = {}
    at = 1
    for _ in range(int(numbers[0]) if len(numbers) else 0):
        if at + 2 > len(numbers):
            raise CorruptDataError("a map of pages ends early")
        key, count = numbers[at : at + 2].tolist()
        columns = numbers[at + 2 : at + 2 + 3 * count]
        if len(columns) != 3 * count:
            raise CorruptDataError("a map of pages ends early")
        at += 2 + 3 * count
        gaps, npages, how = columns[:count], columns[count : 2 * count] + 1, columns[2 * count :]
        first = np.cumsum(gaps + npages) - npages
        off = np.where(how & 1, -((how - _OFF + 1) >> 1), (how - _OFF) >> 1)
        off[how == _GOES_ON] = 0
        place = np.full(count, ZERO, np.int64)
        stored = np.flatnonzero(how != _IS_ZERO)
        # Each place is the one before, on by its length, and off by so much.
        steps = off[stored]
        steps[1:] += npages[stored[:-1]]
        place[stored] = np.cumsum(steps)
        maps[key] = PageMap(first, npages, place)
    if at != len(numbers):
        raise CorruptDataError("a map of pages is longer than it says")
    return maps

"""What the live view knows of a log: heat, rates, totals and history. It is told of rounds, and asked for what to show.

Its cost follows what is dirty: a slot that was never written has no heat and no set of pages.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.bitmap import DirtyBitmap
from dirtylog.top.heat import Heat, levels, stretches
from dirtylog.top.history import Curve, History, Mark
from dirtylog.words import word_count

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

    from dirtylog.memslot import MemorySlot
    from dirtylog.observe.rounds import Round

HALF_LIVES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_RATE_HALF_LIFE = 1.0
_SPARSE = 8


@dataclass(frozen=True, slots=True)
class Area:
    """What the map shows: a range of one slot."""

    slot: MemorySlot
    first: int
    npages: int


@dataclass(frozen=True, slots=True)
class SlotRow:
    """A slot in the table. Rates are smoothed over about a second, ``dirty`` is the share of its pages in the last round.

    ``distinct`` counts the pages that were written since the start, ``total`` those reported; ``quiet`` is how many seconds ago it
    was written, None if never.
    """

    slot: MemorySlot
    rate: float
    pages: float
    dirty: float
    distinct: int
    total: int
    quiet: float | None


@dataclass(frozen=True, slots=True)
class Map:
    """The map, stretch by stretch: its level, its slot, and the address of its first byte, all of length k.

    ``slots`` are those that ``owner`` counts, ``hidden`` is how many written slots had no room. ``npages`` is the length of the
    longest stretch.
    """

    level: NDArray[np.int64]
    owner: NDArray[np.int64]
    page: NDArray[np.int64]
    slots: tuple[MemorySlot, ...]
    npages: int = 0
    hidden: int = 0
    area: Area | None = None

    def address(self, stretch: int) -> int:
        """Return the address of a stretch's first byte."""
        slot = self.slots[int(self.owner[stretch])]
        return (slot.base_gfn + int(self.page[stretch])) * slot.page_size


@dataclass(frozen=True, slots=True)
class View:
    """All that is shown at one moment, ``seconds`` after the start; the rounds make up ``logged`` seconds.

    Rates are in bytes a second; ``get_share`` is the share of the time that gets took.
    """

    seconds: float
    logged: float
    rounds: int
    rate: float
    mean: float
    total: int
    distinct: int
    distinct_bytes: int
    get_share: float
    half_life: float
    map: Map
    rows: tuple[SlotRow, ...]
    curve: Curve
    marks: tuple[Mark, ...]


class _Tracked:
    """What is known of a slot."""

    def __init__(self) -> None:
        self.heat: Heat | None = None
        self.union: DirtyBitmap | None = None
        self.distinct = self.total = 0
        self.rate = self.pages = self.dirty = 0.0
        self.last: float | None = None

    def add(self, slot: MemorySlot, dirty: DirtyBitmap | None, seconds: float, now: float, half_life: float) -> None:
        count = dirty.count() if dirty else 0
        new = count / seconds
        weight = 1.0 if self.last is None else 1 - 2.0 ** (-seconds / _RATE_HALF_LIFE)
        self.pages += (new - self.pages) * weight
        self.rate, self.dirty, self.total = self.pages * slot.page_size, count / slot.npages, self.total + count
        if not dirty:
            return
        if self.heat is None or self.union is None:
            self.heat, self.union = Heat(0, slot.npages), DirtyBitmap(slot.npages)
        self.last = now
        self.heat.add(dirty, now, half_life)
        self.union |= dirty
        if len(self.union.nonzero_words().offsets) * _SPARSE >= word_count(slot.npages):
            # The first use lays all words out: from here on that costs less than to merge the non-zero ones.
            _ = self.union.words
        self.distinct = self.union.count()


class Model:
    """The state behind the view. ``add`` is called by the thread that logs, all else by the one that draws.

    Times are seconds of one clock, and ``began`` is when logging began.
    """

    def __init__(self, began: float, half_life: float = 2.0) -> None:
        self.half_life = half_life
        self._began = began
        self._lock = threading.Lock()
        self._slots: dict[MemorySlot, _Tracked] = {}
        self._history = History()
        self._zoomed: tuple[Area, Heat] | None = None
        self._rounds = self._total = self._bytes = self._distinct = self._distinct_bytes = 0
        self._seconds = self._get_seconds = self._rate = 0.0

    def add(self, found: Round, present: Collection[MemorySlot], now: float) -> None:
        """Take account of a round; slots that are not ``present`` have gone."""
        # Two rounds may come at once after a long get.
        seconds = max(found.seconds, 1e-6)
        with self._lock:
            there = set(present)
            self._slots = {slot: tracked for slot, tracked in self._slots.items() if slot in there}
            for slot in present:
                tracked, dirty = self._slots.setdefault(slot, _Tracked()), found.dirty.get(slot)
                before = tracked.distinct
                tracked.add(slot, dirty, seconds, now, self.half_life)
                self._distinct += tracked.distinct - before
                self._distinct_bytes += (tracked.distinct - before) * slot.page_size
                if dirty and self._zoomed is not None and self._zoomed[0].slot is slot:
                    self._zoomed[1].add(dirty, now, self.half_life)
            self._rounds, self._total, self._bytes = (
                self._rounds + 1,
                self._total + found.dirty_pages,
                self._bytes + found.dirty_bytes,
            )
            self._seconds, self._get_seconds = self._seconds + seconds, self._get_seconds + found.get_seconds
            self._rate = found.dirty_bytes / seconds
            self._history.add(found.dirty_bytes, seconds)

    def mark(self, now: float) -> Mark:
        """Mark this moment in the history."""
        with self._lock:
            return self._history.mark(now - self._began)

    def view(self, now: float, cells: int, columns: int, area: Area | None = None, *, whole: bool = False) -> View:
        """Return what to show now: a map of at most ``cells`` stretches, of all slots or of ``area``; a curve of ``columns``."""
        with self._lock:
            return View(
                seconds=now - self._began,
                logged=self._seconds,
                rounds=self._rounds,
                rate=self._rate,
                mean=self._bytes / self._seconds if self._seconds else 0.0,
                total=self._total,
                distinct=self._distinct,
                distinct_bytes=self._distinct_bytes,
                get_share=min(self._get_seconds / self._seconds, 1.0) if self._seconds else 0.0,
                half_life=self.half_life,
                map=self._map(now, cells) if area is None else self._map_of(area, now, cells),
                rows=tuple(_row(slot, tracked, now) for slot, tracked in self._slots.items()),
                curve=self._history.curve(columns, whole=whole),
                marks=tuple(self._history.marks),
            )

    def has(self, slot: MemorySlot) -> bool:
        """Return whether a slot is there still."""
        return slot in self._slots

    def _map(self, now: float, cells: int) -> Map:
        """Show every slot that was written, in order of address: each in one stretch at least, and the rest by length."""
        written = [(slot, tracked) for slot, tracked in self._slots.items() if tracked.heat is not None]
        chosen = sorted(written, key=lambda one: -(one[1].last or 0.0))[:cells]
        chosen.sort(key=lambda one: (one[0].address_space, one[0].base_gfn * one[0].page_size))
        counts = divided(
            [slot.nbytes for slot, _ in chosen], cells, [len(tracked.heat.sizes) for _, tracked in chosen if tracked.heat]
        )
        parts = [self._part(tracked.heat, now, count) for (_, tracked), count in zip(chosen, counts, strict=True) if tracked.heat]
        return _joined(tuple(slot for slot, _ in chosen), parts, len(written) - len(chosen), None)

    def _map_of(self, area: Area, now: float, cells: int) -> Map:
        return _joined((area.slot,), [self._part(self._heat_of(area), now, cells)], 0, area)

    def _heat_of(self, area: Area) -> Heat:
        """Return the heat of an area; the last one asked for is kept, and is told of rounds."""
        tracked = self._slots.get(area.slot)
        whole = tracked.heat if tracked is not None and tracked.heat is not None else Heat(0, area.slot.npages)
        if area.npages == area.slot.npages:
            self._zoomed = None
            return whole
        if self._zoomed is None or self._zoomed[0] != area:
            self._zoomed = area, whole.part(area.first, area.npages)
        return self._zoomed[1]

    def _part(self, heat: Heat, now: float, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Return levels and first pages of ``count`` stretches, and how many pages the longest has."""
        shown, first = stretches(heat.at(now, self.half_life), heat.sizes, min(count, heat.npages))
        pages = heat.first + first * heat.pages_per_cell
        ends = np.append(pages[1:], heat.first + heat.npages)
        lengths = np.maximum(ends - pages, 1)
        return levels(shown, np.minimum(lengths, heat.npages).astype(np.float64)), pages, int(lengths.max())


def divided(sizes: list[int], cells: int, limits: list[int]) -> list[int]:
    """Divide cells among slots: one to each, and the rest in proportion to their sizes, to none more than its limit.

    There are no more slots than cells.
    """
    whole, rest = sum(sizes), cells - len(sizes)
    return [min(limit, 1 + rest * size // whole) for size, limit in zip(sizes, limits, strict=True)]


def _joined(
    slots: tuple[MemorySlot, ...], parts: list[tuple[NDArray[np.int64], NDArray[np.int64], int]], hidden: int, area: Area | None
) -> Map:
    nothing = np.empty(0, np.int64)
    return Map(
        np.concatenate([nothing, *(level for level, _, _ in parts)]),
        np.repeat(np.arange(len(parts)), [len(level) for level, _, _ in parts]),
        np.concatenate([nothing, *(page for _, page, _ in parts)]),
        slots,
        max((longest for _, _, longest in parts), default=0),
        hidden,
        area,
    )


def _row(slot: MemorySlot, tracked: _Tracked, now: float) -> SlotRow:
    quiet = None if tracked.last is None else max(0.0, now - tracked.last)
    return SlotRow(slot, tracked.rate, tracked.pages, tracked.dirty, tracked.distinct, tracked.total, quiet)

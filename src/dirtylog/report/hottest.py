"""The stretches of memory that were written most often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dirtylog.report.axis import Axis


@dataclass(frozen=True, slots=True)
class Stretch:
    """Pages ``first`` to ``first + npages`` of the axis, about equally hot.

    ``writes`` counts each page once for every round that wrote it, so ``writes / npages`` is in how many rounds a page was written,
    on average. ``heat`` says in how many its hottest page was: 1 in every round, 0 in half of them or more, -1 in a quarter, ...
    """

    first: int
    npages: int
    writes: int
    heat: int


def hottest(axis: Axis, rounds: int, limit: int = 20) -> list[Stretch]:
    """Return the hottest stretches, and those that were written most in all: at most ``limit`` of each.

    A stretch goes on while its pages are at least half as hot as its heat says: one that is just a little cooler does not part it.
    """
    writes = axis.writes
    if not len(writes.first):
        return []
    borders = np.array([region.start for region in axis.regions])
    first, end = np.sort(writes.first), np.sort(writes.end)
    edges = np.sort(np.concatenate((first, end, borders)), kind="stable")
    edges = edges[np.concatenate(([True], edges[1:] != edges[:-1]))]
    begun, over = (np.searchsorted(places, edges[:-1], "right") for places in (first, end))
    times = begun - over
    written = np.flatnonzero(times)
    pieces = _Pieces(edges[:-1][written], edges[1:][written], times[written])
    heats = np.frexp(pieces.times / max(rounds, 1))[1]
    found: list[NDArray[np.int64]] = []
    while len(heats):
        stretches, taken = pieces.stretches(heats, int(heats.max()), borders)
        found.append(stretches)
        pieces, heats = pieces.without(taken), heats[~taken]
    rows = np.concatenate(found)
    hot = np.lexsort((-rows[:, 2], -rows[:, 3]))[:limit]
    most = np.argsort(-rows[:, 2], kind="stable")[:limit]
    return [Stretch(*rows[index].tolist()) for index in dict.fromkeys([*hot.tolist(), *most.tolist()])]


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Pages ``first`` to ``end``, ascending, that were written in just as many rounds: int64[k] each."""

    first: NDArray[np.int64]
    end: NDArray[np.int64]
    times: NDArray[np.int64]

    def without(self, taken: NDArray[np.bool_]) -> _Pieces:
        return _Pieces(self.first[~taken], self.end[~taken], self.times[~taken])

    def stretches(
        self, heats: NDArray[np.int32], heat: int, borders: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the stretches of one heat, rows of a :class:`Stretch`, and which pieces they have."""
        near = np.flatnonzero(heats >= heat - 1)
        first, end, times = self.first[near], self.end[near], self.times[near]
        begins = np.flatnonzero(np.concatenate(([True], (first[1:] != end[:-1]) | np.isin(first[1:], borders))))
        hot = np.maximum.reduceat(heats[near], begins) >= heat
        lasts = np.concatenate((begins[1:], [len(near)])) - 1
        total = np.add.reduceat(times * (end - first), begins)
        rows = np.stack((first[begins], end[lasts] - first[begins], total, np.full(len(begins), heat)), axis=1)[hot]
        taken = np.zeros(len(heats), np.bool_)
        taken[near[np.repeat(hot, lasts - begins + 1)]] = True
        return rows, taken

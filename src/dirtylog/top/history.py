"""The history of the rate, and the marks that the user put into it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROUNDS = 8192
"""So many of the last rounds are remembered."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment that the user marked: in the round after ``round``, ``seconds`` after the start, at ``clock`` (local time)."""

    number: int
    round: int
    seconds: float
    clock: str


@dataclass(frozen=True, slots=True)
class Curve:
    """The rate in columns: ``rates`` float64[k] in bytes a second, over ``seconds``; ``marks`` are (column, mark)."""

    rates: NDArray[np.float64]
    seconds: float
    marks: tuple[tuple[int, Mark], ...]


class History:
    """The rate of the last rounds."""

    def __init__(self) -> None:
        self._rounds: deque[tuple[float, float]] = deque(maxlen=ROUNDS)
        self._count = 0
        self.marks: list[Mark] = []

    def add(self, nbytes: float, seconds: float) -> None:
        """Remember a round."""
        self._rounds.append((nbytes, seconds))
        self._count += 1

    def mark(self, seconds: float) -> Mark:
        """Mark this moment, so long after the start."""
        mark = Mark(len(self.marks) + 1, self._count, seconds, time.strftime("%H:%M:%S"))
        self.marks.append(mark)
        return mark

    def curve(self, columns: int, *, whole: bool) -> Curve:
        """Return the last rounds, one a column; or, ``whole``, all that are remembered, in no more columns."""
        rounds = np.array(self._rounds, np.float64).reshape(-1, 2)
        if not whole:
            rounds = rounds[-columns:]
        first = np.linspace(0, len(rounds), min(columns, len(rounds)), endpoint=False).astype(np.int64)
        if not len(first):
            return Curve(np.empty(0), 0.0, ())
        sums = np.add.reduceat(rounds, first, axis=0)
        before = self._count - len(rounds)
        # A mark of this very moment belongs to the round that is not there yet: it is shown at the last one until then.
        at = [(min(mark.round - before, len(rounds) - 1), mark) for mark in self.marks if mark.round >= before]
        marks = tuple((int(np.searchsorted(first, place, "right")) - 1, mark) for place, mark in at)
        return Curve(sums[:, 0] / np.maximum(sums[:, 1], 1e-9), float(rounds[:, 1].sum()), marks)

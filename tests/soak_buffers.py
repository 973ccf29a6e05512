"""Buffers of every kind at once, and logs of parts of them: what one log takes it must give to the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from scribblers import KINDS, Scribbling

if TYPE_CHECKING:
    from random import Random

    from soak_tally import Tally


class _Counting(Scribbling):
    """Counts what is lost in a tally before it fails."""

    def __init__(self, kinds: list[str], seed: int, tally: Tally) -> None:
        super().__init__(kinds, seed)
        self._tally = tally

    def _compare(self) -> None:
        self.stops += 1
        self._follow()
        for copy in self.copies:
            lost = copy.lost()
            self._tally.lost += len(lost)
            self._tally.lost_pages += [f"page {page} of {copy.name}" for page in lost[:20]]
        assert not self._tally.lost, "pages are lost"


def soak_kinds(rng: Random, tally: Tally, seconds: float) -> None:
    """Soak some of the kinds; what is discarded and what is stored is not counted."""
    kinds = rng.sample(list(KINDS), rng.randint(2, len(KINDS)))
    scribbling = _Counting(kinds, rng.randrange(1, 1 << 30), tally)
    tally.port = "uffd"
    try:
        scribbling.run(seconds, between_stops=rng.uniform(0.1, 0.6))
    except pytest.skip.Exception:
        scribbling = _Counting([kind for kind in kinds if kind != "hugetlb"], rng.randrange(1, 1 << 30), tally)
        scribbling.run(seconds)
    finally:
        tally.rounds += scribbling.rounds
        tally.stops += scribbling.stops
        tally.reports += scribbling.reports
        tally.compared += sum(copy.compared for copy in scribbling.copies)

"""The kernel's transact_test: threads store while pages are taken, and no store gets lost. That one is reported twice is legal."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest

import dirtylog
from address_space import HUGE, PAGE, Area
from compiled import Crew
from memory_kinds import MADV_HUGEPAGE
from uffd_here import needs_uffd, watched

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dirtylog import DirtyLog

NTHREADS = 6


@contextmanager
def crew_in(area: Area) -> Iterator[Crew]:
    crew = Crew(area, NTHREADS)
    try:
        yield crew
    finally:
        crew.stop()


def counters(contents: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return contents.reshape(-1, PAGE)[:, :8].copy().view(np.uint64)[:, 0]


class Copy:
    """What somebody has who copies only what is reported: it must become what the memory is."""

    def __init__(self, log: DirtyLog, area: Area) -> None:
        self._log = log
        self._area = area
        self.counters = counters(area.octets)
        self.seen = np.zeros(area.npages, np.int64)

    def follow(self) -> None:
        pages = self._log.get(0).pages()
        self.seen[pages] += 1
        self.counters[pages] = counters(self._log.memory.read(0, pages))


def transact(log: DirtyLog, area: Area, rounds: int) -> Copy:
    copy = Copy(log, area)
    with crew_in(area) as crew:
        for number in range(1, rounds + 1):
            with crew.round():
                for _ in range(number % 4):
                    copy.follow()
            copy.follow()
            now = counters(area.octets)
            assert now.min() == now.max() == number, "each thread stored once to each of its pages"
            lost = np.flatnonzero(copy.counters != now)
            assert not len(lost), f"round {number}: the stores to pages {lost.tolist()[:9]} were not reported"
    return copy


@needs_uffd
@pytest.mark.parametrize(("npages", "rounds"), [(6, 2000), (6 * 64, 1000)])
def test_no_store_of_six_threads_gets_lost(npages: int, rounds: int) -> None:
    with Area.map(npages) as area, watched(area) as log:
        copy = transact(log, area, rounds)
    assert copy.seen.min() >= rounds


@needs_uffd
def test_none_gets_lost_in_huge_pages_that_are_being_split() -> None:
    npages = NTHREADS * HUGE // PAGE
    with Area.map(npages, align=HUGE) as area:
        area.advise(MADV_HUGEPAGE)
        with watched(area) as log:
            transact(log, area, 30)


@needs_uffd
def test_none_gets_lost_among_logs_of_the_same_memory() -> None:
    """Each get takes the marks of both, and gives the other log its share."""
    with Area.map(6 * 32) as area, watched(area) as log, watched(area) as other:
        copies = [Copy(log, area), Copy(other, area)]
        with crew_in(area) as crew:
            for number in range(1, 501):
                with crew.round():
                    copies[number % 2].follow()
                for copy in copies:
                    copy.follow()
                    assert (copy.counters == number).all()


def test_none_gets_lost_to_the_port_that_compares() -> None:
    """A sync that compared with the memory, rather than with what it copies, would lose what comes in between."""
    with Area.map(6 * 32) as area, dirtylog.track(area.octets, port="compare") as log:
        transact(log, area, 300)

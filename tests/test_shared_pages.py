"""Several logs of the same pages: a page has one mark, and none of them takes it from the others."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

import dirtylog
from address_space import DONTNEED, PAGE, Area
from dirtylog.buffers.locate import locate
from dirtylog.linux.buffer_port import BufferPort
from memory_kinds import memory_of
from uffd_here import needs_uffd, port_of_its_own, watched, written

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dirtylog import DirtyLog

pytestmark = needs_uffd


@pytest.fixture(autouse=True)
def _own_port() -> Iterator[None]:
    with port_of_its_own():
        yield


@pytest.fixture
def area() -> Iterator[Area]:
    with Area.map(64) as mapped:
        yield mapped


def part(area: Area, first: int, npages: int) -> DirtyLog:
    """Return a log of the middle of some pages."""
    start = first * area.page_size + 100
    return dirtylog.track(area.octets[start : start + npages * area.page_size - 200], port="uffd")


def two_on_one_page() -> tuple[bytearray, bytearray]:
    """Return two small bytearrays from the heap that lie on one page."""
    seen: dict[int, bytearray] = {}
    for _ in range(10_000):
        buffer = bytearray(64)
        _, address, nbytes = locate(buffer)
        page = address // PAGE
        if page == (address + nbytes - 1) // PAGE:
            if page in seen:
                return seen[page], buffer
            seen[page] = buffer
    pytest.fail("no two bytearrays came to lie on one page")


def test_two_bytearrays_on_one_page_are_both_told_of_a_write_to_it() -> None:
    first, second = two_on_one_page()
    with dirtylog.track(first, port="uffd") as log, dirtylog.track(second, port="uffd") as other:
        for taker, waiting in ((log, other), (other, log)):
            first[0] += 1
            assert written(taker) == {0}
            assert written(waiting) == {0}, "the other's get took the mark, and left it here"
        log.close()
        second[0] += 1
        assert written(other) == {0}, "the page is watched on, though one log of it has ended"


def both_told(area: Area) -> bool:
    with part(area, 0, 2) as log, part(area, 1, 2) as other:
        area.store(1)
        return (written(log), written(other)) == ({1}, {0})


def test_without_its_neighbours_a_log_would_take_their_pages(area: Area, monkeypatch: pytest.MonkeyPatch) -> None:
    assert both_told(area)
    monkeypatch.setattr(BufferPort, "_neighbours", lambda _self, _watch: [])
    with port_of_its_own():
        assert not both_told(area)


@pytest.mark.parametrize("spans", list(itertools.permutations([(0, 40), (10, 10), (15, 30), (39, 1)], 3)))
def test_any_order_of_starts_and_stops_leaves_every_log_exact(area: Area, spans: tuple[tuple[int, int], ...]) -> None:
    for ending in itertools.permutations(range(len(spans))):
        logs = {}
        for number, (first, npages) in enumerate(spans):
            area.store(*range(50))
            logs[number] = part(area, first, npages)
        for number in ending:
            area.store(*range(0, 50, 3))
            for other, log in logs.items():
                first, npages = spans[other]
                touched = {page - first for page in range(0, 50, 3) if first <= page < first + npages}
                # Pages from before a later log's start: that start took their marks, and they are still to be reported here.
                assert written(log) >= touched
            area.store(*range(1, 50, 7))
            for other, log in logs.items():
                first, npages = spans[other]
                assert written(log) == {page - first for page in range(1, 50, 7) if first <= page < first + npages}
            logs.pop(number).close()
    assert written_after_all(area) == {2}


def written_after_all(area: Area) -> set[int]:
    """Return what a fresh log of the area sees of one store: the logs before it have left nothing behind."""
    assert BufferPort.of_this_process()._watched == {}
    with watched(area) as log:
        area.store(2)
        return written(log)


def test_what_was_written_before_a_log_began_is_not_its_own_but_its_neighbours(area: Area) -> None:
    with watched(area) as log:
        area.store(3)
        with watched(area) as other:
            assert written(other) == set()
            assert written(log) == {3}, "the start of the other log armed the page, and left the mark here"


def test_the_same_array_may_be_logged_twice(area: Area) -> None:
    with watched(area) as log, watched(area) as other:
        area.store(3)
        area.advise(DONTNEED, 5, 1)
        area.map_again(8, 2)
        assert written(log) >= {3, 5, 8, 9}
        assert written(other) >= {3, 5, 8, 9}
        area.store(8)
        assert written(other) == {8}
        assert written(log) == {8}


def test_parts_of_one_huge_page_are_logged_apart() -> None:
    with memory_of("hugetlb-private") as area:
        area.octets[:] = 1
        size = area.page_size
        first, second = area.octets[: size // 2], area.octets[size // 2 : 2 * size]
        with dirtylog.track(first, port="uffd") as log, dirtylog.track(second, port="uffd") as other:
            first[0] = 2
            assert written(log) == {0}
            assert written(other) == {0}, "it is one page"
            log.close()
            second[-1] = 2
            assert written(other) == {1}


def test_logs_that_come_and_go_in_other_threads_take_nothing(area: Area) -> None:
    over = threading.Event()
    errors: list[BaseException] = []

    def come_and_go(first: int) -> None:
        try:
            while not over.is_set():
                with part(area, first, 8) as log:
                    log.get(0)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test shall say so
            errors.append(error)

    threads = [threading.Thread(target=come_and_go, args=(first,)) for first in (0, 4, 30)]
    random = np.random.default_rng(3)
    with watched(area) as log:
        for thread in threads:
            thread.start()
        try:
            for _ in range(300):
                pages = set(random.integers(area.npages, size=9).tolist())
                area.store(*pages)
                assert written(log) >= pages
        finally:
            over.set()
            for thread in threads:
                thread.join()
    assert errors == []

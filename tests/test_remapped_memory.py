"""Memory that changes its place, its permissions or its mapping while it is logged: what comes to it counts as written."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

import dirtylog
from address_space import (
    ANONYMOUS,
    NONE,
    PAGE,
    PRIVATE,
    READ,
    SHARED,
    WRITE,
    Area,
    disk_file,
    file_to_read,
    memory_file,
)
from dirtylog.linux import abi
from dirtylog.linux.userfaultfd import Userfaultfd
from memory_kinds import memory_of
from uffd_here import needs_uffd, watched, written

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = needs_uffd

NPAGES = 64


@pytest.fixture
def area() -> Iterator[Area]:
    """Private memory with something in it."""
    with Area.map(NPAGES) as mapped:
        mapped.octets[:] = 1
        yield mapped


# --- permissions


@pytest.mark.parametrize("protection", [NONE, READ])
def test_permissions_change_nothing_about_what_was_written(area: Area, protection: int) -> None:
    with watched(area) as log:
        area.store(3, 40)
        area.protect(protection, 0, 32)
        assert written(log) == {3, 40}
        area.protect(READ | WRITE, 0, 32)
        assert written(log) == set()
        area.store(5)
        assert written(log) == {5}


def test_parts_of_each_permission_are_logged_each(area: Area) -> None:
    with watched(area) as log:
        area.protect(NONE, 8, 8)
        area.protect(READ, 24, 8)
        area.store(7, 16, 32)
        assert written(log) == {7, 16, 32}
        area.protect(READ | WRITE)
        area.store(8, 31)
        assert written(log) == {8, 31}


def test_memory_that_becomes_writable_later_is_armed() -> None:
    with (
        disk_file(b"x" * NPAGES * PAGE) as fd,
        Area.map(NPAGES, PRIVATE, fd=fd, protection=READ) as area,
        watched(area) as log,
    ):
        area.octets.sum()
        assert written(log) == set()
        area.protect(READ | WRITE)
        area.store(9)
        assert written(log) == {9}


# --- other memory in the same place


def test_memory_mapped_over_it_is_reported_as_a_whole(area: Area) -> None:
    with watched(area) as log:
        area.map_again(10, 5)
        area.store(30)
        assert written(log) >= {*range(10, 15), 30}
        area.store(12)
        assert written(log) == {12}, "and is watched like the rest from then on"


OVER: dict[str, Callable[[Area], None]] = {
    "shared": lambda area: area.map_again(10, 5, SHARED | ANONYMOUS),
    "read-only": lambda area: area.map_again(10, 5, protection=READ),
}


@pytest.mark.parametrize("over", OVER.values(), ids=OVER.keys())
def test_another_kind_of_memory_mapped_over_it_is_reported(area: Area, over: Callable[[Area], None]) -> None:
    with watched(area) as log:
        over(area)
        assert written(log) >= set(range(10, 15))
        assert written(log) == set()


@pytest.mark.parametrize("flags", [SHARED, PRIVATE])
def test_a_file_mapped_over_it_is_reported(area: Area, flags: int) -> None:
    with memory_file(5 * PAGE, contents=b"y" * 5 * PAGE) as fd, watched(area) as log:
        area.map_again(10, 5, flags, fd=fd)
        assert written(log) >= set(range(10, 15))
        area.store(11)
        assert written(log) == {11}


def test_a_file_that_may_not_be_written_mapped_over_it_is_reported_always(area: Area) -> None:
    """It cannot be watched, so every get reports everything; when it goes, the log is exact again."""
    with file_to_read(b"z" * PAGE) as fd, watched(area) as log:
        area.map_again(10, 1, SHARED, fd=fd, protection=READ)
        area.store(3)
        assert written(log) == set(range(NPAGES))
        assert written(log) == set(range(NPAGES))
        area.map_again(10, 1)
        assert written(log) >= {10}
        area.store(10)
        assert written(log) == {10}


def test_a_hole_is_passed_over_and_what_fills_it_is_reported(area: Area) -> None:
    with watched(area) as log:
        area.unmap(20, 10)
        area.store(3, 40)
        assert written(log) == {3, 40}
        area.map_again(20, 10)
        area.store(4)
        assert written(log) >= {4, *range(20, 30)}
        area.store(25, 41)
        assert written(log) == {25, 41}


def test_memory_that_another_userfaultfd_handles_is_reported_always(area: Area) -> None:
    """One that waits for pages that are missing, as of a lazy restore: the kernel lets nobody else watch that memory."""
    missing = 1
    with watched(area) as log, Userfaultfd.create() as other:
        area.map_again(20, 10)
        area.store(*range(20, 30))
        start, nbytes = area.span(20, 10)
        other.ioctl(abi.UFFDIO_REGISTER, abi.UffdioRegister(start=start, len=nbytes, mode=missing), "cannot handle it")
        assert written(log) == set(range(NPAGES))
        area.store(25)
        assert written(log) == set(range(NPAGES)), "nobody could tell"
        other.unregister(start, nbytes)
        assert written(log) >= set(range(20, 30))
        area.store(27)
        assert written(log) == {27}


def test_memory_that_another_asynchronous_userfaultfd_watches_is_reported(area: Area) -> None:
    with watched(area) as log, Userfaultfd.create() as other:
        area.map_again(20, 10)
        other.register(*area.span(20, 10))
        area.store(3)
        assert written(log) >= {3, *range(20, 30)}
        area.store(25)
        assert written(log) >= {25}


def test_memory_is_left_to_another_userfaultfd_that_watches_it(area: Area) -> None:
    with Userfaultfd.create() as other:
        other.register(*area.span(5, 1))
        with pytest.raises(dirtylog.DirtyLogError, match="another userfaultfd"):
            watched(area)
        with dirtylog.track(area.octets) as log:
            assert log.memory.port.name == "compare", "auto takes the next"
    with watched(area) as log:
        area.store(5)
        assert written(log) == {5}


@pytest.mark.parametrize("sparse", [True, False])
def test_memory_that_is_mapped_anew_all_the_time_loses_nothing(area: Area, sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A get may find new memory even after it has just registered what it found."""
    monkeypatch.setattr("dirtylog.linux.uffd_port.sees_discarded_tables", lambda: not sparse)
    over = threading.Event()

    def map_anew() -> None:
        while not over.is_set():
            for first in (5, 20, 40):
                area.map_again(first, 8)
                area.store(first, first + 7)

    mapper = threading.Thread(target=map_anew)
    with watched(area) as log:
        copy = area.octets.copy()

        def follow() -> None:
            for page in written(log):
                copy[page * PAGE : (page + 1) * PAGE] = area.octets[page * PAGE : (page + 1) * PAGE]

        mapper.start()
        try:
            for _ in range(200):
                area.store(3, 30, 60)
                follow()
        finally:
            over.set()
            mapper.join()
        follow()
        assert (copy == area.octets).all()


# --- files


def test_writing_a_file_mapping_out_does_not_disarm_it() -> None:
    """After msync the pages are clean and write-protected for the file system's own purposes."""
    with memory_of("file-shared") as area, watched(area) as log:
        area.store(3)
        area.sync()
        assert written(log) == {3}
        area.sync()
        assert written(log) == set()
        area.store(3, 4)
        assert written(log) == {3, 4}
        area.store(3)
        area.sync()
        area.store(4)
        assert written(log) == {3, 4}

"""Huge and mostly empty memory: watched without an entry for each page that is not there, and still nothing gets lost."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest

import dirtylog
from address_space import (
    ANONYMOUS,
    DONTNEED,
    DONTUNMAP,
    HUGE,
    MAYMOVE,
    NORESERVE,
    PAGE,
    POPULATE_READ,
    PRIVATE,
    REMAP_FIXED,
    SHARED,
    Area,
    memory_file,
    remap,
    status_kib,
)
from dirtylog.linux import abi
from dirtylog.linux.uffd_port import UffdPort
from dirtylog.linux.userfaultfd import Userfaultfd
from memory_kinds import MADV_HUGEPAGE
from uffd_here import needs_uffd, watched, written

if TYPE_CHECKING:
    from collections.abc import Iterator

    Patch = pytest.MonkeyPatch

pytestmark = needs_uffd

GIB = 1 << 30
PER_HUGE = HUGE // PAGE
PTES_OF_4_GIB = 8192
"""KiB of page tables that 4 GiB take when there is an entry for every page."""


@contextmanager
def reserved(nbytes: int) -> Iterator[Area]:
    """Give memory that is reserved and, but for a few pages, not there."""
    with Area.map(nbytes // PAGE, PRIVATE | ANONYMOUS | NORESERVE) as area:
        area.advise(15)  # no huge pages: a store is to bring one page
        area.store(0, 1000, area.npages - 1)
        yield area


@pytest.fixture
def always_sparse(monkeypatch: Patch) -> None:
    """As on a kernel that does not see what is discarded together with its page table."""
    monkeypatch.setattr("dirtylog.linux.uffd_port.sees_discarded_tables", lambda: False)


@pytest.fixture
def area_handled_by_another() -> Iterator[tuple[Area, Userfaultfd]]:
    with Area.map(64) as area, Userfaultfd.create() as other:
        yield area, other


# --- the size of it


@pytest.mark.parametrize("nbytes", [4 * GIB, 64 * GIB])
def test_what_is_not_there_is_neither_reported_nor_given_an_entry(nbytes: int) -> None:
    with reserved(nbytes) as area:
        before = status_kib("VmPTE")
        with watched(area) as log:
            assert written(log) == set()
            area.store(1, 1000, area.npages // 2, area.npages - 1)
            assert written(log) == {1, 1000, area.npages // 2, area.npages - 1}
            assert written(log) == set()
            area.advise(DONTNEED, 500, 1000)
            assert written(log) == {1000}, "it was there, and reads as zeros now"
            assert written(log) == set()
            area.advise(DONTNEED)
            assert written(log) == {0, 1, 1000, area.npages // 2, area.npages - 1}, "page 1000 may have come and gone again"
            area.store(1000)
            assert written(log) == {1000}
            assert status_kib("VmPTE") - before < 256


def test_without_the_sparse_mode_the_page_tables_would_grow(monkeypatch: Patch) -> None:
    monkeypatch.setattr(UffdPort, "_is_sparse", lambda *_: False)
    with reserved(4 * GIB) as area:
        before = status_kib("VmPTE")
        with watched(area) as log:
            assert written(log) == set()
            assert status_kib("VmPTE") - before > PTES_OF_4_GIB // 2


def test_memory_that_is_there_to_an_eighth_is_armed_throughout() -> None:
    with Area.map(1 << 17) as area:
        area.octets[: (area.npages // 8) * PAGE : PAGE] = 1
        with watched(area) as log:
            area.store(7, area.npages - 1)
            area.advise(DONTNEED, 100, 10)
            assert written(log) == {7, *range(100, 110), area.npages - 1}


def test_a_consumer_of_sparse_memory_gets_only_what_was_written() -> None:
    with reserved(4 * GIB) as area, watched(area) as log:
        consumer = log.consumer("copy")
        area.store(77)
        with consumer.epoch() as epoch:
            assert set(epoch.dirty[0].pages().tolist()) == {77}


# --- what is discarded, and what comes


@pytest.mark.usefixtures("always_sparse")
def test_discarded_pages_are_reported_once() -> None:
    with Area.map(200) as area:
        area.octets[: 150 * PAGE] = 1
        with watched(area) as log:
            area.advise(DONTNEED, 100, 80)
            assert written(log) == set(range(100, 150))
            assert written(log) == set()
            area.octets.sum()
            assert {*range(100, 200)} >= written(log), "reading brings zero pages, which may be taken for written"
            area.store(3, 120, 190)
            assert written(log) == {3, 120, 190}
            area.advise(DONTNEED, 120, 1)
            area.store(120)
            area.advise(DONTNEED, 190, 1)
            assert written(log) == {120, 190}


@pytest.mark.usefixtures("always_sparse")
def test_a_discarded_huge_page_is_reported() -> None:
    with Area.map(2 * PER_HUGE, align=HUGE) as area:
        area.advise(MADV_HUGEPAGE)
        area.octets[:] = 1
        with watched(area) as log:
            area.advise(DONTNEED, 0, PER_HUGE)
            assert written(log) == set(range(PER_HUGE))
            area.octets[:PAGE] = 2
            assert 0 in written(log)
            area.advise(DONTNEED)
            assert written(log) >= {0, *range(PER_HUGE, 2 * PER_HUGE)}


@pytest.mark.usefixtures("always_sparse")
def test_a_page_that_came_and_went_between_two_gets_leaves_what_was_there() -> None:
    with Area.map(64) as area, watched(area) as log:
        area.store(5)
        area.advise(DONTNEED, 5, 1)
        written(log)
        area.store(5)
        assert written(log) == {5}
        area.advise(DONTNEED, 5, 1)
        assert written(log) == {5}
        area.advise(POPULATE_READ, 5, 1)
        written(log)
        assert written(log) == set()


@pytest.mark.usefixtures("always_sparse")
def test_a_get_that_finds_no_more_watch_finds_what_was_discarded_with_it() -> None:
    with Area.map(64) as area:
        area.octets[:] = 1
        with watched(area) as log:
            area.map_again(8, 8)
            area.advise(DONTNEED, 40, 2)
            area.store(3)
            assert written(log) >= {3, *range(8, 16), 40, 41}
            area.store(8)
            assert written(log) == {8}


# --- other memory in the place of what was never there


@pytest.mark.parametrize("flags", [SHARED, PRIVATE])
def test_a_file_mapped_over_what_was_never_there_is_reported(flags: int) -> None:
    """A page of a file that is not there does not read as zeros."""
    with reserved(GIB) as area, memory_file(4 * PAGE, contents=b"y" * 4 * PAGE) as fd, watched(area) as log:
        area.map_again(5000, 4, flags, fd=fd)
        assert written(log) >= {5000, 5001, 5002, 5003}
        assert area[5000] == ord("y")
        area.store(5001)
        assert 5001 in written(log)


def test_memory_moved_over_what_was_never_there_is_reported() -> None:
    with reserved(GIB) as area, Area.map(8) as source:
        source.octets[:] = 2
        with watched(area) as log:
            remap(source.span(), 8 * PAGE, MAYMOVE | REMAP_FIXED, area.span(5000, 8)[0])
            source.set_mapped(False)
            assert written(log) >= set(range(5000, 5008))
            area.store(5003)
            assert written(log) == {5003}
            area.map_again(5000, 8)
            assert written(log) >= set(range(5000, 5008)), "what was there has gone"


def test_pages_that_a_move_takes_away_are_reported() -> None:
    with reserved(GIB) as area, watched(area) as log:
        area.store(5003)
        assert written(log) == {5003}
        with Area(remap(area.span(5000, 8), 8 * PAGE, MAYMOVE | DONTUNMAP), 8):
            assert written(log) == {5003}


@pytest.mark.usefixtures("always_sparse")
def test_pages_that_came_while_nobody_could_tell_are_missed_when_they_go(area_handled_by_another: tuple[Area, Userfaultfd]) -> None:
    """While another userfaultfd handles part of it every get reports everything, so whatever is there then has been reported."""
    area, other = area_handled_by_another
    with watched(area) as log:
        area.map_again(20, 10)
        area.store(*range(20, 30))
        start, nbytes = area.span(20, 10)
        other.ioctl(abi.UFFDIO_REGISTER, abi.UffdioRegister(start=start, len=nbytes, mode=1), "cannot handle it")
        assert written(log) == set(range(area.npages))
        other.unregister(start, nbytes)
        area.advise(DONTNEED, 20, 10)
        assert written(log) >= set(range(20, 30)), "they read as zeros now"


# --- two logs of the same pages, of which one is sparse


@pytest.mark.parametrize("small_first", [True, False])
def test_a_small_log_and_a_sparse_one_of_the_same_pages_lose_nothing_to_each_other(small_first: bool) -> None:
    with reserved(GIB) as area, watched(area) as log, dirtylog.track(area.octets[999 * PAGE : 1064 * PAGE], port="uffd") as small:

        def both() -> tuple[set[int], set[int]]:
            if small_first:
                part = written(small)
                return written(log), part
            return written(log), written(small)

        area.store(1000, 1010, 70_000)
        everything, part = both()
        assert everything >= {1000, 1010, 70_000}
        assert part >= {1, 11}
        area.advise(DONTNEED, 1005, 10)
        everything, part = both()
        assert 1010 in everything
        assert 11 in part
        small.close()
        area.store(1001, 1010)
        assert written(log) >= {1001, 1010}
        assert written(log) == set()
        area.advise(DONTNEED, 1010, 1)
        assert written(log) == {1010}


@pytest.mark.usefixtures("always_sparse")
def test_a_log_that_begins_where_another_has_armed_knows_what_is_there() -> None:
    """What the first log has armed is not written, and yet it is there, and can be discarded."""
    with Area.map(64) as area:
        area.octets[: 32 * PAGE] = 1
        with watched(area) as first, watched(area) as second:
            area.advise(DONTNEED, 8, 8)
            assert written(second) >= set(range(8, 16))
            assert written(first) >= set(range(8, 16))


def test_a_discarded_page_is_one_page_to_the_other_log_too() -> None:
    """What the one finds gone the other is told of, and not of every hole there is."""
    with reserved(4 * GIB) as area, watched(area) as log, watched(area) as other:
        area.advise(DONTNEED, 1000, 1)
        assert written(log) == {1000}
        assert log.get(0).count() == 0
        assert other.get(0).count() < 1000


# --- a random life


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_a_copy_of_what_is_reported_is_the_memory(sparse: bool, seed: int, monkeypatch: Patch) -> None:
    """Stores, discards, reads, moves and new mappings at random; a second log of a part of it takes marks as well."""
    random = np.random.default_rng(seed)
    monkeypatch.setattr("dirtylog.linux.uffd_port.sees_discarded_tables", lambda: not sparse)
    with Area.map(2 * PER_HUGE, align=HUGE) as area:
        area.advise(MADV_HUGEPAGE)
        if seed % 3:
            area.octets[: seed * PER_HUGE * PAGE // 12] = 9
        part = area.octets[100 * PAGE : 300 * PAGE]
        with watched(area) as log, dirtylog.track(part, port="uffd") as other:
            copies = [(log, area.octets, area.octets.copy()), (other, part, part.copy())]
            for _ in range(150):
                _something(area, random)
                if random.random() < 0.4:
                    taker, octets, copy = copies[random.integers(2)]
                    dirty = taker.get(0).pages()
                    copy.reshape(-1, PAGE)[dirty] = octets.reshape(-1, PAGE)[dirty]
                    lost = np.flatnonzero((copy != octets).reshape(-1, PAGE).any(axis=1))
                    assert not len(lost), f"lost: {lost.tolist()[:9]}"


def _something(area: Area, random: np.random.Generator) -> None:
    first = int(random.integers(area.npages - 1))
    npages = int(min(area.npages - first, random.choice([1, 2, 64, 700])))
    match random.integers(8):
        case 0 | 1:
            area.octets[first * PAGE : (first + npages) * PAGE : int(random.choice([1, PAGE, 3 * PAGE]))] = random.integers(256)
        case 2 | 3:
            area.store(*random.integers(area.npages, size=5).tolist())
        case 4:
            area.advise(DONTNEED, first, npages)
        case 5:
            area.octets[first * PAGE : (first + npages) * PAGE].sum()
        case 6:
            area.map_again(first, npages)
        case _:
            with suppress(OSError), Area(remap(area.span(first, npages), npages * PAGE, MAYMOVE | DONTUNMAP), npages):
                pass  # refused where it is several mappings by now

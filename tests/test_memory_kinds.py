"""What is written is reported, and exactly that, on every kind of memory: the base and huge page tests of the kernel's selftest."""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np
import pytest

from address_space import (
    DONTNEED,
    HUGE,
    NOHUGEPAGE,
    PAGE,
    PAGEOUT,
    POPULATE_READ,
    READ,
    SHARED,
    Area,
    huge_pages,
    memory_file,
    status_kib,
)
from dirtylog.linux.pagemap import Pagemap, Scanner
from memory_kinds import MADV_HUGEPAGE, every_kind, memory_of
from uffd_here import needs_uffd, watched, written

pytestmark = needs_uffd

PER_HUGE = HUGE // PAGE
MADV_COLLAPSE = 25


# --- the base tests


@every_kind
def test_what_was_written_before_does_not_count(kind: str) -> None:
    with memory_of(kind) as area:
        area.octets[:] = 1
        with watched(area) as log:
            assert written(log) == set()


@every_kind
def test_memory_that_was_never_touched_is_clean(kind: str) -> None:
    with memory_of(kind) as area, watched(area) as log:
        assert written(log) == set()
        assert not area.octets[:0].any()
        area.store(0, area.npages - 1)
        assert written(log) == {0, area.npages - 1}


@every_kind
@pytest.mark.parametrize("touched", [True, False])
def test_reading_is_not_writing(kind: str, touched: bool) -> None:
    with memory_of(kind) as area:
        if touched:
            area.octets[:] = 1
        with watched(area) as log:
            area.octets.sum()
            first = written(log)
            # The kernel cannot arm pages of hugetlbfs that are not there: the first reading of them is a false positive.
            assert first == set() or (kind.startswith("hugetlb") and not touched)
            area.octets.sum()
            assert written(log) == set()
            area.store(1)
            assert written(log) == {1}, "and what has been read is armed as well"


@every_kind
def test_writing_all_of_it_reports_all_of_it_once(kind: str) -> None:
    with memory_of(kind) as area, watched(area) as log:
        for value in (1, 2):
            area.octets[:] = value
            assert written(log) == set(range(area.npages))
            assert written(log) == set()


@every_kind
def test_parts_are_reported_to_the_page(kind: str) -> None:
    with memory_of(kind) as area:
        area.octets[:] = 1
        with watched(area) as log:
            last = area.npages - 1
            middle = area.npages // 2
            for pages in (
                set(range(1, last)),
                {middle},
                {middle - 1, middle},
                {0, 1, last - 1, last},
                {0},
                {last},
                set(range(0, last, 2)),
            ):
                area.store(*pages)
                assert written(log) == pages


@every_kind
def test_the_last_byte_of_a_page_is_that_pages(kind: str) -> None:
    with memory_of(kind) as area, watched(area) as log:
        area.octets[2 * area.page_size - 1] = 1
        assert written(log) == {1}
        area.octets[2 * area.page_size - 1 : 2 * area.page_size + 1] = 2
        assert written(log) == {1, 2}


@every_kind
def test_a_hundred_rounds_of_random_stores_are_exact(kind: str) -> None:
    random = np.random.default_rng(7)
    with memory_of(kind) as area, watched(area) as log:
        for _ in range(100):
            pages = set(random.integers(area.npages, size=random.integers(1, 1 + area.npages // 2)).tolist())
            area.store(*pages)
            assert written(log) == pages


@every_kind
def test_contents_outlive_the_log(kind: str) -> None:
    with memory_of(kind) as area:
        with watched(area) as log:
            area.store(1, value=42)
            assert log.memory.read(0, [1])[0, 0] == 42
            log.memory.write(0, [2], np.full((1, area.page_size), 7, np.uint8))
            assert written(log) == {1, 2}, "a write through the log's memory is one, too"
        assert (area[1], area[2]) == (42, 7)
        area.store(3)
        with watched(area) as log:
            assert written(log) == set(), "a second log begins anew"


# --- transparent huge pages


def test_a_store_to_a_huge_page_is_one_small_page() -> None:
    with memory_of("thp") as area:
        area.octets[:] = 1
        before = huge_pages(area.address)
        if before != area.npages * PAGE:
            pytest.skip("no transparent huge pages were had")
        with watched(area) as log:
            assert huge_pages(area.address) == before, "arming splits nothing"
            assert written(log) == set()
            area.store(PER_HUGE + 5)
            assert written(log) == {PER_HUGE + 5}
            assert huge_pages(area.address) == before - HUGE, "the price: that huge page is split"


HALVES = {
    "first half": range(PER_HUGE // 2),
    "second half": range(PER_HUGE // 2, PER_HUGE),
    "one page": range(3, 4),
    "all": range(PER_HUGE),
    "across two": range(PER_HUGE - 1, PER_HUGE + 1),
}


@pytest.mark.parametrize("pages", HALVES.values(), ids=HALVES.keys())
def test_parts_of_huge_pages_are_exact(pages: range) -> None:
    with memory_of("thp") as area:
        area.octets[:] = 1
        with watched(area) as log:
            area.store(*pages)
            assert written(log) == set(pages)


def test_taking_half_a_huge_page_leaves_the_other_half() -> None:
    """A huge page that is registered and not armed has been written as a whole; a scan of a part takes just the part."""
    with memory_of("thp") as area, watched(area) as log:
        area.octets[:] = 1
        assert written(log) == set(range(area.npages))
        area.octets[:] = 2
        start, _ = area.span()
        port = log.memory.port
        with Pagemap() as pagemap:
            taken: list[int] = []
            scanner = Scanner(pagemap, 4)
            scanner.take(start, start + HUGE // 2, lambda regions: taken.append(int((regions["end"] - regions["start"]).sum())))
        assert sum(taken) == HUGE // 2
        assert written(log) == set(range(PER_HUGE // 2, area.npages)), port.name


def test_a_huge_page_made_of_written_ones_is_still_armed() -> None:
    """MADV_COLLAPSE, or khugepaged: the marks of 512 pages must not get lost on the way."""
    with memory_of("thp") as area:
        area.advise(NOHUGEPAGE)
        area.octets[:] = 1
        area.advise(MADV_HUGEPAGE)
        with watched(area) as log:
            area.store(*range(0, PER_HUGE, 2))
            with suppress(OSError):  # what is armed is not collapsed: as good
                area.advise(MADV_COLLAPSE)
            assert written(log) >= set(range(0, PER_HUGE, 2))
            area.store(7, PER_HUGE + 7)
            assert written(log) >= {7, PER_HUGE + 7}


def test_a_discarded_huge_page_is_reported() -> None:
    with memory_of("thp") as area:
        area.octets[:] = 1
        with watched(area) as log:
            area.advise(DONTNEED, PER_HUGE, PER_HUGE)
            assert written(log) == set(range(PER_HUGE, 2 * PER_HUGE))
            assert area[PER_HUGE] == 0
            area.store(PER_HUGE + 1)
            assert written(log) == {PER_HUGE + 1}


def test_the_huge_zero_page_is_clean_and_armed() -> None:
    """Reading a huge page that nobody touched maps the zero page, 512 times at once."""
    with memory_of("thp") as area:
        area.octets[:: 64 * PAGE].sum()
        with watched(area) as log:
            assert written(log) == set()
            area.store(9)
            assert written(log) == {9}


def test_huge_pages_of_shared_memory_lose_nothing() -> None:
    """The kernel drops the entry of such a page when a store splits it: all of its pages are then reported."""
    with memory_file(2 * HUGE) as fd, Area.map(2 * PER_HUGE, align=HUGE) as area:
        area.map_again(flags=SHARED, fd=fd)
        area.octets[:] = 1
        try:
            area.advise(MADV_COLLAPSE)
        except OSError as error:
            pytest.skip(f"no huge pages of shared memory: {error.strerror}")
        with watched(area) as log:
            assert written(log) == set()
            for pages in ({5, PER_HUGE + 5}, {6}, {PER_HUGE, 2 * PER_HUGE - 1}):
                area.store(*pages)
                assert written(log) >= pages
                assert written(log) == set()
            with Area.map(2 * PER_HUGE, SHARED, fd=fd) as alias, suppress(OSError):
                area.store(7)
                alias.advise(MADV_COLLAPSE)
            assert 7 in written(log), "others may make huge pages of it again"
            area.store(8)
            assert 8 in written(log)


@pytest.mark.parametrize("what", ["unmapped", "protected", "discarded"])
def test_a_huge_page_that_is_broken_up_keeps_its_marks(what: str) -> None:
    with memory_of("thp") as area:
        area.octets[:] = 1
        with watched(area) as log:
            if what == "unmapped":
                area.unmap(10, 5)
            elif what == "protected":
                area.protect(READ, 10, 5)
            else:
                area.advise(DONTNEED, 10, 5)
            assert written(log) == (set(range(10, 15)) if what == "discarded" else set())
            area.store(9, 15, PER_HUGE - 1)
            assert written(log) == {9, 15, PER_HUGE - 1}


# --- pages that are not there


def test_the_zero_page_is_clean_and_armed() -> None:
    with Area.map(64) as area, watched(area) as log:
        area.advise(POPULATE_READ)
        assert written(log) == set()
        area.store(5)
        assert written(log) == {5}


def test_swapped_pages_keep_what_they_were() -> None:
    if not _swaps():
        pytest.skip("there is no swap space")
    with Area.map(64) as area:
        area.octets[:] = 1
        with watched(area) as log:
            area.store(3)
            area.advise(PAGEOUT)
            assert status_kib("VmSwap") > 0
            assert written(log) == {3}, "dirty and swapped out"
            assert written(log) == set(), "armed there"
            area.octets.sum()
            assert written(log) == set(), "and read again"
            area.advise(PAGEOUT)
            area.store(4)
            assert written(log) == {4}


def _swaps() -> bool:
    with mmap.mmap(-1, 64 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(b"x" * 64 * PAGE)
        memory.madvise(PAGEOUT)
        return status_kib("VmSwap") > 0

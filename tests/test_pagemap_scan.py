"""The scans of the kernel's selftest (tools/testing/selftests/mm/pagemap_ioctl.c), bare and through dirtylog's scanner."""

from __future__ import annotations

import errno
import platform
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from address_space import PAGE, READ, Area
from bare_uffd import TAKE, WRITTEN, Bare, bare
from dirtylog.linux import abi
from dirtylog.linux.abi import Category, Scan
from dirtylog.linux.pagemap import Pagemap, Scanner
from uffd_here import needs_uffd, watched, written

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

pytestmark = needs_uffd

NPAGES = 1050


@pytest.fixture
def scene() -> Iterator[Bare]:
    """Memory that is armed, and of which nothing has been written since."""
    with Area.map(NPAGES) as area, bare(area) as armed:
        yield armed


def taken(scene: Bare, capacity: int, first: int = 0, npages: int | None = None) -> set[int]:
    """Return what dirtylog's scanner delivers with a vector of so many regions."""
    found: set[int] = set()

    def deliver(regions: NDArray[np.void]) -> None:
        runs = scene.runs(regions)
        assert len(runs) <= capacity
        pages = {page for start, count in runs for page in range(start, start + count)}
        assert not pages & found, "a page was delivered twice though nobody wrote"
        found.update(pages)

    start, nbytes = scene.area.span(first, npages)
    with Pagemap() as pagemap:
        Scanner(pagemap, capacity).take(start, start + nbytes, deliver)
    return found


# --- what the kernel refuses

BAD = {
    "size": {"size": 95},
    "a longer struct": {"size": 104},
    "unknown flags": {"flags": 4},
    "all flags": {"flags": -1 & 0xFFFF_FFFF_FFFF_FFFF},
    "an unknown category": {"category_mask": 1 << 60},
    "an unknown category of which any": {"category_anyof_mask": 1 << 60},
    "an unknown category to invert": {"category_inverted": 1 << 60},
    "an unknown category to return": {"return_mask": 1 << 60},
    "a vector without a place": {"vec": 0},
    "a start within a page": {"start": 12345},
}


@pytest.mark.parametrize("fields", BAD.values(), ids=BAD.keys())
def test_a_malformed_scan_is_refused_and_takes_nothing(scene: Bare, fields: dict[str, int]) -> None:
    scene.area.store(3)
    assert scene.scan(**fields).errno == errno.EINVAL
    assert scene.scan().pages == {3}


def test_a_vector_that_cannot_be_written_is_efault() -> None:
    with Area.map(8) as area, bare(area) as scene, Area.map(1, protection=READ) as vector:
        area.store(3)
        assert scene.scan(vec=vector.address, vec_len=8).errno == errno.EFAULT


def test_a_range_of_no_pages_has_nothing(scene: Bare) -> None:
    scene.area.store(0)
    assert scene.scan(0, 0) == ([], 0, 0)
    assert taken(scene, 8, 0, 0) == set()


# --- categories


def test_the_masks_choose_what_all_of_or_any_of_or_not(scene: Bare) -> None:
    scene.area.store(10, 11, 12)

    def look(**masks: Any) -> set[int]:
        return scene.scan(flags=Scan(0), **{"category_mask": 0, "return_mask": 0, **masks}).pages

    assert look(category_mask=WRITTEN) == {10, 11, 12}
    assert look(category_anyof_mask=WRITTEN | Category.FILE) == {10, 11, 12}
    assert look(category_mask=WRITTEN | Category.FILE) == set()
    assert look(category_mask=WRITTEN, category_inverted=WRITTEN) == set(range(NPAGES)) - {10, 11, 12}
    assert look(category_mask=WRITTEN | Category.FILE, category_inverted=Category.FILE) == {10, 11, 12}


def test_regions_join_only_where_what_is_returned_is_equal(scene: Bare) -> None:
    scene.area.store(*range(10, 20))
    assert scene.scan(flags=Scan(0)).runs == [(10, 10)]
    everything = scene.scan(flags=Scan(0), category_mask=0, return_mask=WRITTEN)
    assert everything.runs == [(0, 10), (10, 10), (20, NPAGES - 20)]


def test_looking_changes_nothing(scene: Bare) -> None:
    scene.area.store(1, 5)
    with Pagemap() as pagemap:
        scanner = Scanner(pagemap)
        start, nbytes = scene.area.span()
        regions: list[tuple[int, int]] = []
        scanner.populated(start, start + nbytes, lambda found: regions.extend(scene.runs(found)))
        assert regions == [(0, NPAGES)], "what has been armed has an entry"
        scanner.holes(start, start + nbytes, lambda _: pytest.fail("and is no hole"))
    assert scene.scan().pages == {1, 5}


# --- which pages


def test_every_other_page_is_a_region_of_its_own(scene: Bare) -> None:
    pages = range(0, NPAGES, 2)
    scene.area.store(*pages)
    assert scene.scan().runs == [(page, 1) for page in pages]
    assert scene.scan().runs == []


@pytest.mark.parametrize(("first", "npages"), [(0, NPAGES), (NPAGES // 2 - 1, 2), (0, 1), (NPAGES - 1, 1), (511, 2), (512, 512)])
def test_a_part_is_taken_and_the_rest_stays(scene: Bare, first: int, npages: int) -> None:
    scene.area.store(*range(NPAGES))
    assert taken(scene, 4, first, npages) == set(range(first, first + npages))
    assert scene.scan().pages == set(range(NPAGES)) - set(range(first, first + npages))


def test_two_regions_of_one_area_are_told_apart(scene: Bare) -> None:
    scene.area.store(*range(100, 200), *range(300, 400))
    assert scene.scan().runs == [(100, 100), (300, 100)]


def test_a_hundred_toggles_are_each_seen() -> None:
    with Area.map(5) as area, watched(area) as log:
        for _ in range(100):
            assert written(log) == set()
            area.store(2)
            assert written(log) == {2}


# --- vectors that are too short


@pytest.mark.parametrize("capacity", [1, 2, 3, 50, 511, 512, 513])
def test_a_short_vector_loses_nothing(scene: Bare, capacity: int) -> None:
    pages = set(range(0, NPAGES, 2))
    scene.area.store(*pages)
    assert taken(scene, capacity) == pages
    assert taken(scene, capacity) == set(), "and all of it is armed"
    scene.area.store(*pages)
    assert taken(scene, capacity) == pages


def test_fifty_regions_fit_a_vector_of_fifty(scene: Bare) -> None:
    """1050 pages, of which each 21st is not written: the kernel's own example."""
    pages = set(range(NPAGES)) - set(range(0, NPAGES, 21))
    scene.area.store(*pages)
    assert taken(scene, 50) == pages


def test_a_hundred_random_sets_come_whole_through_a_vector_of_fifty() -> None:
    random = np.random.default_rng(14)
    with Area.map(10_000) as area, bare(area) as scene:
        for _ in range(100):
            pages = random.choice(area.npages, random.integers(1, area.npages), replace=False)
            area.octets[pages * PAGE] = random.integers(256)
            assert taken(scene, 50) == set(pages.tolist())


@pytest.mark.parametrize("flags", [Scan(0), TAKE], ids=["look", "take"])
@pytest.mark.parametrize(
    "limits", [{"vec_len": 1}, {"vec_len": 2}, {"max_pages": 1}, {"max_pages": 3, "vec_len": 2}, {"max_pages": 500}], ids=str
)
@pytest.mark.parametrize("pages", [range(NPAGES), range(0, NPAGES, 2), range(NPAGES - 1, NPAGES)], ids=["dense", "sparse", "last"])
def test_walk_end_is_where_the_rest_begins(scene: Bare, pages: range, limits: dict[str, int], flags: Scan) -> None:
    scene.area.store(*pages)
    first, found = 0, set[int]()
    while first < NPAGES:
        answer = scene.scan(first, flags=flags, **limits)
        assert first < answer.walk_end <= NPAGES
        assert answer.pages <= set(range(first, answer.walk_end))
        assert len(answer.pages) <= limits.get("max_pages", NPAGES)
        found |= answer.pages
        first = answer.walk_end
    assert found == set(pages)
    assert scene.scan().pages == (set() if flags else set(pages))


def test_a_scan_that_finds_nothing_walks_to_the_end(scene: Bare) -> None:
    assert scene.scan(max_pages=1, vec_len=1) == ([], 0, NPAGES)


def test_a_scan_longer_than_one_call_goes_on() -> None:
    """What one call walks is limited, so that other threads may map memory; here the limit lies within the area."""
    with Area.map(NPAGES) as area, bare(area) as scene, pytest.MonkeyPatch.context() as patch:
        patch.setattr("dirtylog.linux.pagemap._CHUNK_BYTES", 7 * PAGE)
        pages = {0, 6, 7, 13, 14, 700, NPAGES - 1}
        area.store(*pages)
        assert taken(scene, 8) == pages
        assert scene.scan().pages == set()


@pytest.mark.skipif(platform.machine() not in {"x86_64", "aarch64", "riscv64"}, reason="the other encoding of ioctl numbers")
def test_the_numbers_are_the_kernels() -> None:
    assert abi.PAGEMAP_SCAN == 0xC0606610
    assert abi.UFFDIO_REGISTER == 0xC020AA00
    assert abi.UFFDIO_UNREGISTER == 0x8010AA01
    assert abi.UFFDIO_API == 0xC018AA3F
    assert abi.PAGE_REGION.itemsize == 24

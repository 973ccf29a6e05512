"""Memory that mremap brings, takes or leaves behind (selftest uffd-wp-mremap.c): detected, and reported as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from address_space import DONTUNMAP, HUGE, MAYMOVE, PAGE, REMAP_FIXED, Area, remap
from memory_kinds import MADV_HUGEPAGE, memory_of
from uffd_here import needs_uffd, watched, written

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_uffd

NPAGES = 64


@pytest.fixture
def area() -> Iterator[Area]:
    """Private memory with something in it."""
    with Area.map(NPAGES) as mapped:
        mapped.octets[:] = 1
        yield mapped


def test_memory_moved_away_and_back_is_reported(area: Area) -> None:
    with watched(area) as log, Area.map(8) as elsewhere:
        assert remap(area.span(16, 8), 8 * PAGE, MAYMOVE | REMAP_FIXED, elsewhere.address) == elsewhere.address
        area.set_mapped(False, 16, 8)
        elsewhere.store(3)
        assert written(log) == set(), "there is nothing in its place"
        remap(elsewhere.span(), 8 * PAGE, MAYMOVE | REMAP_FIXED, area.span(16, 8)[0])
        area.set_mapped(True, 16, 8)
        elsewhere.set_mapped(False)
        assert written(log) >= set(range(16, 24))
        area.store(19)
        assert written(log) == {19}


@pytest.mark.parametrize("kind", ["ten-pages", "thp", "memfd-shared", "memfd-private", "file-shared", "anonymous-shared"])
@pytest.mark.parametrize("touched", [True, False])
def test_any_memory_moved_over_it_is_reported(kind: str, touched: bool) -> None:
    with memory_of(kind) as source, Area.map(4 * HUGE // PAGE, align=HUGE) as target:
        target.octets[:] = 1
        target.advise(MADV_HUGEPAGE)
        if touched:
            source.octets[:] = 2
        npages = min(source.npages, target.npages)
        with watched(target) as log:
            remap(source.span(0, npages), npages * PAGE, MAYMOVE | REMAP_FIXED, target.address)
            source.set_mapped(False, 0, npages)
            assert written(log) >= set(range(npages))
            target.store(1, npages - 1)
            assert written(log) == {1, npages - 1}


def test_memory_that_is_itself_watched_moved_over_it_is_reported(area: Area) -> None:
    """The marks of the one must not pass for those of the other."""
    with Area.map(8) as source:
        source.octets[:] = 2
        with watched(area) as log, watched(source) as other:
            remap(source.span(), 8 * PAGE, MAYMOVE | REMAP_FIXED, area.address)
            source.set_mapped(False)
            assert written(log) >= set(range(8))
            area.store(3)
            assert written(log) == {3}
            assert written(other) == set(), "there is nothing in its place"
            source.map_again()
            assert written(other) == set(range(8))


def test_what_a_move_leaves_behind_empty_is_reported(area: Area) -> None:
    """MREMAP_DONTUNMAP: the pages go, the mapping stays, and reads as zeros."""
    with watched(area) as log:
        moved = remap(area.span(8, 8), 8 * PAGE, MAYMOVE | DONTUNMAP)
        with Area(moved, 8):
            assert area[8] == 0
            assert written(log) >= set(range(8, 16))
            area.store(9)
            assert written(log) == {9}


def test_memory_that_shrank_and_grew_again_is_reported(area: Area) -> None:
    with watched(area) as log:
        remap(area.span(), 32 * PAGE, 0)
        area.set_mapped(False, 32, 32)
        assert written(log) == set()
        try:
            remap(area.span(0, 32), NPAGES * PAGE, 0)
        except OSError:
            pytest.skip("something else has come to lie behind it")
        area.set_mapped(True)
        assert written(log) >= set(range(32, NPAGES))
        assert area[40] == 0
        area.store(5, 45)
        assert written(log) == {5, 45}


def test_huge_pages_of_hugetlbfs_that_are_moved_away_and_back_are_reported() -> None:
    with memory_of("hugetlb-private") as area, Area.map(2 * HUGE // PAGE, align=HUGE) as elsewhere:
        area.octets[:] = 1
        with watched(area) as log:
            try:
                remap(area.span(1, 2), 2 * HUGE, MAYMOVE | REMAP_FIXED, elsewhere.address)
            except OSError as error:
                pytest.skip(f"this kernel does not move them: {error.strerror}")
            area.set_mapped(False, 1, 2)
            elsewhere.octets[0] = 2
            remap((elsewhere.address, 2 * HUGE), 2 * HUGE, MAYMOVE | REMAP_FIXED, area.span(1, 2)[0])
            elsewhere.set_mapped(False)
            area.set_mapped(True, 1, 2)
            assert written(log) >= {1, 2}
            area.store(1)
            assert written(log) == {1}

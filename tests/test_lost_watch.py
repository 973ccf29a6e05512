"""A move by which the kernel drops the watch of memory that was not moved.

It makes one mapping of what lies before, what comes, and what lies after, and drops the watch of the whole, but leaves the marks: a
store then clears no mark, and nor would the next one after another registration.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

import dirtylog
from address_space import ANONYMOUS, MAYMOVE, PAGE, REMAP_FIXED, SHARED, Area, remap
from uffd_here import needs_uffd, written

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dirtylog import DirtyLog

pytestmark = needs_uffd

NPAGES, FIRST, MOVED = 64, 20, 10


@contextmanager
def moved_away_and_back() -> Iterator[tuple[Area, DirtyLog]]:
    """Give memory and a log of it, after pages of it were in other memory that is logged."""
    # What is shared on both sides keeps a mapping from becoming one with its neighbours.
    with Area.map(NPAGES + 2, SHARED | ANONYMOUS) as around, Area.map(MOVED + 2, SHARED | ANONYMOUS) as around_other:
        around.map_again(1, NPAGES)
        around_other.map_again(1, MOVED)
        area, other = Area(around.address + PAGE, NPAGES), Area(around_other.address + PAGE, MOVED)
        area.octets[::PAGE] = 1
        with dirtylog.track(area.octets, port="uffd") as log, dirtylog.track(other.octets, port="uffd") as other_log:
            remap(area.span(FIRST, MOVED), MOVED * PAGE, MAYMOVE | REMAP_FIXED, other.address)
            around.set_mapped(False, 1 + FIRST, MOVED)
            other_log.get(0)
            remap(other.span(), MOVED * PAGE, MAYMOVE | REMAP_FIXED, area.span(FIRST)[0])
            around.set_mapped(True, 1 + FIRST, MOVED)
            around_other.set_mapped(False, 1, MOVED)
            other_log.close()
            yield area, log


def test_what_was_not_moved_is_still_watched() -> None:
    with moved_away_and_back() as (area, log):
        area.store(5, 40)
        assert written(log) >= {5, 40, *range(FIRST, FIRST + MOVED)}
        for pages in ({5, 40}, {5, 25, 50}, set()):
            area.store(*pages)
            assert written(log) == pages


@pytest.mark.parametrize("npages", [10, NPAGES])
def test_another_log_that_begins_now_does_not_hide_it(npages: int) -> None:
    with moved_away_and_back() as (area, log):
        area.store(5)
        with dirtylog.track(area.octets[: npages * PAGE], port="uffd") as other:
            assert 5 in written(log)
            for _ in range(2):
                area.store(5)
                assert 5 in written(log)
                assert 5 in written(other)

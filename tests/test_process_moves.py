"""Another process, parts of whose memory are unmapped, grow, shrink and move: what each round reports of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from address_space import ANONYMOUS, DONTUNMAP, MAYMOVE, PAGE, REMAP_FIXED, SHARED
from puppets import Puppet, follow, logged
from victims import needs_victims

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dirtylog import DirtyLog
    from dirtylog.linux.process import ProcessMemory

pytestmark = needs_victims

NPAGES = 64
EVERYTHING = set(range(NPAGES))


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    with Puppet() as started:
        yield started


@pytest.fixture
def area(puppet: Puppet) -> int:
    """Pages that were there before the log began, each with something on it."""
    address = puppet.map(NPAGES)
    puppet.fill(address, NPAGES)
    return address


@pytest.fixture
def opened(puppet: Puppet, area: int) -> Iterator[tuple[ProcessMemory, DirtyLog]]:
    assert area
    with logged(puppet) as both:
        follow(both[1])
        yield both


@pytest.fixture
def log(opened: tuple[ProcessMemory, DirtyLog]) -> DirtyLog:
    return opened[1]


@pytest.fixture
def memory(opened: tuple[ProcessMemory, DirtyLog]) -> ProcessMemory:
    return opened[0]


# --- holes


def test_what_is_left_around_a_hole(puppet: Puppet, area: int, log: DirtyLog) -> None:
    hole = set(range(20, 28))
    puppet.unmap(area + 20 * PAGE, 8)
    assert follow(log).at(area, NPAGES) in (hole, EVERYTHING - hole), "either the hole is news, or what is left is in new slots"
    assert follow(log).at(area, NPAGES) == set()
    puppet.store(area, [19, 28])
    assert follow(log).at(area, NPAGES) == {19, 28}
    puppet.map(4, at=area + 22 * PAGE)
    puppet.store(area, [23])
    assert follow(log).at(area, NPAGES) >= {23}
    assert follow(log).at(area, NPAGES) == set()
    puppet.store(area, [24, 0])
    assert follow(log).at(area, NPAGES) == {24, 0}


def test_a_hole_grows_and_shrinks(puppet: Puppet, area: int, log: DirtyLog) -> None:
    puppet.unmap(area + 20 * PAGE, 8)
    follow(log)
    puppet.unmap(area + 28 * PAGE, 2)
    follow(log)
    assert follow(log).at(area, NPAGES) == set()
    puppet.map(5, at=area + 20 * PAGE)
    puppet.store(area, [20])
    assert follow(log).at(area, NPAGES) >= {20}
    puppet.store(area, [24, 30])
    assert follow(log).at(area, NPAGES) == {24, 30}


# --- the heap


def test_the_heap_grows_without_being_reported_anew(puppet: Puppet, log: DirtyLog) -> None:
    bottom = -(-puppet.brk() // PAGE) * PAGE
    puppet.brk(bottom + 16 * PAGE)
    puppet.fill(bottom, 16)
    assert follow(log).at(bottom, NPAGES) == set(range(16))
    puppet.brk(bottom + 32 * PAGE)
    puppet.store(bottom, [3, 20])
    assert follow(log).at(bottom, NPAGES) == {3, 20}, "the old part is not new"
    puppet.brk(bottom + 48 * PAGE)
    puppet.store(bottom, [47, 31])
    assert follow(log).at(bottom, NPAGES) == {47, 31}
    puppet.brk(bottom + 8 * PAGE)
    follow(log)
    puppet.store(bottom, [7])
    assert follow(log).at(bottom, NPAGES) == {7}
    puppet.brk(bottom + 24 * PAGE)
    puppet.store(bottom, [7, 9])
    assert {7, 9} <= follow(log).at(bottom, NPAGES)
    puppet.store(bottom, [23])
    assert follow(log).at(bottom, NPAGES) == {23}


@pytest.mark.parametrize("seen_first", [True, False])
def test_a_heap_that_grows_often(puppet: Puppet, log: DirtyLog, memory: ProcessMemory, seen_first: bool) -> None:
    """Where the kernel merges what has been added, so that one mapping would have ever more slots, they become one again."""
    bottom = -(-puppet.brk() // PAGE) * PAGE
    most = 0
    for number in range(1, 80):
        puppet.brk(bottom + number * PAGE)
        if seen_first:
            follow(log)
        puppet.store(bottom, [number - 1])
        assert number - 1 in follow(log).at(bottom, number)
        most = max(most, sum(slot.name == "[heap]" for slot in memory.slots))
    assert most < 40 or not seen_first, "the kernel keeps apart what was written before it was watched"
    puppet.store(bottom, [0, 40, 78])
    assert follow(log).at(bottom, 79) == {0, 40, 78}


# --- moves


def test_a_moved_mapping_is_reported_where_it_is_now(puppet: Puppet, area: int, log: DirtyLog) -> None:
    puppet.store(area, [1])
    target = puppet.map(NPAGES + 8)
    follow(log)
    moved = puppet.remap(area, NPAGES, NPAGES, MAYMOVE | REMAP_FIXED, target)
    assert moved == target
    reported = follow(log)
    assert reported.at(target, NPAGES) == EVERYTHING
    assert reported.at(area, NPAGES) in (set(), EVERYTHING), "there is no slot any more, or it has a hole"
    puppet.store(target, [4, 5])
    assert follow(log).at(target, NPAGES) == {4, 5}


def test_a_mapping_grows_and_shrinks_where_it_is(puppet: Puppet, log: DirtyLog) -> None:
    place = puppet.map(4 * NPAGES)
    puppet.unmap(place + NPAGES * PAGE, 3 * NPAGES)
    puppet.fill(place, NPAGES)
    assert follow(log).at(place, NPAGES) == EVERYTHING
    assert puppet.remap(place, NPAGES, 2 * NPAGES, 0) == place
    puppet.store(place, [3, NPAGES + 3])
    assert follow(log).at(place, 2 * NPAGES) == {3, NPAGES + 3}
    assert puppet.remap(place, 2 * NPAGES, 32, 0) == place
    assert follow(log).at(place, NPAGES) in (set(range(32)), set(range(32, NPAGES)))
    puppet.store(place, [31])
    assert follow(log).at(place, NPAGES) == {31}


def test_pages_that_are_moved_away_leave_zeros(puppet: Puppet, area: int, log: DirtyLog) -> None:
    new = puppet.remap(area + 8 * PAGE, 8, 8, MAYMOVE | DONTUNMAP)
    reported = follow(log)
    assert reported.at(area, NPAGES) == set(range(8, 16))
    assert reported.at(new, 8) == set(range(8))


@pytest.mark.parametrize("close", [False, True])
def test_memory_that_is_moved_back_between_what_it_was_cut_from(
    puppet: Puppet, memory: ProcessMemory, log: DirtyLog, close: bool
) -> None:
    """The kernel makes one mapping of all three, and drops the watch of that, but not the marks on the pages of the outer two."""
    place = apart(puppet, NPAGES)
    other = apart(puppet, 10)
    assert follow(log).at(place, NPAGES) == EVERYTHING
    puppet.remap(place + 20 * PAGE, 10, 10, MAYMOVE | REMAP_FIXED, other)
    follow(log)
    puppet.remap(other, 10, 10, MAYMOVE | REMAP_FIXED, place + 20 * PAGE)
    if close:
        log.stop()
        memory.close()
        puppet.store(place, [5, 40])
        with logged(puppet) as (_, later):
            puppet.store(place, [5, 40], 2)
            assert follow(later).at(place, NPAGES) >= {5, 40}
        return
    puppet.store(place, [5, 40], 2)
    assert follow(log).at(place, NPAGES) >= {5, 40, *range(20, 30)}
    for value in (3, 4):
        puppet.store(place, [5, 40, 50], value)
        assert follow(log).at(place, NPAGES) == {5, 40, 50}


def apart(puppet: Puppet, npages: int) -> int:
    """Map pages, each with something on it, that become one mapping with no others."""
    address = puppet.map(npages + 2, SHARED | ANONYMOUS) + PAGE
    puppet.map(npages, at=address)
    puppet.fill(address, npages)
    return address

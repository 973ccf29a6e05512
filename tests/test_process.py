"""Another process, whose memory changes one step at a time: what each round reports of it."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

import pytest

from address_space import ANONYMOUS, DONTNEED, NONE, PAGE, PRIVATE, READ, SHARED, WRITE
from puppets import Puppet, follow, logged, slot_at
from victims import needs_victims

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dirtylog import DirtyLog
    from dirtylog.linux.process import ProcessMemory

pytestmark = needs_victims

NPAGES = 64
EVERYTHING = set(range(NPAGES))
OTHERS = ("file-private", "file-shared", "file-read-only", "memfd-private", "memfd-shared", "anonymous-shared")


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


@pytest.fixture
def file() -> Iterator[str]:
    """A file on a disk: not in memory, as those of memfd are."""
    with tempfile.NamedTemporaryFile(dir="/var/tmp") as made:
        made.write(b"f" * NPAGES * PAGE)
        made.flush()
        os.fsync(made.fileno())
        yield made.name


# --- one mapping


def test_each_round_reports_what_was_written_in_it(puppet: Puppet, area: int, log: DirtyLog) -> None:
    assert follow(log).at(area, NPAGES) == set()
    for pages in ({3}, {0, 63}, set(), set(range(10, 50)), {3, 4}, EVERYTHING):
        puppet.store(area, pages, 9)
        assert follow(log).at(area, NPAGES) == pages
    assert follow(log).at(area, NPAGES) == set()


def test_reading_is_not_writing(puppet: Puppet, area: int, log: DirtyLog) -> None:
    puppet.touch(area, NPAGES)
    assert follow(log).at(area, NPAGES) == set()


def test_what_the_kernel_writes_for_it_is_reported(puppet: Puppet, area: int, log: DirtyLog) -> None:
    zeros = puppet.open("/dev/zero")
    puppet.read_into(zeros, area + 5 * PAGE - 1, 2)
    assert follow(log).at(area, NPAGES) == {4, 5}


def test_a_change_of_permissions_is_not_a_write(puppet: Puppet, area: int, log: DirtyLog, memory: ProcessMemory) -> None:
    puppet.protect(area, NPAGES, READ)
    assert follow(log).at(area, NPAGES) == set()
    assert slot_at(memory, area).permissions == "r--p"
    puppet.protect(area, 8, READ | WRITE)
    puppet.store(area, [2])
    puppet.protect(area, NPAGES, NONE)
    assert follow(log).at(area, NPAGES) == {2}
    puppet.protect(area, NPAGES, READ | WRITE)
    assert follow(log).at(area, NPAGES) == set()
    puppet.store(area, [2, 40])
    assert follow(log).at(area, NPAGES) == {2, 40}


def test_discarded_pages_are_reported(puppet: Puppet, area: int, log: DirtyLog) -> None:
    puppet.advise(area + 8 * PAGE, 4, DONTNEED)
    assert follow(log).at(area, NPAGES) == {8, 9, 10, 11}
    puppet.store(area, [9])
    assert follow(log).at(area, NPAGES) == {9}


def test_the_stack_grows(puppet: Puppet, log: DirtyLog) -> None:
    bottom = puppet.order(f"stack {100 * PAGE}")
    top = bottom // PAGE + 100
    reported = follow(log)
    assert set(range(90)) <= {page - bottom // PAGE for page in range(bottom // PAGE, top)} & reported.at(
        bottom // PAGE * PAGE, 100
    )
    assert len(follow(log).at(bottom // PAGE * PAGE, 90)) == 0
    puppet.order(f"stack {100 * PAGE}")
    assert set(range(90)) <= follow(log).at(bottom // PAGE * PAGE, 100)


def test_what_a_child_writes_is_its_own(puppet: Puppet, area: int, log: DirtyLog) -> None:
    puppet.order(f"fork fill {area} {PAGE} {NPAGES} 9")
    assert follow(log).at(area, NPAGES) == set()
    puppet.order(f"keep fill {area} {PAGE} 10 9")
    puppet.store(area, [1, 30])
    assert follow(log).at(area, NPAGES) == {1, 30}, "to pages that parent and child share until one of them writes"


# --- mappings come and go


def test_of_a_new_mapping_all_that_it_holds_is_reported_once(puppet: Puppet, log: DirtyLog) -> None:
    new = puppet.map(NPAGES)
    puppet.store(new, [1, 2, 60])
    assert follow(log).at(new, NPAGES) == {1, 2, 60}, "the others read as zeros"
    assert follow(log).at(new, NPAGES) == set()
    puppet.store(new, [2, 3])
    assert follow(log).at(new, NPAGES) == {2, 3}


def test_a_new_mapping_of_a_file_is_reported_as_a_whole(puppet: Puppet, file: str, log: DirtyLog) -> None:
    for flags in (PRIVATE, SHARED):
        new = puppet.map(NPAGES, flags, fd=puppet.open(file))
        assert follow(log).at(new, NPAGES) == EVERYTHING, "a page that is not there is no zeros"
        assert follow(log).at(new, NPAGES) == set()
        puppet.store(new, [5, 6])
        assert follow(log).at(new, NPAGES) == {5, 6}


def test_a_mapping_in_the_place_of_another_of_its_kind(puppet: Puppet, area: int, log: DirtyLog, memory: ProcessMemory) -> None:
    slot = slot_at(memory, area)
    puppet.unmap(area, NPAGES)
    assert puppet.map(NPAGES, at=area) == area
    assert follow(log).at(area, NPAGES) == EVERYTHING, "it reads as zeros now"
    assert slot_at(memory, area) is slot
    puppet.store(area, [7])
    assert follow(log).at(area, NPAGES) == {7}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("first", [0, 20, NPAGES - 4])
def test_a_mapping_over_part_of_another(puppet: Puppet, area: int, log: DirtyLog, file: str, kind: str, first: int) -> None:
    """The rest of the old mapping is in slots that nobody has met: all that they hold is reported."""
    puppet.fill(area, NPAGES, 2)
    assert follow(log).at(area, NPAGES) == EVERYTHING
    what, _, how = kind.partition("-")
    fd = -1
    if what == "file":
        fd = puppet.open(file, os.O_RDONLY if how == "read-only" else os.O_RDWR)
    elif what == "memfd":
        fd = puppet.memory_file(4)
    flags = (PRIVATE if how == "private" else SHARED) | (ANONYMOUS if fd < 0 else 0)
    puppet.map(4, flags, at=area + first * PAGE, fd=fd, protection=READ if how == "read-only" else READ | WRITE)
    # A shared mapping of a file that may not be written cannot be watched, nor need it.
    new = set() if how == "read-only" else set(range(first, first + 4))
    rest = EVERYTHING - set(range(first, first + 4))
    assert follow(log).at(area, NPAGES) == rest | new
    assert follow(log).at(area, NPAGES) == set()
    other = (first + 30) % NPAGES
    puppet.store(area, [other])
    assert follow(log).at(area, NPAGES) == {other}


@pytest.mark.parametrize("kind", ["file", "memfd"])
def test_a_mapping_that_is_not_chosen_over_part_of_another(puppet: Puppet, area: int, file: str, kind: str) -> None:
    with logged(puppet, maps=["anonymous"]) as (memory, log):
        follow(log)
        slot = slot_at(memory, area)
        puppet.map(4, PRIVATE, at=area + 20 * PAGE, fd=puppet.open(file) if kind == "file" else puppet.memory_file(4))
        reported = follow(log).at(area, NPAGES)
        whole = slot_at(memory, area) is slot
        assert reported >= (set(range(20, 24)) if whole else EVERYTHING - set(range(20, 24))), "the other mapping is a hole in it"
        puppet.store(area, [19, 24])
        assert follow(log).at(area, NPAGES) == {19, 24}


def test_anonymous_memory_over_part_of_a_file(puppet: Puppet, log: DirtyLog, file: str) -> None:
    """As a loader does it for .bss."""
    new = puppet.map(NPAGES, PRIVATE, fd=puppet.open(file))
    assert follow(log).at(new, NPAGES) == EVERYTHING
    puppet.map(8, at=new + 40 * PAGE)
    puppet.store(new, [44])
    assert follow(log).at(new, NPAGES) == EVERYTHING - set(range(40, 48)) | {44}
    assert follow(log).at(new, NPAGES) == set()

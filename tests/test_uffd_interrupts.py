"""Ctrl-C at every point of a start, a get and a stop of tracked memory: nothing gets lost, and the next log works."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING

import pytest

import dirtylog
from address_space import DONTNEED, PAGE, SHARED, Area, memory_file
from dirtylog import DirtyBitmap, DirtyLog
from dirtylog.buffers.memory import BufferMemory
from dirtylog.linux.mappings import read_mappings
from dirtylog.linux.pagemap import Scanner
from dirtylog.linux.probe import sees_discarded_tables
from interrupts import interrupt
from uffd_here import needs_uffd, port_of_its_own, watched, written

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# A descriptor that an interrupt catches between its opening and its owner is the garbage collector's to close, and it says so.
pytestmark = [needs_uffd, pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")]

NPAGES = 130
STORED = {0, 3, 64, 129}


@pytest.fixture(params=["full", "sparse"])
def _how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dirtylog.linux.uffd_port.sees_discarded_tables", lambda: request.param == "full")


@pytest.fixture
def area() -> Iterator[Area]:
    with Area.map(NPAGES) as mapped:
        mapped.octets[:] = 1
        yield mapped


def interrupted_at_every_point(action: Callable[[int], bool], least: int) -> None:
    """Run ``action(step)``, which says whether step number ``step`` was reached, for each step, and each with a port of its own."""
    for step in itertools.count():
        with port_of_its_own(), pytest.MonkeyPatch.context() as patch:
            patch.setattr("dirtylog.linux.uffd_port.Scanner", partial(Scanner, capacity=64))  # it is quicker to make
            reached = action(step)
        if not reached:
            break
    assert step > least, "the points were not seen"


# --- a get


@pytest.mark.usefixtures("_how")
def test_a_get_interrupted_anywhere_loses_nothing_and_arms_everything(area: Area) -> None:
    def act(step: int) -> bool:
        with watched(area) as log:
            area.store(*STORED)
            area.advise(DONTNEED, 70, 2)
            out = DirtyBitmap(NPAGES)
            reached = interrupt(lambda: log.get(0, out), step)
            assert set((log.get(0) | out).pages().tolist()) == STORED | {70, 71}, f"interrupted at point {step}"
            area.store(*STORED)
            assert written(log) == STORED, f"interrupted at point {step}: not armed again"
            area.octets[70 * PAGE : 72 * PAGE] = 1
            return reached

    interrupted_at_every_point(act, 40)


def test_without_its_guard_an_interrupted_get_would_lose_pages(area: Area, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: nobody looks for what is left in the vector."""
    monkeypatch.setattr(Scanner, "settle", lambda _self, _deliver: None)
    lost: set[int] = set()

    def act(step: int) -> bool:
        with watched(area) as log:
            area.store(*STORED)
            out = DirtyBitmap(NPAGES)
            reached = interrupt(lambda: log.get(0, out), step)
            lost.update(STORED - set((log.get(0) | out).pages().tolist()))
            return reached

    interrupted_at_every_point(act, 40)
    assert lost == STORED


@pytest.mark.usefixtures("_how")
def test_a_get_that_finds_new_memory_interrupted_anywhere_loses_nothing(area: Area, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(step: int) -> bool:
        with watched(area) as log:
            area.map_again(70, 2)
            _read_mappings_once(area, monkeypatch)
            area.store(*STORED)
            out = DirtyBitmap(NPAGES)
            reached = interrupt(lambda: log.get(0, out), step)
            assert set((log.get(0) | out).pages().tolist()) >= STORED | {70, 71}, f"interrupted at point {step}"
            area.store(*STORED, 71)
            assert written(log) == STORED | {71}, f"interrupted at point {step}: not armed again"
            area.store(70, 71)
            return reached

    interrupted_at_every_point(act, 60)


def test_a_get_that_finds_a_file_interrupted_anywhere_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In sparse memory a page of a file that is not there is found only because the get finds the mapping to be new."""
    monkeypatch.setattr("dirtylog.linux.uffd_port.sees_discarded_tables", lambda: False)

    def act(step: int) -> bool:
        with memory_file(4 * PAGE, contents=b"y" * 4 * PAGE) as fd, Area.map(NPAGES) as area, watched(area) as log:
            area.map_again(70, 4, SHARED, fd=fd)
            area.store(3)
            _read_mappings_once(area, monkeypatch)
            out = DirtyBitmap(NPAGES)
            reached = interrupt(lambda: log.get(0, out), step)
            assert set((log.get(0) | out).pages().tolist()) >= {3, 70, 71, 72, 73}, f"interrupted at point {step}"
            return reached

    interrupted_at_every_point(act, 60)


def _read_mappings_once(area: Area, patch: pytest.MonkeyPatch) -> None:
    """Let a get have the area's mappings of now: to read all of them has many points, at which nothing is at stake."""
    start, nbytes = area.span()
    mappings = [mapping for mapping in read_mappings() if mapping.start < start + nbytes and start < mapping.end]
    patch.setattr("dirtylog.linux.uffd_port.read_mappings", lambda _pid: mappings)


@pytest.mark.parametrize("what", ["another log begins", "another log gets", "another log of the same memory begins"])
def test_what_an_interrupted_get_holds_outlives_what_others_do(area: Area, what: str) -> None:
    """The vector of the scans is shared by all tracked memory: whoever scans next must deliver first what is in it."""
    with Area.map(8) as elsewhere:

        def act(step: int) -> bool:
            with watched(area) as log, watched(elsewhere) as other:
                area.store(*STORED)
                elsewhere.store(5)
                out = DirtyBitmap(NPAGES)
                reached = interrupt(lambda: log.get(0, out), step)
                if what == "another log gets":
                    assert written(other) == {5}
                else:
                    watched(elsewhere if what == "another log begins" else area).close()
                assert set((log.get(0) | out).pages().tolist()) >= STORED, f"interrupted at point {step}"
                assert written(other) == (set() if what == "another log gets" else {5})
                return reached

        interrupted_at_every_point(act, 40)


def test_an_epoch_interrupted_anywhere_has_its_pages_in_the_next(area: Area) -> None:
    def act(step: int) -> bool:
        with watched(area) as log:
            consumer = log.consumer("copy")
            area.store(*STORED)
            epoch = consumer.epoch()
            reached = interrupt(epoch.__enter__, step)
            epoch.rollback()
            area.store(7)
            with consumer.epoch() as taken:
                assert set(taken.dirty[0].pages().tolist()) == STORED | {7}, f"interrupted at point {step}"
            assert written(log) == STORED | {7}, "and get has them as well"
            return reached

    interrupted_at_every_point(act, 60)


def test_a_comparing_get_interrupted_anywhere_loses_nothing(area: Area) -> None:
    def act(step: int) -> bool:
        with dirtylog.track(area.octets, port="compare") as log:
            area.store(*STORED)
            out = DirtyBitmap(NPAGES)
            reached = interrupt(lambda: log.get(0, out), step)
            assert set((log.get(0) | out).pages().tolist()) == STORED, f"interrupted at point {step}"
            area.store(*STORED)
            assert written(log) == STORED
            return reached

    interrupted_at_every_point(act, 30)


# --- a start


@pytest.mark.usefixtures("_how")
@pytest.mark.parametrize("port", ["uffd", "compare"])
def test_a_start_interrupted_anywhere_leaves_nothing_in_the_way_of_the_next(area: Area, port: str) -> None:
    def act(step: int) -> bool:
        log = DirtyLog(BufferMemory(area.octets, port=port))
        reached = interrupt(log.start, step)
        log.close()
        with dirtylog.track(area.octets, port=port) as log:
            assert written(log) == set(), f"interrupted at point {step}"
            area.store(*STORED)
            assert written(log) == STORED, f"interrupted at point {step}"
        return reached

    interrupted_at_every_point(act, 20)


def test_a_start_interrupted_anywhere_takes_nothing_from_a_log_of_the_same_memory(area: Area) -> None:
    def act(step: int) -> bool:
        with watched(area) as log:
            area.store(*STORED)
            other = DirtyLog(BufferMemory(area.octets, port="uffd"))
            reached = interrupt(other.start, step)
            area.store(5)
            other.close()
            assert written(log) >= STORED | {5}, f"interrupted at point {step}"
            area.store(6)
            assert written(log) == {6}, f"interrupted at point {step}"
        return reached

    interrupted_at_every_point(act, 40)


def test_a_probe_interrupted_anywhere_passes_the_interrupt_on() -> None:
    """The first start of a process tries out what the kernel does. An error of its own would hide the Ctrl-C."""
    probe = sees_discarded_tables.__wrapped__
    interrupted_at_every_point(lambda step: interrupt(probe, step), 30)


# --- a stop


def test_a_stop_interrupted_anywhere_leaves_nothing_in_the_way_of_the_next_log(area: Area) -> None:
    def act(step: int) -> bool:
        log = watched(area)
        reached = interrupt(log.close, step)
        log.close()
        with watched(area) as other:
            area.store(*STORED)
            assert written(other) == STORED, f"interrupted at point {step}"
        return reached

    interrupted_at_every_point(act, 20)


def test_a_stop_interrupted_anywhere_lets_go_of_everything_when_it_is_called_again(area: Area) -> None:
    held = []
    for step in itertools.count():
        with port_of_its_own() as port:
            log = watched(area)
            reached = interrupt(log.close, step)
            log.close()
            if port.descriptors():
                held.append(step)
        if not reached:
            break
    assert not held, "interrupted at these points: a userfaultfd stays open, and the memory registered"


def test_a_stop_interrupted_anywhere_takes_nothing_from_a_log_of_the_same_memory(area: Area) -> None:
    def act(step: int) -> bool:
        with watched(area) as log:
            other = watched(area)
            area.store(*STORED)
            reached = interrupt(other.close, step)
            area.store(5)
            other.close()
            assert written(log) == STORED | {5}, f"interrupted at point {step}"
            area.store(6)
            assert written(log) == {6}, f"interrupted at point {step}"
        return reached

    interrupted_at_every_point(act, 20)


def test_a_log_whose_stop_was_interrupted_starts_again(area: Area) -> None:
    def act(step: int) -> bool:
        with watched(area) as log:
            consumer = log.consumer("copy")
            reached = interrupt(log.stop, step)
            log.stop()
            area.store(5)
            log.start()
            area.store(6)
            assert written(log) >= {6}, f"interrupted at point {step}"
            area.store(7)
            assert written(log) == {7}, f"interrupted at point {step}"
            with consumer.epoch() as epoch:
                assert epoch.dirty[0].count() == NPAGES, "nobody saw what came between"
        return reached

    interrupted_at_every_point(act, 20)

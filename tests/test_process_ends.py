"""A process that executes another program, changes in the middle of an update, or ends."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

import pytest

import dirtylog
from address_space import ANONYMOUS, HUGE, HUGETLB, NORESERVE, PAGE, PRIVATE, SHARED
from built import built
from dirtylog.linux import process
from dirtylog.linux.process import ProcessMemory
from dirtylog.linux.process_port import ProcessPort
from puppets import MOMENTS, Puppet, follow, gets, in_the_middle, logged, slot_at
from victims import needs_victims

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_victims

NPAGES = 64
EVERYTHING = set(range(NPAGES))


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    with Puppet() as started:
        yield started


def filled(puppet: Puppet) -> int:
    address = puppet.map(NPAGES)
    puppet.fill(address, NPAGES)
    return address


def executes(puppet: Puppet) -> None:
    puppet.say(f"execute {built('puppet.c')}")
    puppet.wait_until_ready()


# --- another program


def test_another_program_is_followed(puppet: Puppet) -> None:
    with logged(puppet) as (memory, log):
        consumer = log.consumer("copy")
        for number in range(1, 4):
            address = filled(puppet)
            assert follow(log).at(address, NPAGES) == EVERYTHING
            with consumer.epoch():
                pass
            old = set(memory.slots)
            executes(puppet)
            new = filled(puppet)
            assert follow(log).at(new, NPAGES) == EVERYTHING
            assert memory.stats.programs == number + 1
            assert not old & set(memory.slots), "all that it has is new"
            with consumer.epoch() as epoch:
                assert set(epoch.dirty) == {slot.id for slot in memory.slots}
                assert epoch.dirty[slot_at(memory, new).id].count() >= NPAGES
            puppet.store(new, [3])
            assert follow(log).at(new, NPAGES) == {3}
            assert memory.incomplete == ()


def test_gets_between_the_execution_and_the_update(puppet: Puppet) -> None:
    with logged(puppet) as (_, log):
        follow(log)
        executes(puppet)
        gets(log)
        address = filled(puppet)
        assert follow(log).at(address, NPAGES) == EVERYTHING


@pytest.mark.parametrize("moment", MOMENTS)
def test_another_program_in_the_middle_of_an_update(puppet: Puppet, moment: str) -> None:
    with logged(puppet) as (memory, log):
        puppet.map(NPAGES, PRIVATE | ANONYMOUS | NORESERVE)
        puppet.map(NPAGES, SHARED | ANONYMOUS)
        with in_the_middle(memory, moment, lambda: executes(puppet)):
            log.update()
        gets(log)
        address = filled(puppet)
        assert follow(log).at(address, NPAGES) == EVERYTHING
        assert memory.stats.programs == 2


def test_another_program_between_open_and_start(puppet: Puppet) -> None:
    with dirtylog.open(f"pid:{puppet.pid}", port="uffd") as memory:
        executes(puppet)
        with dirtylog.DirtyLog(memory) as log:
            address = filled(puppet)
            assert follow(log).at(address, NPAGES) == EVERYTHING


def test_one_program_after_the_other() -> None:
    """A shell that executes itself, over and over, and is waiting for a child of vfork when it is looked at."""
    script = '/bin/sleep 0.02; if [ "$1" -gt 0 ]; then exec sh -c "$0" "$0" $(( $1 - 1 )); fi; exec sleep 60'
    with subprocess.Popen(["sh", "-c", script, script, "100"]) as shell:
        try:
            with opened_in_time(shell.pid) as memory, dirtylog.DirtyLog(memory) as log:
                deadline = time.monotonic() + 20
                while memory.stats.programs < 30:
                    follow(log)
                    time.sleep(0.001)
                    assert time.monotonic() < deadline, memory.stats
        finally:
            shell.kill()


def opened_in_time(pid: int) -> ProcessMemory:
    """Open a process that at some moments cannot be."""
    for _ in range(200):
        try:
            memory = dirtylog.open(f"pid:{pid}", port="uffd")
        except dirtylog.UnsupportedError:
            time.sleep(0.005)
        else:
            assert isinstance(memory, ProcessMemory)
            return memory
    raise AssertionError


def test_another_program_while_the_one_before_is_still_ending(puppet: Puppet, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a moment there is no address space to be opened."""
    real, failures = process.Pagemap, [dirtylog.TargetGoneError("not yet", pid=puppet.pid)]  # type: ignore[attr-defined]  # the name that the module looks up

    def not_at_once(pid: int) -> object:
        if failures:
            raise failures.pop()
        return real(pid)

    with logged(puppet) as (memory, log):
        executes(puppet)
        monkeypatch.setattr(process, "Pagemap", not_at_once)
        address = filled(puppet)
        assert follow(log).at(address, NPAGES) == EVERYTHING
        assert memory.stats.programs == 2


# --- what changes in the middle of an update


def test_a_mapping_that_vanishes_is_no_gap(puppet: Puppet) -> None:
    with logged(puppet) as (memory, log):
        address = filled(puppet)
        with in_the_middle(memory, MOMENTS[0], lambda: puppet.unmap(address, NPAGES)):
            log.update()
        assert memory.incomplete == ()
        follow(log)


def test_a_mapping_that_vanishes_before_its_page_size_is_asked_for(puppet: Puppet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next mapping has huge pages."""
    try:
        huge = puppet.map(1, PRIVATE | ANONYMOUS | HUGETLB, page_size=HUGE)
    except OSError as error:
        pytest.skip(f"no huge pages are free: {error.strerror}")
    refuses, file = ProcessPort.refuses, puppet.memory_file(4)
    with logged(puppet) as (_, log):
        follow(log)
        address = huge - 4 * PAGE
        puppet.map(4, SHARED, at=address, fd=file)

        def refuse_and_unmap(port: ProcessPort, start: int, nbytes: int) -> object:
            error = refuses(port, start, nbytes)
            if start == address:
                puppet.unmap(address, 4)
            return error

        with monkeypatch.context() as patch:
            patch.setattr(ProcessPort, "refuses", refuse_and_unmap)
            log.update()
        assert follow(log).at(address, 4) in (set(), set(range(4)))


# --- its end


def test_a_process_that_has_ended_is_gone(puppet: Puppet) -> None:
    with logged(puppet) as (memory, log):
        address = filled(puppet)
        follow(log)
        slot = slot_at(memory, address)
        puppet.say("exit 3")
        assert puppet.wait() == 3
        for act in (
            log.update,
            lambda: log.get(slot.id),
            lambda: memory.read(slot.id, [0]),
            log.consumer("late").epoch().__enter__,
        ):
            with pytest.raises(dirtylog.TargetGoneError) as gone:
                act()
            assert gone.value.pid in (puppet.pid, None)


@pytest.mark.parametrize("moment", MOMENTS)
def test_it_ends_in_the_middle_of_an_update(puppet: Puppet, moment: str) -> None:
    with logged(puppet) as (memory, log):
        puppet.map(NPAGES, SHARED | ANONYMOUS)
        with in_the_middle(memory, moment, puppet.kill), pytest.raises(dirtylog.TargetGoneError):
            log.update()


def test_it_ends_when_it_seems_to_execute_another_program(puppet: Puppet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address space is gone, and a moment later so is its place in /proc."""

    def end(_: process.Pagemap) -> bool:  # type: ignore[name-defined]  # a test reaches inside
        puppet.kill()
        return False

    with logged(puppet) as (_, log):
        monkeypatch.setattr(process.Pagemap, "alive", end)  # type: ignore[attr-defined]  # the name that the module looks up
        with pytest.raises(dirtylog.TargetGoneError):
            log.update()


def test_it_ends_between_open_and_start(puppet: Puppet) -> None:
    with dirtylog.open(f"pid:{puppet.pid}", port="uffd") as memory:
        puppet.kill()
        with pytest.raises(dirtylog.TargetGoneError), dirtylog.DirtyLog(memory):
            pass


def test_a_process_that_has_ended_cannot_be_opened(puppet: Puppet) -> None:
    puppet.kill()
    with pytest.raises(dirtylog.TargetGoneError):
        dirtylog.open(f"pid:{puppet.pid}")


def test_its_first_thread_ends_before_the_others(puppet: Puppet) -> None:
    """The kernel then shows no mappings of it any more, and yet it lives and writes: that must not pass for quiet."""
    address = filled(puppet)
    with logged(puppet) as (_, log):
        follow(log)
        assert puppet.order("leave 0 0 0") == 0
        puppet.store(address, [5])
        try:
            reported = follow(log).at(address, NPAGES)
        except dirtylog.DirtyLogError:
            return
        assert reported == {5}

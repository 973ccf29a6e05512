"""The contents of another process, read and written; its pauses; and consumers while its slots come and go."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import dirtylog
from address_space import ANONYMOUS, NONE, PAGE, PRIVATE, READ, SHARED, WRITE
from puppets import Puppet, follow, logged, slot_at
from victims import needs_victims, state_of, tracer_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dirtylog import DirtyLog, MemorySlot
    from dirtylog.linux.process import ProcessMemory

pytestmark = needs_victims

NPAGES = 64
EVERYTHING = set(range(NPAGES))


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    with Puppet() as started:
        yield started


@pytest.fixture
def opened(puppet: Puppet) -> Iterator[tuple[ProcessMemory, DirtyLog]]:
    with logged(puppet) as both:
        follow(both[1])
        yield both


@pytest.fixture
def memory(opened: tuple[ProcessMemory, DirtyLog]) -> ProcessMemory:
    return opened[0]


@pytest.fixture
def log(opened: tuple[ProcessMemory, DirtyLog]) -> DirtyLog:
    return opened[1]


def filled(puppet: Puppet, flags: int = PRIVATE | ANONYMOUS) -> int:
    """Map pages apart from all others, the number of each on it."""
    # Shared ones on both sides keep a mapping from becoming one with its neighbours.
    fence = puppet.map(NPAGES + 2, SHARED | ANONYMOUS)
    address = puppet.map(NPAGES, flags, at=fence + PAGE)
    puppet.orders(*(f"fill {address + page * PAGE} 1 16 {page + 1}" for page in range(NPAGES)))
    return address


def new_slot(puppet: Puppet, memory: ProcessMemory, log: DirtyLog) -> tuple[int, MemorySlot]:
    address = filled(puppet)
    assert follow(log).at(address, NPAGES) == EVERYTHING
    slot = slot_at(memory, address)
    assert (slot.host_address, slot.npages) == (address, NPAGES)
    return address, slot


# --- reading


def test_contents_in_any_order(puppet: Puppet, memory: ProcessMemory, log: DirtyLog) -> None:
    _, slot = new_slot(puppet, memory, log)
    for pages in ([0], [63, 1, 2, 3, 7], list(range(NPAGES)), [5, 5], []):
        contents = memory.read(slot.id, pages)
        assert contents.shape == (len(pages), PAGE)
        assert contents[:, :16].tolist() == [[page + 1] * 16 for page in pages]
        assert not contents[:, 16:].any()
    out = np.full((2, PAGE), 9, np.uint8)
    assert memory.read(slot.id, [4, 60], out) is out
    assert out[:, 0].tolist() == [5, 61]
    assert follow(log).count() <= 3, "to read is not to write"


def test_what_is_not_mapped_reads_as_zeros(puppet: Puppet, memory: ProcessMemory, log: DirtyLog) -> None:
    address, slot = new_slot(puppet, memory, log)
    puppet.unmap(address + 10 * PAGE, 5)
    contents = memory.read(slot.id, range(NPAGES))
    assert contents[:, 0].tolist() == [0 if 10 <= page < 15 else page + 1 for page in range(NPAGES)]
    puppet.unmap(address, NPAGES)
    out = np.full((NPAGES, PAGE), 9, np.uint8)
    assert not memory.read(slot.id, range(NPAGES), out).any()
    follow(log)
    with pytest.raises(dirtylog.LoggingOffError):
        memory.read(slot.id, [0])


def test_what_it_may_not_read_itself_can_be_read(puppet: Puppet, memory: ProcessMemory, log: DirtyLog) -> None:
    address, slot = new_slot(puppet, memory, log)
    puppet.protect(address, NPAGES, NONE)
    assert memory.read(slot.id, range(NPAGES))[:, 0].tolist() == list(range(1, NPAGES + 1))


def test_a_large_hole_is_read_soon(puppet: Puppet, memory: ProcessMemory, log: DirtyLog) -> None:
    """A program that gives a quarter of a gigabyte back must not stop whoever copies it."""
    npages = (256 << 20) // PAGE
    address = puppet.map(npages + 2)
    puppet.store(address, [0, npages + 1])
    follow(log)
    slot = slot_at(memory, address)
    puppet.unmap(address + PAGE, npages)
    pages = (address - slot.host_address) // PAGE + 1 + np.arange(npages)
    began = time.perf_counter()
    assert not memory.read(slot.id, pages).any()
    assert time.perf_counter() - began < 1.0


# --- writing


@pytest.mark.parametrize("protection", [READ | WRITE, READ, NONE])
def test_what_is_written_from_outside_is_logged(puppet: Puppet, memory: ProcessMemory, log: DirtyLog, protection: int) -> None:
    address, slot = new_slot(puppet, memory, log)
    puppet.protect(address, NPAGES, protection)
    data = np.full((3, PAGE), 0xAA, np.uint8)
    memory.write(slot.id, [1, 2, 40], data)
    assert follow(log).at(address, NPAGES) == {1, 2, 40}
    assert (memory.read(slot.id, [1, 2, 40]) == 0xAA).all()
    puppet.protect(address, NPAGES, READ)
    assert puppet.peek(address + 40 * PAGE, 2) == b"\xaa\xaa"
    with pytest.raises(dirtylog.InvalidArgumentError):
        memory.write(slot.id, [1], data)
    assert follow(log).at(address, NPAGES) == set()


def test_text_that_is_written_is_logged(puppet: Puppet, memory: ProcessMemory, log: DirtyLog) -> None:  # noqa: ARG001 - it runs
    """As a debugger sets a breakpoint."""
    slot = next(slot for slot in memory.slots if slot.permissions == "r-xp" and slot.name.endswith("puppet"))
    contents = memory.read(slot.id, [0])
    memory.write(slot.id, [0], contents)
    assert follow(log).at(slot.host_address, slot.npages) == {0}


def test_what_is_not_mapped_cannot_be_written(puppet: Puppet, memory: ProcessMemory, log: DirtyLog) -> None:
    address, slot = new_slot(puppet, memory, log)
    puppet.unmap(address + 10 * PAGE, 5)
    with pytest.raises(dirtylog.DirtyLogError, match="cannot be written"):
        memory.write(slot.id, [12], np.ones((1, PAGE), np.uint8))


# --- pauses


def test_nothing_changes_in_a_pause(puppet: Puppet, memory: ProcessMemory, log: DirtyLog) -> None:
    address, slot = new_slot(puppet, memory, log)
    for _ in range(3):
        puppet.order(f"thread {address} {PAGE} {NPAGES}")
    for _ in range(10):
        assert follow(log).at(address, NPAGES)
        memory.pause()
        memory.pause()
        follow(log)
        contents = memory.read(slot.id, range(NPAGES))
        time.sleep(0.01)
        assert follow(log).at(address, NPAGES) == set()
        assert (memory.read(slot.id, range(NPAGES)) == contents).all()
        memory.resume()
        memory.resume()
        time.sleep(0.002)
    assert tracer_of(puppet.pid) == 0
    puppet.order("quiet 0 0 0")


def test_a_close_ends_a_pause(puppet: Puppet) -> None:
    with logged(puppet) as (memory, log):
        follow(log)
        memory.pause()
        assert state_of(puppet.pid) == "t"
    assert state_of(puppet.pid) in "RS"
    assert puppet.call(39) == puppet.pid


def test_a_process_that_is_killed_in_a_pause(puppet: Puppet) -> None:
    with logged(puppet) as (memory, log):
        memory.pause()
        os.kill(puppet.pid, 9)
        with pytest.raises(dirtylog.TargetGoneError):
            for _ in range(1000):
                log.update()
                time.sleep(0.001)
        memory.resume()


# --- consumers


def test_a_consumer_sees_the_contents_of_a_new_slot_once(puppet: Puppet, memory: ProcessMemory, log: DirtyLog) -> None:
    first, second = log.consumer("first"), log.consumer("second")
    address, slot = new_slot(puppet, memory, log)
    with first.epoch() as epoch:
        assert set(epoch.dirty[slot.id].pages().tolist()) == EVERYTHING
    puppet.store(address, [3])
    with first.epoch() as epoch:
        assert epoch.dirty[slot.id].pages().tolist() == [3]
    with second.epoch() as epoch:
        assert set(epoch.dirty[slot.id].pages().tolist()) == EVERYTHING
    with first.epoch() as epoch:
        assert epoch.dirty[slot.id].count() == 0
    with log.consumer("late").epoch() as epoch:
        assert epoch.dirty[slot.id].count() == 0, "it begins with what nobody had taken"
    assert follow(log).at(address, NPAGES) == {3}, "get is one more reader"


def test_an_epoch_that_fails_is_rolled_back_over_a_change_of_slots(puppet: Puppet, memory: ProcessMemory, log: DirtyLog) -> None:
    consumer = log.consumer("copy")
    stays, kept = new_slot(puppet, memory, log)
    goes, lost = new_slot(puppet, memory, log)
    with pytest.raises(OSError, match="full"), consumer.epoch() as epoch:
        assert epoch.dirty[kept.id].count() == epoch.dirty[lost.id].count() == NPAGES
        puppet.unmap(goes, NPAGES)
        puppet.map(NPAGES, SHARED | ANONYMOUS, at=goes)
        log.update()
        raise OSError("full")
    puppet.store(stays, [1])
    with consumer.epoch() as epoch:
        assert epoch.dirty[kept.id].count() == NPAGES, "all of it again"
        assert lost.id not in epoch.dirty, "it is gone"
        assert epoch.dirty[slot_at(memory, goes).id].count() == NPAGES, "and what is in its place is new"
    with consumer.epoch() as epoch:
        assert epoch.dirty[kept.id].count() == 0


def test_a_slot_that_comes_and_goes_between_two_epochs_is_never_seen(puppet: Puppet, memory: ProcessMemory, log: DirtyLog) -> None:
    consumer = log.consumer("copy")
    with consumer.epoch():
        pass
    address, slot = new_slot(puppet, memory, log)
    puppet.unmap(address, NPAGES)
    with consumer.epoch() as epoch:
        assert slot.id not in epoch.dirty


def test_new_slots_of_an_epoch_that_fails_are_new_again(puppet: Puppet, memory: ProcessMemory, log: DirtyLog) -> None:
    consumer = log.consumer("copy")
    address = filled(puppet)
    for _ in range(3):
        with pytest.raises(OSError, match="full"), consumer.epoch() as epoch:
            assert epoch.dirty[slot_at(memory, address).id].count() == NPAGES
            raise OSError("full")
    with consumer.epoch() as epoch:
        assert epoch.dirty[slot_at(memory, address).id].count() == NPAGES

"""Slots that come, go and change between checkpoints: each checkpoint has those that there were, with what they held."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dirtylog
from address_space import MAYMOVE, PAGE
from dirtylog.checkpoint.restore import read_slot
from dirtylog.checkpoint.retention import Keep
from dirtylog.checkpoint.store import Store
from dirtylog.emulated.arch.arm64 import Arm64Port
from dirtylog.errors import InvalidArgumentError
from dirtylog.memslot import SlotFlags
from puppets import Puppet, logged
from scene import Scene
from victims import needs_victims

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from dirtylog.checkpoint.saver import Checkpointer
    from dirtylog.memory import Memory

_DONTNEED = 4
_BIG = 8 << 20


class Oracle:
    """What each slot held at each checkpoint, by where it lay."""

    def __init__(self, memory: Memory, checkpointer: Checkpointer) -> None:
        self._memory, self._checkpointer = memory, checkpointer
        self.held: dict[int, dict[tuple[int, int], NDArray[Any]]] = {}

    def save(self) -> int:
        """Save, of a memory that stands still meanwhile."""
        self._memory.pause()
        number = self._checkpointer.save().id
        self.held[number] = {
            (slot.base_gfn, slot.npages): self._memory.read(slot.id, np.arange(slot.npages))
            for slot in self._memory.slots
            if slot.nbytes < _BIG
        }
        self._memory.resume()
        return number

    def check(self, path: Path) -> None:
        with Store(path) as store:
            for checkpoint in store.checkpoints():
                held = self.held[checkpoint.id]
                maps = store.maps(checkpoint.id)
                slots = {(slot.base_gfn, slot.npages): slot for slot in checkpoint.slots if slot.nbytes < _BIG}
                assert slots.keys() == held.keys()
                for where, slot in slots.items():
                    out = np.full((slot.npages, slot.page_size), 0xEE, np.uint8)
                    read_slot(store, maps[slot.key], out)
                    assert np.array_equal(out, held[where]), f"{slot.label} of checkpoint {checkpoint.id}"


# --- a guest's


@contextmanager
def guest(path: Path) -> Iterator[tuple[Scene, Checkpointer, Oracle]]:
    scene = Scene(Arm64Port, npages=16)
    log = dirtylog.DirtyLog(scene.memory)
    with log, dirtylog.Checkpointer(log, path) as checkpointer:
        yield scene, checkpointer, Oracle(scene.memory, checkpointer)


@pytest.mark.parametrize("flags", [SlotFlags.LOG_DIRTY_PAGES, SlotFlags.NONE], ids=["logged", "never logged"])
def test_a_new_slot_is_saved_whole_and_one_that_is_gone_stays_in_the_old_ones(tmp_path: Path, flags: SlotFlags) -> None:
    path = tmp_path / "store"
    with guest(path) as (scene, checkpointer, oracle):
        scene.host_write(3)
        oracle.save()
        scene.memory.add_slot(7, 5000, 8, flags)
        scene.memory.write(7, [2, 5], np.full((2, PAGE), 9, np.uint8))
        oracle.save()
        scene.host_write(4)
        scene.memory.remove_slot(7)
        oracle.save()
        scene.memory.add_slot(7, 5000, 8, flags)
        scene.memory.write(7, [1], np.full((1, PAGE), 4, np.uint8))
        oracle.save()
        scene.memory.write(7, [3], np.full((1, PAGE), 5, np.uint8))
        oracle.save()
        assert [len(one.slots) for one in checkpointer.list()] == [1, 2, 1, 2, 2]
        oracle.check(path)
        with pytest.raises(InvalidArgumentError, match="slot 7"):
            scene.memory.remove_slot(7)
            checkpointer.restore(2)
        checkpointer.restore(3)
        checkpointer.prune(Keep(last=2))
    oracle.check(path)


def test_a_slot_that_went_and_came_back_between_two_checkpoints_is_another_one(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with guest(path) as (scene, checkpointer, oracle):
        scene.memory.add_slot(7, 5000, 8, SlotFlags.LOG_DIRTY_PAGES)
        scene.memory.write(7, np.arange(8), np.full((8, PAGE), 9, np.uint8))
        oracle.save()
        scene.memory.remove_slot(7)
        scene.memory.add_slot(7, 5000, 8, SlotFlags.LOG_DIRTY_PAGES)
        scene.memory.write(7, [1], np.full((1, PAGE), 4, np.uint8))
        oracle.save()
        assert checkpointer.verify() == []
    oracle.check(path)


# --- a process's


@pytest.fixture
def saved(tmp_path: Path) -> Iterator[tuple[Puppet, Memory, Checkpointer, Oracle]]:
    with Puppet() as puppet, logged(puppet) as (memory, log), dirtylog.Checkpointer(log, tmp_path / "store") as checkpointer:
        yield puppet, memory, checkpointer, Oracle(memory, checkpointer)


@needs_victims
def test_mappings_that_come_go_grow_and_are_replaced(tmp_path: Path, saved: tuple[Puppet, Memory, Checkpointer, Oracle]) -> None:
    puppet, _, checkpointer, oracle = saved
    area = puppet.map(32)
    puppet.fill(area, 32, 1)
    oracle.save()
    other = puppet.map(16)
    puppet.store(other, [3, 4], 2)
    oracle.save()
    puppet.unmap(area + 8 * PAGE, 8)
    oracle.save()
    # In its place, with other contents: nothing of the old ones is in it.
    puppet.unmap(other, 16)
    puppet.map(16, at=other)
    puppet.store(other, [9], 3)
    oracle.save()
    puppet.map(16, at=other)
    oracle.save()
    puppet.remap(area, 8, 64, MAYMOVE)
    oracle.save()
    assert checkpointer.verify() == []
    checkpointer.prune(Keep(last=3))
    oracle.check(tmp_path / "store")


@needs_victims
def test_pages_that_are_given_up_are_zero_in_the_next_checkpoint(
    tmp_path: Path, saved: tuple[Puppet, Memory, Checkpointer, Oracle]
) -> None:
    puppet, _, _, oracle = saved
    area = puppet.map(32)
    puppet.fill(area, 32, 1)
    oracle.save()
    puppet.advise(area + 4 * PAGE, 6, _DONTNEED)
    oracle.save()
    puppet.store(area, [5], 7)
    oracle.save()
    oracle.check(tmp_path / "store")


@needs_victims
@pytest.mark.parametrize("seed", range(3))
def test_random_mappings(tmp_path: Path, saved: tuple[Puppet, Memory, Checkpointer, Oracle], seed: int) -> None:
    puppet, _, checkpointer, oracle = saved
    random = np.random.default_rng(seed)
    areas = {puppet.map(16): 16}
    for _ in range(25):
        area = int(random.choice(list(areas)))
        match int(random.integers(6)):
            case 0:
                areas[puppet.map(16)] = 16
            case 1 if len(areas) > 1:
                puppet.unmap(area, areas.pop(area))
            case 2:
                puppet.map(areas[area], at=area)
            case 3:
                puppet.advise(area + PAGE, 4, _DONTNEED)
        for area, npages in areas.items():
            puppet.store(area, random.integers(0, npages, 2), int(random.integers(1, 250)))
        if random.integers(2):
            oracle.save()
        if random.random() < 0.1:
            checkpointer.prune(Keep(last=2))
    oracle.save()
    assert checkpointer.verify() == []
    oracle.check(tmp_path / "store")

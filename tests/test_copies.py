"""Who copies after each get what it reports has what the memory is, however that changes between the get and the copying.

What was there at the get may be there again at the next one, and yet something else was copied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

import dirtylog
from address_space import ANONYMOUS, DONTNEED, NORESERVE, PAGE, PRIVATE, SHARED, Area
from puppets import Puppet, logged, slot_at
from uffd_here import needs_uffd
from victims import needs_victims

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dirtylog import DirtyLog, MemorySlot
    from dirtylog.linux.process import ProcessMemory

GIB = 1 << 30
KNOWN = 5
"""The page that changes."""

SCENES = {
    # A store, another one that is copied, and the first one again.
    "stored": ("store 1", "store 2", "store 1"),
    "stored back to what it was": ("store 2", "store 1", "store 2"),
    "discarded": ("discard", "store 2", "discard"),
    "discarded twice": ("store 1", "discard", "store 1"),
}
every_scene = pytest.mark.parametrize("scene", SCENES)


def play(act: Callable[[str], None], get: Callable[[], bool], read: Callable[[], int], scene: str) -> int:
    """Return what the copy has in the end."""
    before, between, after = SCENES[scene]
    act("store 9")
    get()
    copied = read()
    for _ in range(3):
        for step, comes_between in ((before, between), (after, None)):
            act(step)
            if get():
                if comes_between:
                    act(comes_between)
                copied = read()
    return copied


@needs_uffd
@every_scene
@pytest.mark.parametrize("how", ["uffd", "sparse", "compare"])
def test_a_copy_of_a_buffer(how: str, scene: str) -> None:
    flags, npages = (PRIVATE | ANONYMOUS | NORESERVE, GIB // PAGE) if how == "sparse" else (PRIVATE | ANONYMOUS, 64)
    with Area.map(npages, flags) as area:
        area.advise(15)  # no huge pages: a store is to bring one page
        with dirtylog.track(area.octets, port="compare" if how == "compare" else "uffd") as log:

            def act(step: str) -> None:
                if step == "discard":
                    area.advise(DONTNEED, KNOWN, 1)
                else:
                    area.store(KNOWN, value=int(step.split()[1]))

            copied = play(act, lambda: KNOWN in log.get(0), lambda: int(log.memory.read(0, [KNOWN])[0, 0]), scene)
            assert copied == area[KNOWN]


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    with Puppet() as started:
        yield started


def dirty_at(memory: ProcessMemory, log: DirtyLog, address: int) -> bool:
    log.update()
    slot = slot_at(memory, address)
    return (address - slot.host_address) // PAGE in log.get(slot.id)


def read_at(memory: ProcessMemory, address: int) -> int:
    slot = slot_at(memory, address)
    return int(memory.read(slot.id, [(address - slot.host_address) // PAGE])[0, 0])


@needs_victims
@every_scene
@pytest.mark.parametrize("how", ["uffd", "sparse", "compare"])
def test_a_copy_of_another_process(puppet: Puppet, how: str, scene: str) -> None:
    flags, npages = (PRIVATE | ANONYMOUS | NORESERVE, GIB // PAGE) if how == "sparse" else (PRIVATE | ANONYMOUS, 64)
    address = puppet.map(npages, flags) + KNOWN * PAGE
    maps = [f"{address:#x}-{address + PAGE:#x}"]
    with logged(puppet, port="compare" if how == "compare" else "uffd", maps=maps) as (memory, log):

        def act(step: str) -> None:
            if step == "discard":
                puppet.advise(address, 1, DONTNEED)
            else:
                puppet.store(address, [0], int(step.split()[1]))

        copied = play(act, lambda: dirty_at(memory, log, address), lambda: read_at(memory, address), scene)
        assert copied == puppet.peek(address, 1)[0]


@needs_victims
@pytest.mark.parametrize("port", ["uffd", "compare"])
def test_a_copy_of_what_is_unmapped_and_mapped_again(puppet: Puppet, port: str) -> None:
    """Where no slot is, there is no copy either."""
    fence = puppet.map(66, SHARED | ANONYMOUS)
    area = puppet.map(64, at=fence + PAGE)
    address = area + KNOWN * PAGE
    with logged(puppet, port=port) as (memory, log):
        copies: dict[MemorySlot, int] = {}

        def map_again(value: int) -> None:
            puppet.map(2, at=address)
            puppet.fill(address, 2, value)

        def follow(between: Callable[[], None], before: Callable[[], None] = lambda: None) -> None:
            """Take a round, and have something happen before the get, or before the page is copied."""
            log.update()
            before()
            slot = next((slot for slot in memory.slots if slot.host_address <= address < slot.host_address + slot.nbytes), None)
            for gone in copies.keys() - {slot}:
                del copies[gone]
            dirty = slot is not None and (address - slot.host_address) // PAGE in log.get(slot.id)
            between()
            if slot is not None:
                copies.setdefault(slot, 0)
                if dirty:
                    copies[slot] = int(memory.read(slot.id, [(address - slot.host_address) // PAGE])[0, 0])

        puppet.fill(area, 64, 9)
        follow(lambda: None)
        assert list(copies.values()) == [9]
        for _ in range(3):
            puppet.unmap(address, 2)
            follow(lambda: map_again(7))
            puppet.unmap(address, 2)
            follow(lambda: None)
            assert list(copies.values()) in ([], [0]), "nothing is there"
            map_again(8)
            follow(lambda: puppet.unmap(address, 2))
            map_again(6)
            follow(lambda: None)
            assert list(copies.values()) == [6]
            puppet.unmap(address, 2)
            follow(lambda: None, before=lambda: map_again(5))
            follow(lambda: None)
            assert list(copies.values()) == [5]


@needs_uffd
@pytest.mark.parametrize("port", ["uffd", "compare"])
def test_a_copy_of_the_other_pages_is_not_touched(port: str) -> None:
    """What is copied comes from where it was asked for."""
    array = dirtylog.empty(64 * PAGE, np.uint8)
    array.reshape(64, PAGE)[:] = np.arange(64)[:, None]
    with dirtylog.track(array, port=port) as log:
        array[3 * PAGE] = 77
        assert log.get(0).pages().tolist() == [3]
        contents = log.memory.read(0, [63, 3, 4])
        assert contents[:, 1].tolist() == [63, 3, 4]
        assert contents[:, 0].tolist() == [63, 77, 4]

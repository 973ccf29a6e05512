"""Dirty rings and run pages, which are memory that user space can write: any entries, with any flags, slots and offsets.

Of a ring whose entries are anything at all, what is harvested are the pages that exist, and nothing else is touched; where it looks
as if the kernel had come round, every page is reported instead.
"""

from __future__ import annotations

import mmap
import random
import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dirtylog.kvm import abi
from dirtylog.kvm.exits import Exit, InternalError, IoAccess, MmioAccess, SystemEvent, answer_exit, decode_exit
from dirtylog.kvm.ring import DirtyRing
from ring_model import SIZE, RingScene
from test_fuzz_bounds import FUZZED, KIB, MIB, U16, U32, U64, bounded

if TYPE_CHECKING:
    from numpy.typing import NDArray

SMM = 1 << 16 | 2
SLOTS = {0: 451, 7: 65, SMM: 333}
Entry = tuple[int, int, int]
"""Flags, slot, offset."""

flags = st.sampled_from([1, 1, 1, 1, 2, 3, 1 << 31, 0xFFFF_FFFF, 0])
slots = st.sampled_from([*SLOTS, *SLOTS, 1, 8, 1 << 16, 0xFFFF_FFFF]) | U32
offsets = st.integers(0, 460) | st.sampled_from([(1 << 64) - 1, (1 << 64) - 64, 1 << 63, (1 << 63) - 1, 1 << 32]) | U64
entries = st.tuples(flags, slots, offsets)


def pages_of(found: list[Entry]) -> dict[int, set[int]]:
    """Return by slot the pages that exist of these entries."""
    return {slot: {offset for _, one, offset in found if one == slot and offset < npages} for slot, npages in SLOTS.items()}


@FUZZED
@given(
    before=st.integers(0, 190),
    found=st.lists(entries, max_size=190) | st.lists(st.tuples(st.just(1), slots, offsets), max_size=190),
    stale=st.lists(st.tuples(st.integers(195, 254), entries), max_size=4),
    last=st.sampled_from([0, 0, 0, 1, 2]),
)
@example(before=0, found=[(1, 0, (1 << 64) - 1), (2, 0, 3)], stale=[], last=0)
def test_only_pages_that_exist_are_reported(before: int, found: list[Entry], stale: list[tuple[int, Entry]], last: int) -> None:
    """A ring of 256 entries allocates 1 MiB at most, and everything is reported only where the kernel may have come round."""
    scene = RingScene(SLOTS)
    for page in range(before):
        scene.store(0, page)
    for slot in SLOTS:
        scene.get(slot)
    model = scene.vm.rings[0]
    for place, entry in stale:
        model.entries[(before + place) % SIZE] = entry
    for _, slot, offset in found:
        model.push(slot, offset)
    model.entries["flags"][(before + np.arange(len(found))) % SIZE] = [flag for flag, _, _ in found]
    model.entries["flags"][(before - 1) % SIZE] = last
    waiting = next((number for number, (flag, _, _) in enumerate(found) if not flag), len(found))
    overflows = scene.port.stats.overflows
    with bounded(MIB):
        reported = {slot: set(scene.log.get(slot).pages().tolist()) for slot in SLOTS}
    if last and waiting:
        assert reported == {slot: set(range(npages)) for slot, npages in SLOTS.items()}
    else:
        assert reported == pages_of(found[:waiting])
    assert (scene.port.stats.overflows > overflows) == bool(last and waiting)


@FUZZED
@given(seed=st.integers(0, 1 << 32), start=st.integers(0, 3 * SIZE), free=st.integers(0, 3))
def test_any_memory_is_a_ring_and_stays_as_it_is_but_for_flags(seed: int, start: int, free: int) -> None:
    generator = random.Random(seed)
    octets = bytearray(generator.randbytes(SIZE * abi.DIRTY_GFN.itemsize))
    memory: NDArray[np.void] = np.frombuffer(octets, abi.DIRTY_GFN)
    for _ in range(free):
        memory["flags"][generator.randrange(SIZE)] = 0
    before = memory.copy()
    ring = DirtyRing(memory)
    ring.next = start
    ahead = [before[(start + number) % SIZE] for number in range(SIZE)]
    in_row = next((number for number, entry in enumerate(ahead) if not entry["flags"]), SIZE)
    used = max((number + 1 for number, entry in enumerate(ahead) if entry["flags"]), default=0)
    with bounded(256 * KIB):
        assert ring.waiting() == in_row
        assert ring.in_use() == used
        assert ring.came_round() == bool(ahead[-1]["flags"])
        assert ring.ahead(in_row).tolist() == [entry.tolist() for entry in ahead[:in_row]]
        ring.give(in_row)
    assert np.array_equal(memory[["slot", "offset"]], before[["slot", "offset"]])
    given_back = {(start + number) % SIZE for number in range(in_row)}
    assert [int(flag) for flag in memory["flags"]] == [
        2 if place in given_back else int(before["flags"][place]) for place in range(SIZE)
    ]


@pytest.mark.parametrize("distinct", [1, 100, 4096])
def test_a_ring_of_slots_that_are_not_there_is_harvested_in_bounded_time(distinct: int) -> None:
    """It takes one pass for each slot number of a piece: 4096 entries of as many slots take 2 seconds of CPU at the very most."""
    scene = RingScene(SLOTS, size=8192)
    for number in range(4096):
        scene.vm.rings[0].push(100 + number % distinct, number << 40)
    with bounded(2 * MIB, seconds=2.0):
        scene.collect()
    assert not scene.log.get(0).any()
    assert scene.port.stats.harvested == 4096


# --- run pages

RUN_BYTES = 3 * 4096
EXIT = 32
reasons = st.sampled_from([0, 2, 5, 6, 8, 9, 10, 17, 24, 31]) | U32


def run_page(reason: int, payload: bytes) -> mmap.mmap:
    """Return a run page with an exit in it."""
    page = mmap.mmap(-1, RUN_BYTES)
    page[8:12] = struct.pack("=I", reason)
    page[EXIT : EXIT + len(payload)] = payload
    return page


payloads = st.binary(max_size=200) | st.builds(
    lambda direction, size, port, count, at: struct.pack("=BBHIQ", direction, size, port, count, at),
    *(st.integers(0, 255), st.integers(0, 255), U16, U32, U64),
)


@FUZZED
@given(reason=reasons, payload=payloads)
def test_any_run_page_is_an_exit(reason: int, payload: bytes) -> None:
    """Whatever its numbers say, data is never longer than the page, nor a list of numbers longer than its field."""
    with run_page(reason, payload) as page, bounded(RUN_BYTES + 16 * KIB):
        found = decode_exit(page, reason)
    assert isinstance(found, Exit)
    if isinstance(found, IoAccess):
        assert len(found.data) <= min(RUN_BYTES, found.size * found.count)
    if isinstance(found, MmioAccess):
        assert len(found.data) <= 8
    if isinstance(found, InternalError | SystemEvent):
        assert len(found.data) <= 16


@FUZZED
@given(size=st.sampled_from([1, 2, 4]), count=st.integers(1, 1024), offset=st.integers(4096, 8192), data=st.binary(max_size=8192))
def test_an_answer_goes_where_the_guest_reads_it_and_nowhere_else(size: int, count: int, offset: int, data: bytes) -> None:
    with run_page(2, struct.pack("=BBHIQ", 0, size, 0x60, count, offset)) as page:
        before = page[:]
        access = decode_exit(page, 2)
        assert isinstance(access, IoAccess)
        with bounded(2 * RUN_BYTES + 16 * KIB):
            answer_exit(page, access, data)
        nbytes = size * count
        assert page[:] == before[:offset] + data[:nbytes].ljust(nbytes, b"\0") + before[offset + nbytes :]

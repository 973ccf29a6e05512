"""The same for watched memory: what is left after an error, what is there, what is pinned, what a program executed inherits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from address_space import HUGE, PAGE, Area
from dirtylog import DirtyBitmap, DirtyLogError, MemorySlot
from dirtylog.linux import abi
from dirtylog.linux.buffer_port import BufferPort
from dirtylog.linux.process_port import ProcessPort
from dirtylog.linux.process_slots import _words
from dirtylog.linux.watch import Watch
from dirtylog.slotbitmap import SlotBitmap
from dirtylog.words import words_of_pages
from uffd_here import needs_uffd, port_of_its_own, watched, written

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

pytestmark = needs_uffd

NPAGES = 64


@pytest.fixture(autouse=True)
def _own_port() -> Iterator[None]:
    with port_of_its_own():
        yield


def slot_of(npages: int, page_size: int = PAGE) -> MemorySlot:
    """Return a logged slot from address 1 GiB on."""
    start = 1 << 30
    slot = MemorySlot(0, start // page_size, npages, page_size, host_address=start, anonymous=True)
    slot.dirty_bitmap = SlotBitmap(npages)
    return slot


def watch_of(slot: MemorySlot) -> Watch:
    return Watch(slot, slot.host_address, slot.host_address + slot.nbytes, slot.page_size.bit_length() - 1)


def regions(slot: MemorySlot, *spans: tuple[int, int]) -> NDArray[np.void]:
    """Return regions of a slot, from the bytes of its that they cover."""
    return np.array([(slot.host_address + start, slot.host_address + end, 0) for start, end in spans], abi.PAGE_REGION)


def dirty(slot: MemorySlot) -> set[int]:
    assert slot.dirty_bitmap is not None
    return set(slot.dirty_bitmap.read().pages().tolist())


def test_after_an_error_nothing_is_reported_that_was_delivered_before() -> None:
    with Area.map(NPAGES) as area, Area.map(NPAGES) as other, watched(area) as log, watched(other) as other_log:
        area.store(3, 9)
        assert written(log) == {3, 9}
        other.map_again(4, 4)
        assert written(other_log) >= {4, 5, 6, 7}
        assert written(log) == set()


def test_a_region_that_ends_in_a_page_has_that_page() -> None:
    slot = slot_of(4, HUGE)
    watch_of(slot).deliver(regions(slot, (HUGE, HUGE + PAGE), (2 * HUGE + PAGE, 3 * HUGE + PAGE)))
    assert dirty(slot) == {1, 2, 3}


def test_a_span_of_addresses_has_each_page_that_it_touches() -> None:
    slot = slot_of(10)
    start = slot.host_address
    spans = [(start + 1, start + 2), (start + 3 * PAGE - 1, start + 3 * PAGE + 1), (start + 9 * PAGE, start + 10 * PAGE)]
    assert _words(slot, spans).pages().tolist() == [0, 2, 3, 9]


def test_a_page_is_known_to_be_there_before_its_bit_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt between the two may report it twice; the other way round it would not be missed when it goes."""
    slot = slot_of(10)
    watch = watch_of(slot)
    watch.populated = DirtyBitmap(10)

    def interrupted(_self: SlotBitmap, _words: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SlotBitmap, "merge", interrupted)
        with pytest.raises(KeyboardInterrupt):
            watch.deliver(regions(slot, (3 * PAGE, 5 * PAGE)))
    assert set(watch.populated.pages().tolist()) == {3, 4}


def test_what_is_pinned_is_reported_by_each_get() -> None:
    with Area.map(NPAGES) as area, watched(area) as log:
        port = log.memory.port
        assert isinstance(port, BufferPort)
        port.always[log.memory.slots[0]] = words_of_pages(np.array([5, 6]))
        assert [written(log) for _ in range(3)] == [{5, 6}] * 3


def test_what_cannot_be_armed_counts_as_written() -> None:
    """Of a process whose mapping went, or is another, just when it was to be armed."""
    slot = slot_of(10)

    def attach() -> Any:
        raise AssertionError

    alive = list[None]()
    ProcessPort(attach, lambda: alive.append(None))._cannot_arm(watch_of(slot), DirtyLogError("it has gone"))
    assert alive == [None], "unless the process has ended, which is asked first"
    assert dirty(slot) == set(range(10))


def test_a_program_that_is_executed_has_no_descriptor_of_a_log() -> None:
    with Area.map(NPAGES) as area, watched(area):
        names = {int(entry.name): str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()}
        ours = [fd for fd, name in names.items() if name.endswith("/pagemap") or "userfaultfd" in name]
        assert len(ours) >= 2
        assert not any(os.get_inheritable(fd) for fd in ours)

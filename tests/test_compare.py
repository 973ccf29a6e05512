"""Comparing with a copy: step by step on a model, then on buffers and processes whose writers run all the time."""

from __future__ import annotations

import itertools
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dirtylog
from address_space import DONTNEED, NORESERVE, PAGE, Area
from agented import WITHOUT_AGENT, Agented, written
from dirtylog import DirtyBitmap, DirtyLog, Exactness, TargetGoneError, UnsupportedError
from dirtylog.compare import ComparePort
from interrupts import interrupt
from launches import get_all
from model_memory import ModelMemory
from writers import ARENA_MAP, NPAGES, Writer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dirtylog import MemorySlot
    from dirtylog.linux.process import ProcessMemory

PIECE = 128
"""Pages that are compared at once."""


class Contents:
    """Memory of a model, and what happens to it while it is being read: ``meanwhile`` is called after each piece."""

    def __init__(self, npages: int = 3 * PIECE + 5, page_size: int = PAGE) -> None:
        self.pages = np.zeros((npages, page_size), np.uint8)
        self.port = ComparePort(self.read)
        self.log = DirtyLog(ModelMemory(self.port, [(0, 0, npages)], page_size))  # type: ignore[arg-type]  # all that is used
        self.meanwhile: Any = lambda _first: None

    def read(self, slot: MemorySlot, first: int, out: np.ndarray[Any, Any]) -> None:
        assert slot.id == 0
        out[:] = self.pages[first : first + len(out)]
        self.meanwhile(first)

    def store(self, *pages: int, offset: int = 0) -> set[int]:
        for page in pages:
            self.pages[page, offset] += 1
        return set(pages)

    def get(self) -> set[int]:
        return set(self.log.get(0).pages().tolist())

    def compared(self) -> np.ndarray[Any, Any]:
        found = self.port.compared(self.log.memory.slots[0])
        assert found is not None
        return found


# --- step by step


def test_what_it_says_of_itself() -> None:
    assert ComparePort.exactness is Exactness.EXACT
    assert any("as they were" in blind for blind in ComparePort.blind_spots)


@pytest.mark.parametrize("npages", [1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 300])
def test_the_first_and_the_last_byte_of_each_page(npages: int) -> None:
    contents = Contents(npages)
    with contents.log:
        for offset in (0, 7, 8, 2048, PAGE - 1):
            for pages in (
                {0},
                {npages - 1},
                set(range(npages)),
                set(range(0, npages, 3)),
                {min(npages - 1, PIECE - 1), npages // 2},
            ):
                assert contents.get() == set()
                assert contents.store(*pages, offset=offset) == contents.get()
        assert contents.get() == set()


@pytest.mark.parametrize("page_size", [4096, 16384, 2 << 20])
def test_pages_of_other_sizes(page_size: int) -> None:
    contents = Contents(9, page_size)
    with contents.log:
        assert contents.store(0, 8, offset=page_size - 1) == contents.get()
        assert contents.store(3) == contents.get()


def test_a_page_that_is_back_to_what_it_was_is_not_reported() -> None:
    contents = Contents()
    with contents.log:
        contents.store(3)
        contents.pages[3] = 0
        contents.pages[4, 0] = 0
        assert contents.get() == set(), "as the blind spots say"


@pytest.mark.parametrize("when", range(4))
def test_a_store_in_the_middle_of_a_get_is_in_this_one_or_the_next(when: int) -> None:
    contents = Contents()
    with contents.log:
        for page in (0, PIECE - 1, PIECE, 3 * PIECE + 4):
            contents.meanwhile = lambda first, page=page: contents.store(page) if first == when * PIECE else None
            first = contents.get()
            contents.meanwhile = lambda _first: None
            assert first | contents.get() == {page}
            assert contents.get() == set()


def test_what_a_reader_copies_is_never_out_of_date_in_silence() -> None:
    """A page that changes between a get and the copy, and back before the next get: the copy must not have the middle."""
    contents = Contents()
    with contents.log:
        shadow = contents.compared().copy()
        contents.store(5)
        (page,) = contents.get()
        contents.pages[5, 0] = 77
        shadow[page] = contents.compared()[page]
        contents.pages[5, 0] = 1
        assert contents.get() == set()
        assert (shadow == contents.pages).all()


def test_what_was_compared_is_there_while_it_is_logged() -> None:
    contents = Contents()
    with contents.log:
        contents.store(5)
        assert contents.compared()[5, 0] == 0
        contents.get()
        assert contents.compared()[5, 0] == 1
    assert contents.port.compared(contents.log.memory.slots[0]) is None


def test_interrupted_anywhere_a_get_loses_nothing() -> None:
    stored = {0, PIECE - 1, PIECE, 3 * PIECE + 4}
    for step in itertools.count():
        contents = Contents()
        with contents.log:
            contents.store(*stored)
            out = DirtyBitmap(len(contents.pages))
            reached = interrupt(partial(contents.log.get, 0, out), step)
            assert set(out.pages().tolist()) | contents.get() == stored, f"interrupted at point {step}"
            contents.get()
            assert contents.store(2) == contents.get(), f"interrupted at point {step}"
        if not reached:
            break
    assert step > 20, "the points were not seen"


@pytest.mark.parametrize("what", ["start", "stop"])
def test_interrupted_anywhere_a_start_or_stop_can_be_made_again(what: str) -> None:
    for step in itertools.count():
        contents = Contents()
        log = contents.log
        if what == "stop":
            log.start()
        reached = interrupt(getattr(log, what), step)
        log.stop()
        log.start()
        assert contents.store(7) == contents.get(), f"interrupted at point {step}"
        log.stop()
        if not reached:
            break
    assert step > 5, "the points were not seen"


def test_a_read_that_fails_loses_nothing() -> None:
    contents = Contents()

    def fail(first: int) -> None:
        if first == 2 * PIECE:
            raise TargetGoneError("gone")

    with contents.log:
        stored = contents.store(1, PIECE + 1, 2 * PIECE + 1, 3 * PIECE)
        contents.meanwhile = fail
        with pytest.raises(TargetGoneError):
            contents.get()
        contents.meanwhile = lambda _first: None
        assert contents.get() == stored


def test_consumers_get_each_change_once() -> None:
    contents = Contents()
    with contents.log:
        first, second = contents.log.consumer("first"), contents.log.consumer("second")
        contents.store(1, 200)
        with first.epoch() as epoch:
            assert [dirty.pages().tolist() for dirty in epoch.dirty.values()] == [[1, 200]]
        contents.store(2)
        with second.epoch() as epoch:
            assert [dirty.pages().tolist() for dirty in epoch.dirty.values()] == [[1, 2, 200]]
        with first.epoch() as epoch:
            assert [dirty.pages().tolist() for dirty in epoch.dirty.values()] == [[2]]


# --- too large


def test_a_slot_without_room_for_a_copy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dirtylog.compare.host_memory", lambda: 1 << 30)
    port = Contents().port
    assert port.refuses(0, 1 << 29) is None
    refusal = port.refuses(0, (1 << 29) + PAGE)
    assert isinstance(refusal, UnsupportedError)
    assert refusal.reason is not None
    assert str(1 << 30) in refusal.reason


def test_a_huge_and_empty_buffer_is_refused() -> None:
    with Area.map(1 << 28, NORESERVE | 0x22) as area, pytest.raises(UnsupportedError, match="room for a copy"):
        dirtylog.track(area.octets, port="compare")


def test_a_process_with_a_huge_and_empty_mapping_is_logged_without_it() -> None:
    with Agented(WITHOUT_AGENT) as target:
        target.order("huge = mmap.mmap(-1, 1 << 40, flags=0x4022)")
        with dirtylog.open(f"pid:{target.pid}", port="compare") as memory, DirtyLog(memory) as log:
            assert any("room for a copy" in gap for gap in memory.incomplete)
            target.order("store(7)")
            assert written(log, target) == {7}


def test_memory_that_may_not_be_touched_costs_little() -> None:
    """The C library reserves 64 MiB without any permissions for each thread that allocates."""
    with Agented(WITHOUT_AGENT) as target:
        target.order("nothing = mmap.mmap(-1, 256 << 20, prot=0, flags=0x4022)")
        with dirtylog.open(f"pid:{target.pid}", port="compare") as memory, DirtyLog(memory) as log:
            began = time.monotonic()
            log.update()
            for slot in memory.slots:
                log.get(slot.id)
            assert time.monotonic() - began < 2


# --- with writers that run


@pytest.mark.parametrize("values", [2, 200])
def test_a_shadow_of_a_buffer_that_is_written_all_the_time(values: int) -> None:
    """With two values a page is often back to what it was."""
    buffer = dirtylog.empty((NPAGES, PAGE), np.uint8)
    over = threading.Event()

    def write(seed: int) -> None:
        random = np.random.default_rng(seed)
        while not over.is_set():
            pages, value = random.integers(0, NPAGES, 40), random.integers(0, values)
            buffer[pages, random.integers(0, PAGE)] = value

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(3)]
    with dirtylog.track(buffer, port="compare") as log:
        shadow = log.memory.read(0, np.arange(NPAGES))
        for thread in threads:
            thread.start()
        began = time.monotonic()
        while time.monotonic() - began < 2:
            pages = log.get(0).pages()
            shadow[pages] = log.memory.read(0, pages)
        over.set()
        for thread in threads:
            thread.join()
        pages = log.get(0).pages()
        shadow[pages] = log.memory.read(0, pages)
        assert (shadow == buffer).all()
        assert log.get(0).count() == 0


@pytest.fixture
def target() -> Iterator[Writer]:
    with Writer() as running:
        yield running


def opened(target: Writer, *maps: str) -> ProcessMemory:
    memory: Any = dirtylog.open(f"pid:{target.pid}", port="compare", maps=maps or None)
    return memory  # type: ignore[no-any-return]  # it is one


def test_of_a_process_each_write_is_reported_once(target: Writer) -> None:
    with opened(target) as memory, DirtyLog(memory) as log:
        for pages in ({3}, {0, 4, 255}, set(range(NPAGES))):
            target.order(f"store {' '.join(map(str, pages))}")
            assert get_all(log) == pages
            assert get_all(log) == set()
        target.order("store 5 " * 256)
        assert get_all(log) == set(), "it is back to what it was: the blind spot"


def test_a_shadow_of_a_process_that_is_written_all_the_time() -> None:
    spun = [str(page) for page in range(0, NPAGES, 2)]
    with (
        Writer("spin", *spun, "spin", *reversed(spun), "spin", "1", "3") as running,
        opened(running, ARENA_MAP) as memory,
        DirtyLog(memory) as log,
    ):
        (slot,) = memory.slots
        shadow = memory.read(slot.id, np.arange(NPAGES))
        began = time.monotonic()
        while time.monotonic() - began < 2:
            pages = log.get(slot.id).pages()
            shadow[pages] = memory.read(slot.id, pages)
        memory.pause()
        pages = log.get(slot.id).pages()
        shadow[pages] = memory.read(slot.id, pages)
        assert log.get(slot.id).count() == 0
        log.stop()
        assert (shadow == memory.read(slot.id, np.arange(NPAGES))).all()
        memory.resume()


def test_memory_that_comes_goes_and_is_discarded() -> None:
    with Agented(WITHOUT_AGENT) as target, dirtylog.open(f"pid:{target.pid}", port="compare") as memory, DirtyLog(memory) as log:
        target.order(f"area.madvise({DONTNEED}, 8 * 4096, 2 * 4096)")
        assert written(log, target) == {8, 9}, "they read as zeros now"
        target.order("other = mmap.mmap(-1, 40 * 4096, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS); other[:] = b'x' * len(other)")
        before = {slot.id for slot in memory.slots}
        log.update()
        new = [slot for slot in memory.slots if slot.id not in before and slot.npages == 40]
        assert [log.get(slot.id).count() for slot in new] == [40]
        target.order("child = os.fork() or (other.__setitem__(0, 1), os._exit(0)); os.waitpid(child, 0)")
        assert log.get(new[0].id).pages().tolist() == [0], "others' writes are seen, too"
        target.order("other.close()")
        log.update()
        assert new[0].id not in {slot.id for slot in memory.slots}

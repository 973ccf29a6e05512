"""``dirtylog.track`` and ``dirtylog.empty``: the log, its consumers, its threads, and the contract of both ports."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dirtylog
from address_space import PAGE, PRIVATE, Area
from compiled import Crew
from dirtylog import DirtyLog, Exactness
from dirtylog.buffers.memory import BufferMemory
from uffd_here import needs_uffd, port_of_its_own, written

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NPAGES = 40


@pytest.fixture(params=[pytest.param("uffd", marks=needs_uffd), "compare"])
def port(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def buffer() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return dirtylog.empty(NPAGES * PAGE, np.uint8)


@pytest.fixture
def log(buffer: np.ndarray[Any, Any], port: str) -> Iterator[DirtyLog]:
    with dirtylog.track(buffer, port=port) as started:
        yield started


def store(buffer: np.ndarray[Any, Any], *pages: int) -> set[int]:
    for page in pages:
        buffer[page * PAGE] += 1
    return set(pages)


# --- the contract


def test_what_is_written_is_reported_once(buffer: np.ndarray[Any, Any], log: DirtyLog) -> None:
    assert written(log) == set()
    stored = store(buffer, 0, 5, 39)
    assert written(log) == stored
    assert written(log) == set()


def test_a_silent_store_is_reported_by_the_kernel_and_not_by_comparing(buffer: np.ndarray[Any, Any], log: DirtyLog) -> None:
    buffer[3 * PAGE] = 0
    store(buffer, 5)
    buffer[5 * PAGE] -= 1
    if log.memory.port.name == "uffd":
        assert written(log) == {3, 5}
    else:
        assert written(log) == set(), "the contents are what they were"
        assert any("contents as they were" in spot for spot in log.memory.blind_spots)


def test_a_port_says_how_exact_it_is(log: DirtyLog) -> None:
    assert log.memory.exactness is (Exactness.SUPERSET if log.memory.port.name == "uffd" else Exactness.EXACT)
    assert log.memory.incomplete == ()
    assert log.memory.blind_spots


def test_what_comes_during_a_get_is_found_by_the_next() -> None:
    """Comparing takes two readings of the memory for one: the copy that it compares is the copy that it keeps."""
    buffer = dirtylog.empty(NPAGES * PAGE, np.uint8)
    with BufferMemory(buffer, port="compare") as memory, DirtyLog(memory) as log:
        read = memory.port._read  # type: ignore[attr-defined]  # it has one: it compares

        def read_and_be_overtaken(*arguments: Any) -> None:
            read(*arguments)
            store(buffer, 7)

        store(buffer, 3)
        memory.port._read = read_and_be_overtaken  # type: ignore[attr-defined]  # as above
        assert written(log) == {3}
        memory.port._read = read  # type: ignore[attr-defined]  # as above
        assert written(log) == {7}


def test_a_copy_taken_after_each_get_is_the_memory(buffer: np.ndarray[Any, Any], log: DirtyLog) -> None:
    random = np.random.default_rng(5)
    copy = buffer.copy()
    for _ in range(50):
        start = random.integers(len(buffer))
        buffer[start : start + random.integers(3 * PAGE)] = random.integers(256)
        dirty = log.get(0).pages()
        copy.reshape(-1, PAGE)[dirty] = log.memory.read(0, dirty)
        assert (copy == buffer).all()


# --- the log


def test_a_log_closes_its_memory_and_may_be_closed_again(buffer: np.ndarray[Any, Any], port: str) -> None:
    log = dirtylog.track(buffer, port=port)
    log.close()
    log.close()
    log.stop()
    with pytest.raises(dirtylog.LoggingOffError):
        log.get(0)
    with pytest.raises(dirtylog.DirtyLogError, match="closed"):
        log.memory.read(0, [0])


def test_a_log_that_is_started_already_is_not_started_again(log: DirtyLog) -> None:
    with pytest.raises(dirtylog.InvalidArgumentError, match="logged already"):
        log.start()
    with pytest.raises(dirtylog.BadSlotError):
        log.get(-1)
    with pytest.raises(dirtylog.LoggingOffError):
        log.get(1)


def test_stop_and_start_begin_anew(buffer: np.ndarray[Any, Any], port: str) -> None:
    with BufferMemory(buffer, port=port) as memory:
        log = DirtyLog(memory)
        for page in range(5):
            store(buffer, 30)
            with log:
                assert written(log) == set()
                store(buffer, page)
                assert written(log) == {page}
                store(buffer, 20)


def test_manual_protect_is_refused(buffer: np.ndarray[Any, Any], port: str) -> None:
    with BufferMemory(buffer, port=port) as memory:
        with pytest.raises(dirtylog.UnsupportedError, match="manual protect"):
            DirtyLog(memory, manual_protect=True)
        with DirtyLog(memory) as log, pytest.raises(dirtylog.UnsupportedError, match="manual protect"):
            log.clear(0, 0, dirtylog.DirtyBitmap(NPAGES))


@needs_uffd
def test_the_last_log_closes_the_descriptors_and_the_next_opens_them() -> None:
    with port_of_its_own() as own, Area.map(NPAGES) as area:
        for _ in range(3):
            with dirtylog.track(area.octets, port="uffd") as log, dirtylog.track(area.octets[:PAGE], port="uffd"):
                assert own.descriptors() == 2, "one userfaultfd and one pagemap for all"
                area.store(3)
                assert written(log) == {3}
            assert own.descriptors() == 0


@needs_uffd
def test_a_log_of_memory_that_has_been_unmapped_can_be_closed() -> None:
    with port_of_its_own() as own:
        for first, npages in ((0, 16), (0, 4), (4, 4), (12, 4)):
            with Area.map(16) as area:
                log = dirtylog.track(area.octets, port="uffd")
                area.unmap(first, npages)
                assert written(log) == set()
                log.close()
                assert own.descriptors() == 0


# --- consumers


def test_each_consumer_gets_every_page_and_a_rollback_gives_them_back(buffer: np.ndarray[Any, Any], log: DirtyLog) -> None:
    one, two = log.consumer("one"), log.consumer("two")
    store(buffer, 3)

    def broken() -> None:
        with one.epoch() as epoch:
            assert set(epoch.dirty[0].pages().tolist()) == {3}
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011 - it has no text
        broken()
    store(buffer, 5)
    with one.epoch() as epoch:
        assert set(epoch.dirty[0].pages().tolist()) == {3, 5}
    store(buffer, 7)
    with two.epoch() as epoch:
        assert set(epoch.dirty[0].pages().tolist()) == {3, 5, 7}
    assert written(log) == {3, 5, 7}
    with one.epoch() as epoch:
        assert set(epoch.dirty[0].pages().tolist()) == {7}
    for consumer in (one, two):
        with consumer.epoch() as epoch:
            assert not epoch.dirty[0]


def test_a_bitmap_that_cannot_be_filled_loses_nothing(buffer: np.ndarray[Any, Any], log: DirtyLog) -> None:
    store(buffer, 3)
    out = dirtylog.DirtyBitmap(NPAGES)
    out.words.flags.writeable = False
    with pytest.raises(dirtylog.CopyFaultError):
        log.get(0, out)
    store(buffer, 4)
    assert written(log) == {3, 4}


# --- threads


def test_two_threads_that_get_at_once_get_every_page_between_them(port: str) -> None:
    with Area.map(6 * 8, PRIVATE | 0x20) as area, dirtylog.track(area.octets, port=port) as log:
        crew = Crew(area, 6)
        found: list[set[int]] = [set(), set()]
        over = threading.Event()

        def get(mine: set[int]) -> None:
            while not over.is_set():
                mine |= written(log)

        try:
            for _ in range(60):
                threads = [threading.Thread(target=get, args=(mine,)) for mine in found]
                for thread in threads:
                    thread.start()
                with crew.round():
                    pass
                over.set()
                for thread in threads:
                    thread.join()
                assert found[0] | found[1] | written(log) == set(range(area.npages))
                over.clear()
                for mine in found:
                    mine.clear()
        finally:
            over.set()
            crew.stop()


# --- empty

DTYPES: list[Any] = [np.float64, "u1", "i2", "c16", "S3", "U5", "M8[s]", [("a", "i4"), ("b", "f8")], bool, "3i4", ">u8"]
SHAPES: list[Any] = [5, (3, 4), [2, 3], (), (1,), np.int64(7), (np.int32(2), 5), (0,), (3, 0), 0]


@pytest.mark.parametrize("shape", SHAPES, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_is_what_numpy_makes_and_zero(shape: Any, dtype: Any) -> None:
    array, model = dirtylog.empty(shape, dtype), np.zeros(shape, dtype)
    assert (array.shape, array.dtype) == (model.shape, model.dtype)
    assert array.flags.writeable
    assert array.flags.c_contiguous
    assert array.tobytes() == model.tobytes()


def test_empty_lies_in_pages_of_its_own() -> None:
    arrays = [dirtylog.empty(10, np.uint8) for _ in range(20)]
    assert len({array.ctypes.data // PAGE for array in arrays}) == 20
    assert all(array.ctypes.data % PAGE == 0 for array in arrays)
    for array in arrays:
        array[:] = 1
    assert all(array.all() for array in arrays)


REFUSED: dict[str, Callable[[], Any]] = {
    "negative": lambda: dirtylog.empty(-1),
    "two negatives": lambda: dirtylog.empty((-1, -2)),
    "a negative and nothing": lambda: dirtylog.empty((0, -1)),
    "objects": lambda: dirtylog.empty(3, object),
    "objects in records": lambda: dirtylog.empty(3, [("a", "i4"), ("b", object)]),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED.keys())
def test_empty_refuses_what_it_cannot_be(make: Callable[[], Any]) -> None:
    with pytest.raises(dirtylog.InvalidArgumentError):
        make()


@pytest.mark.parametrize("shape", [2.5, (2, 2.5), "3", None, ((2,),)], ids=repr)
def test_empty_wants_whole_numbers(shape: Any) -> None:
    with pytest.raises(TypeError):
        dirtylog.empty(shape)

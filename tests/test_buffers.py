"""What can be tracked, how long it lives, and what its memory reads and writes."""

from __future__ import annotations

import array
import ctypes
import gc
import mmap
import tempfile
import weakref
from multiprocessing.shared_memory import SharedMemory
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dirtylog
from array_likes import WithDlpack, WithInterface, WithOldDlpack
from dirtylog.buffers.locate import locate
from dirtylog.buffers.memory import BufferMemory
from uffd_here import needs_uffd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dirtylog import DirtyLog

PAGE = mmap.PAGESIZE
NBYTES = 10 * PAGE
every_port = pytest.mark.parametrize("port", [pytest.param("uffd", marks=needs_uffd), "compare"])


def page_of(log: DirtyLog, address: int) -> int:
    return address // PAGE - log.memory.slots[0].host_address // PAGE


# --- what can be tracked: (object, how to store to its middle)


def _struct() -> tuple[Any, Callable[[], None]]:
    records = np.zeros(NBYTES // 16, [("key", "i8"), ("value", "f8")])

    def store() -> None:
        records["value"][len(records) // 2] = 3.0

    return records, store


def _numpy(index: Any, *, order: Any = "C") -> Callable[[], tuple[Any, Callable[[], None]]]:
    def make() -> tuple[Any, Callable[[], None]]:
        whole = np.zeros((100, NBYTES // 800), np.float64, order=order)
        chosen = whole[index]

        def store() -> None:
            chosen[len(chosen) // 2, ...] = 5.0

        return chosen, store

    return make


def _transposed() -> tuple[Any, Callable[[], None]]:
    whole, store = _numpy(...)()
    return whole.T, store


def _octets(make: Callable[[], Any]) -> Callable[[], tuple[Any, Callable[[], None]]]:
    def made() -> tuple[Any, Callable[[], None]]:
        octets = make()

        def store() -> None:
            with memoryview(octets) as view, view.cast("B") as flat:
                flat[len(flat) // 2] = 7

        return octets, store

    return made


def _wrapped(wrap: Callable[[np.ndarray[Any, Any]], Any]) -> Callable[[], tuple[Any, Callable[[], None]]]:
    def make() -> tuple[Any, Callable[[], None]]:
        inner = np.zeros(NBYTES, np.uint8)

        def store() -> None:
            inner[NBYTES // 2] = 9

        return wrap(inner), store

    return make


TRACKABLE: dict[str, Callable[[], tuple[Any, Callable[[], None]]]] = {
    "ndarray": _numpy(...),
    "ndarray-fortran": _numpy(..., order="F"),
    "ndarray-rows": _numpy(np.s_[10:90:3]),
    "ndarray-columns": _numpy(np.s_[:, 5:9]),
    "ndarray-backwards": _numpy(np.s_[::-1, ::-2]),
    "ndarray-transposed": _transposed,
    "ndarray-records": _struct,
    "ndarray-masked": _wrapped(np.ma.masked_array),
    "bytearray": _octets(lambda: bytearray(NBYTES)),
    "mmap-shared": _octets(lambda: mmap.mmap(-1, NBYTES)),
    "mmap-private": _octets(lambda: mmap.mmap(-1, NBYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)),
    "memoryview": _octets(lambda: memoryview(bytearray(NBYTES))[100:-100]),
    "array.array": _octets(lambda: array.array("d", bytes(NBYTES))),
    "ctypes": _octets(ctypes.c_uint32 * (NBYTES // 4)),
    "dirtylog.empty": _octets(lambda: dirtylog.empty(NBYTES, np.uint8)),
    "array interface": _wrapped(WithInterface),
    "dlpack": _wrapped(WithDlpack),
    "old dlpack": _wrapped(WithOldDlpack),
}


@every_port
@pytest.mark.parametrize("make", TRACKABLE.values(), ids=TRACKABLE.keys())
def test_every_kind_of_buffer_is_tracked(make: Callable[[], tuple[Any, Callable[[], None]]], port: str) -> None:
    buffer, store = make()
    with dirtylog.track(buffer, port=port) as log:
        assert log.memory.port.name == port
        log.get(0)
        everything = range(log.memory.slots[0].npages)
        before = log.memory.read(0, everything)
        store()
        # Other objects lie on its first and last page, and change all the time; while compare logs, what was compared is read.
        after = log.memory.read(0, everything)
        reported = set(log.get(0).pages().tolist())
        changed = ((log.memory.read(0, everything) if port == "compare" else after) != before).any(axis=1)
        assert changed.any()
        assert set(np.flatnonzero(changed).tolist()) <= reported


@pytest.mark.parametrize(("step", "nbytes"), [(1, 1000), (3, 1000), (-1, 1000), (-3, 1000), (999, 1000)])
def test_an_array_with_strides_is_all_between_its_ends(step: int, nbytes: int) -> None:
    whole = np.zeros(nbytes, np.uint8)
    part = whole[::step]
    _, address, length = locate(part)
    offsets = np.arange(nbytes)[::step]
    assert address == whole.ctypes.data + offsets.min()
    assert length == offsets.max() - offsets.min() + 1
    _, address, length = locate(whole.data[::step])
    assert (address, length) == (whole.ctypes.data + offsets.min(), offsets.max() - offsets.min() + 1)


@every_port
def test_a_file_that_is_mapped_is_tracked(port: str) -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(NBYTES - 100)
        with mmap.mmap(file.fileno(), 0) as mapped, dirtylog.track(mapped, port=port) as log:
            assert log.memory.slots[0].npages == 10
            mapped[5 * PAGE] = 1
            assert log.get(0).pages().tolist() == [5]
            log.close()


@every_port
def test_shared_memory_is_tracked_and_cannot_be_closed_meanwhile(port: str) -> None:
    shared = SharedMemory(create=True, size=NBYTES)
    try:
        with dirtylog.track(shared.buf, port=port) as log:
            assert shared.buf is not None
            shared.buf[3 * PAGE] = 1
            assert log.get(0).pages().tolist() == [3]
            with pytest.raises(BufferError):
                shared.close()
    finally:
        shared.close()
        shared.unlink()


@every_port
def test_a_tensor_is_tracked(port: str) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(NBYTES, dtype=torch.uint8)
    with dirtylog.track(tensor, port=port) as log:
        tensor[NBYTES // 2] = 1
        assert page_of(log, tensor.data_ptr() + NBYTES // 2) in log.get(0)


# --- how long it lives


@every_port
def test_a_bytearray_cannot_be_resized_while_it_is_tracked(port: str) -> None:
    buffer = bytearray(NBYTES)
    with dirtylog.track(buffer, port=port), pytest.raises(BufferError):
        buffer.append(1)
    buffer.append(1)


@every_port
def test_a_mapping_cannot_be_closed_while_it_is_tracked(port: str) -> None:
    buffer = mmap.mmap(-1, NBYTES)
    with dirtylog.track(buffer, port=port), pytest.raises(BufferError):
        buffer.close()
    buffer.close()


@every_port
def test_a_buffer_is_kept_while_it_is_tracked_and_not_longer(port: str) -> None:
    buffer = dirtylog.empty(NBYTES, np.uint8)
    gone = weakref.ref(buffer)
    log = dirtylog.track(buffer, port=port)
    del buffer
    gc.collect()
    assert gone() is not None
    assert not log.get(0)
    log.close()
    gc.collect()
    assert gone() is None


@every_port
def test_a_log_that_fails_to_start_lets_the_buffer_go(port: str) -> None:
    buffer = bytearray(NBYTES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dirtylog.log.SlotBitmap", lambda *_, **__: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            dirtylog.track(buffer, port=port)
    gc.collect()
    buffer.append(1)


# --- what its memory reads and writes


@pytest.fixture(params=[pytest.param("uffd", marks=needs_uffd), "compare"])
def within(request: pytest.FixtureRequest) -> Iterator[tuple[np.ndarray[Any, Any], BufferMemory]]:
    """A buffer that neither begins nor ends at a page, and all the memory around it."""
    around = dirtylog.empty(6 * PAGE, np.uint8)
    around[:] = 1
    with BufferMemory(around[PAGE + 100 : 4 * PAGE + 50], port=request.param) as memory:
        yield around, memory


def test_the_pages_cover_the_buffer(within: tuple[np.ndarray[Any, Any], BufferMemory]) -> None:
    around, memory = within
    slot = memory.slots[0]
    assert (slot.npages, memory.offset, memory.nbytes) == (4, 100, 3 * PAGE - 50)
    assert slot.host_address == around.ctypes.data + PAGE
    assert slot.base_gfn == slot.host_address // PAGE
    around[PAGE] = 42
    assert memory.read(0, [0, 3])[:, 0].tolist() == [42, 1]


def test_a_write_to_an_edge_leaves_the_neighbours_bytes(within: tuple[np.ndarray[Any, Any], BufferMemory]) -> None:
    around, memory = within
    memory.write(0, [3, 0, 1, 2], np.full((4, PAGE), [[4], [5], [6], [7]], np.uint8))
    assert set(around[: PAGE + 100].tolist()) == {1}
    assert set(around[4 * PAGE + 50 :].tolist()) == {1}
    assert set(around[PAGE + 100 : 2 * PAGE].tolist()) == {5}
    assert set(around[2 * PAGE : 3 * PAGE].tolist()) == {6}
    assert set(around[4 * PAGE : 4 * PAGE + 50].tolist()) == {4}


@pytest.mark.parametrize(("start", "end"), [(0, 1), (10, 20), (PAGE - 1, PAGE), (0, PAGE), (PAGE - 1, PAGE + 1), (5, 2 * PAGE)])
def test_a_write_to_a_small_buffer_is_only_its_own_bytes(start: int, end: int) -> None:
    around = dirtylog.empty(2 * PAGE, np.uint8)
    with BufferMemory(around[start:end], port="compare") as memory:
        npages = memory.slots[0].npages
        memory.write(0, range(npages), np.full((npages, PAGE), 9, np.uint8))
    assert np.flatnonzero(around).tolist() == list(range(start, end))


def test_what_does_not_fit_is_refused_and_nothing_is_written(within: tuple[np.ndarray[Any, Any], BufferMemory]) -> None:
    around, memory = within
    for pages, shape in (([4], (1, PAGE)), ([-1], (1, PAGE)), ([0], (1, PAGE - 1)), ([0, 1], (1, PAGE)), ([0], (PAGE,))):
        with pytest.raises(dirtylog.InvalidArgumentError):
            memory.write(0, pages, np.zeros(shape, np.uint8))
    with pytest.raises(dirtylog.InvalidArgumentError):
        memory.read(0, [4])
    assert set(around.tolist()) == {1}
    memory.close()
    memory.close()
    with pytest.raises(dirtylog.DirtyLogError, match="closed"):
        memory.read(0, [0])
    with pytest.raises(dirtylog.DirtyLogError, match="closed"):
        memory.write(0, [0], np.zeros((1, PAGE), np.uint8))

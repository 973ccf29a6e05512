"""What the kernel and odd instructions do to tracked memory: what they write is reported, and reading is not writing."""

from __future__ import annotations

import ctypes
import os
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from address_space import (
    ANONYMOUS,
    DONTNEED,
    FREE,
    GUARD_INSTALL,
    GUARD_REMOVE,
    PAGE,
    POPULATE_READ,
    POPULATE_WRITE,
    SHARED,
    Area,
    checked,
    file_to_read,
    memory_file,
)
from compiled import stores
from io_uring import Ring
from uffd_here import forks, needs_uffd, watched, written

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dirtylog import DirtyLog

pytestmark = [needs_uffd, forks]

NPAGES = 16
PAGES = {4, 5}
START, NBYTES = 4 * PAGE + 100, 5000

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def area() -> Iterator[Area]:
    with Area.map(NPAGES) as mapped:
        mapped.octets[:] = 1
        yield mapped


@pytest.fixture
def log(area: Area) -> Iterator[DirtyLog]:
    with watched(area) as started:
        yield started


def target(area: Area) -> memoryview:
    """Return the bytes that are to be written: parts of two pages."""
    return area.octets.data[START : START + NBYTES]


# --- by the kernel


def _file(stack: ExitStack, flags: int = 0) -> int:
    return stack.enter_context(file_to_read(b"f" * 4 * PAGE, flags))


def _read(area: Area, stack: ExitStack) -> None:
    os.readv(_file(stack), [target(area)])


def _pread(area: Area, stack: ExitStack) -> None:
    os.preadv(_file(stack), [target(area)], 7)


def _readinto(area: Area, stack: ExitStack) -> None:
    with os.fdopen(os.dup(_file(stack)), "rb", buffering=0) as file:
        file.readinto(target(area))


def _received(area: Area, stack: ExitStack) -> None:
    one, two = socket.socketpair()
    stack.enter_context(one)
    stack.enter_context(two)
    one.send(b"s" * NBYTES)
    two.recv_into(target(area))


def _piped(area: Area, stack: ExitStack) -> None:
    reader, writer = os.pipe()
    stack.callback(os.close, reader)
    stack.callback(os.close, writer)
    os.write(writer, b"p" * NBYTES)
    os.readv(reader, [target(area)])


def _spliced(area: Area, stack: ExitStack) -> None:
    """vmsplice from a pipe, which copies."""
    reader, writer = os.pipe()
    stack.callback(os.close, reader)
    stack.callback(os.close, writer)
    os.write(writer, b"v" * NBYTES)
    checked(_libc.vmsplice(reader, (ctypes.c_uint64 * 2)(area.address + START, NBYTES), 1, 0))


def _another_process_writes(area: Area, _stack: ExitStack) -> None:
    """process_vm_writev, here on the process itself."""
    source = ctypes.create_string_buffer(b"v" * NBYTES, NBYTES)

    def vector(address: int) -> ctypes.Array[ctypes.c_uint64]:
        return (ctypes.c_uint64 * 2)(address, NBYTES)

    local, remote = vector(ctypes.addressof(source)), vector(area.address + START)
    checked(_libc.process_vm_writev(os.getpid(), local, 1, remote, 1, 0))


def _proc_mem(area: Area, stack: ExitStack) -> None:
    fd = os.open("/proc/self/mem", os.O_RDWR)
    stack.callback(os.close, fd)
    os.pwrite(fd, b"m" * NBYTES, area.address + START)


def _direct(area: Area, stack: ExitStack) -> None:
    os.preadv(_file(stack, os.O_DIRECT), [area.octets.data[4 * PAGE : 6 * PAGE]], 0)


def _ring(area: Area, stack: ExitStack) -> None:
    stack.enter_context(Ring()).read(_file(stack), area.address + START, NBYTES)


def _ring_direct(area: Area, stack: ExitStack) -> None:
    stack.enter_context(Ring()).read(_file(stack, os.O_DIRECT), area.address + 4 * PAGE, 2 * PAGE)


def _ioctl(area: Area, stack: ExitStack) -> None:
    """FIONREAD writes one int, here across the two pages."""
    reader, writer = os.pipe()
    stack.callback(os.close, reader)
    stack.callback(os.close, writer)
    os.write(writer, b"123")
    checked(_libc.ioctl(reader, 0x541B, ctypes.c_void_p(area.address + 5 * PAGE - 2)))


BY_THE_KERNEL = [
    _read,
    _pread,
    _readinto,
    _received,
    _piped,
    _spliced,
    _another_process_writes,
    _proc_mem,
    _direct,
    _ring,
    _ring_direct,
    _ioctl,
]


@pytest.mark.parametrize("write", BY_THE_KERNEL, ids=lambda write: write.__name__.strip("_"))
def test_what_the_kernel_writes_is_reported(area: Area, log: DirtyLog, write: Callable[[Area, ExitStack], None]) -> None:
    for _ in range(2):
        with ExitStack() as stack:
            try:
                write(area, stack)
            except OSError as error:
                pytest.skip(f"not here: {error.strerror}")
        assert written(log) == PAGES
        assert written(log) == set()


def test_memory_that_is_given_to_a_pipe_is_only_read(area: Area, log: DirtyLog) -> None:
    reader, writer = os.pipe()
    vector = (ctypes.c_uint64 * 2)(area.address + START, NBYTES)
    checked(_libc.vmsplice(writer, vector, 1, 0))
    os.close(writer)
    os.close(reader)
    assert written(log) == set()


# --- by odd instructions


def test_a_store_that_changes_nothing_is_a_store(area: Area, log: DirtyLog) -> None:
    area.store(3, value=1)
    stores().store_nothing(area.address + 4 * PAGE)
    assert written(log) == {3, 4}


def test_an_exchange_that_fails_may_be_taken_for_a_store(area: Area, log: DirtyLog) -> None:
    stores().store_in_vain(area.address + 3 * PAGE)
    assert written(log) <= {3}
    area.store(3)
    assert written(log) == {3}


def test_a_prefetch_for_writing_is_none(area: Area, log: DirtyLog) -> None:
    stores().prefetch_for_writing(area.address + 3 * PAGE)
    assert written(log) == set()


# --- by advice


def test_populating_to_read_writes_nothing(log: DirtyLog, area: Area) -> None:
    area.advise(DONTNEED)
    assert written(log) == set(range(NPAGES)), "discarded: it reads as zeros"
    area.advise(POPULATE_READ)
    assert written(log) == set()


POPULATE: dict[str, Callable[[Area], None]] = {
    "MADV_POPULATE_WRITE": lambda area: area.advise(POPULATE_WRITE, 4, 2),
    "mlock": lambda area: area.lock(4, 2),
}


@pytest.mark.parametrize("populate", POPULATE.values(), ids=POPULATE.keys())
def test_populating_to_write_may_be_taken_for_writing(area: Area, log: DirtyLog, populate: Callable[[Area], None]) -> None:
    populate(area)
    assert written(log) <= PAGES
    area.store(4)
    assert written(log) == {4}


def test_discarded_pages_are_reported_each_time(area: Area, log: DirtyLog) -> None:
    for _ in range(3):
        area.store(4, 5)
        written(log)
        area.advise(DONTNEED, 4, 2)
        assert written(log) == PAGES
        assert area[4] == 0


def test_what_is_free_to_be_reclaimed_is_reported_when_it_is_written(area: Area, log: DirtyLog) -> None:
    area.advise(FREE, 4, 2)
    before = written(log)
    area.store(4)
    assert 4 in written(log)
    assert before <= PAGES


def test_guards_and_their_removal_are_reported(area: Area, log: DirtyLog) -> None:
    try:
        area.advise(GUARD_INSTALL, 4, 2)
    except OSError:
        pytest.skip("this kernel has no guard regions")
    area.store(3)
    assert written(log) == {3, *PAGES}
    area.advise(GUARD_REMOVE, 4, 2)
    assert written(log) == PAGES
    area.store(5)
    assert written(log) == {5}


def test_a_discarded_page_of_shared_memory_keeps_its_contents_and_its_state() -> None:
    with Area.map(NPAGES, SHARED | ANONYMOUS) as area:
        area.octets[:] = 1
        with watched(area) as log:
            area.store(4)
            area.advise(DONTNEED)
            assert written(log) == {4}, "written before, and only its entry has gone"
            assert set(area.octets.tolist()) == {1, 2}
            area.advise(DONTNEED)
            area.octets.sum()
            assert written(log) == set()
            area.store(5)
            assert written(log) == {5}


# --- by others


def test_a_fork_changes_nothing_for_the_parent(area: Area, log: DirtyLog) -> None:
    area.store(3)
    child = os.fork()
    if not child:
        area.store(4)
        os._exit(0)
    os.waitpid(child, 0)
    area.store(5)
    assert written(log) == {3, 5}


def test_two_mappings_of_one_memory_that_are_both_tracked_have_all_stores_between_them() -> None:
    """A mark is a page table entry's: what one mapping does not see the other does."""
    with ExitStack() as stack:
        fd = stack.enter_context(memory_file(NPAGES * PAGE))
        area, alias = (stack.enter_context(Area.map(NPAGES, SHARED, fd=fd)) for _ in range(2))
        log, other = (stack.enter_context(watched(mapped)) for mapped in (area, alias))
        area.store(3)
        alias.store(5)
        assert (written(log), written(other)) == ({3}, {5})

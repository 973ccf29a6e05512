"""Scenes that need a process of their own: it forks, gives up its privileges, forbids itself a system call, or might hang.

``python lone_process.py SCENE [NUMBER]`` plays one; it ends with 0 if all is as it should be.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import resource
import signal
import struct
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import dirtylog
from dirtylog.linux import abi
from dirtylog.linux.buffer_port import BufferPort
from dirtylog.linux.descriptor import UnsharedDescriptor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dirtylog import DirtyLog

PAGE = 4096
NPAGES = 64
NOBODY = 65534
SOON = 10

_libc = ctypes.CDLL(None, use_errno=True)
SCENES: dict[str, Callable[..., None]] = {}


def scene(play: Callable[..., None]) -> Callable[..., None]:
    SCENES[play.__name__] = play
    return play


def in_child(act: Callable[[], None]) -> None:
    """Let a forked child act, and expect it to end well. An alarm ends one that hangs."""
    child = os.fork()
    if not child:
        signal.alarm(SOON)
        code = 1
        try:
            act()
            code = 0
        finally:
            if code:
                sys.excepthook(*sys.exc_info())
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with {status:#x}"


def fresh() -> tuple[np.ndarray, DirtyLog]:
    array = dirtylog.empty(NPAGES * PAGE, np.uint8)
    return array, dirtylog.track(array, port="uffd")


def written(log: DirtyLog) -> set[int]:
    return set(log.get(0).pages().tolist())


def refused(log: DirtyLog) -> None:
    with pytest.raises(dirtylog.DirtyLogError, match="parent"):
        log.get(0)


# --- forks


@scene
def child_gets_from_its_parents_log() -> None:
    array, log = fresh()
    array[3 * PAGE] = 1
    in_child(lambda: refused(log))
    assert written(log) == {3}, "the child took nothing"
    array[5 * PAGE] = 1
    in_child(lambda: in_child(lambda: refused(log)))
    assert written(log) == {5}
    in_child(log.close)
    array[7 * PAGE] = 1
    assert written(log) == {7}, "and what it closes is its own"


@scene
def child_that_keeps_the_descriptors_takes_its_parents_pages() -> None:
    """The mutant of the scene above."""
    array, log = fresh()
    array[3 * PAGE] = 1
    UnsharedDescriptor._open.clear()  # what is to be closed in a child
    in_child(lambda: _expect(written(log), {3}))
    assert written(log) == set(), "the pagemap is the parent's, whoever scans it"


@scene
def child_tracks_on_its_own() -> None:
    array, log = fresh()
    array[3 * PAGE] = 1

    def child() -> None:
        with dirtylog.track(array, port="uffd") as own:
            _expect(written(own), set())
            array[5 * PAGE] = 1
            _expect(written(own), {5})
            with dirtylog.track(array, port="uffd") as second:
                array[6 * PAGE] = 1
                _expect(written(second), {6})
                _expect(written(own), {6})

    in_child(child)
    array[7 * PAGE] = 1
    assert written(log) == {3, 7}, "nothing of the child's, all of the parent's"
    assert array[5 * PAGE] == 0
    array[3 * PAGE] = 2
    assert written(log) == {3}, "the parent's copy of a page is armed like the page"


@scene
def child_of_a_process_that_is_getting() -> None:
    """Another thread may be in the middle of a get at the fork, with every lock held."""
    array, log = fresh()
    over = threading.Event()

    def get() -> None:
        while not over.is_set():
            array[::PAGE] = 1
            log.get(0)

    getter = threading.Thread(target=get)
    getter.start()
    try:
        for _ in range(40):
            in_child(lambda: refused(log))
            in_child(_track_something)
    finally:
        over.set()
        getter.join()
    log.get(0)
    array[9 * PAGE] = 1
    assert written(log) == {9}


@scene
def program_that_is_started_inherits_nothing() -> None:
    _, log = fresh()
    listing = Path("/proc/self/fd")
    mine = [str(fd.readlink()) for fd in listing.iterdir() if fd.is_symlink()]
    assert any("userfaultfd" in name for name in mine)
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    program = (
        "import os, sys; print(*(os.readlink(e) for e in os.scandir('/proc/self/fd') if os.path.lexists(e)), file=open(%d, 'w'))"
    )
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", program % writer], os.environ)
    os.close(writer)
    with os.fdopen(reader) as answer:
        names = answer.read()
    os.waitpid(child, 0)
    assert "pipe" in names
    assert "userfaultfd" not in names
    log.close()


# --- Python's lock


@scene
def threads_store_and_get() -> None:
    """With a handler thread for the faults, a thread that stores would wait for it with Python's lock held, and so for ever."""
    sys.setswitchinterval(0.0002)
    array, log = fresh()
    over = threading.Event()

    def store(first: int) -> None:
        while not over.is_set():
            array[first * PAGE :: 4 * PAGE] += 1

    threads = [threading.Thread(target=store, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    copy = array.copy()
    for _ in range(100):
        pages = log.get(0).pages()
        copy.reshape(-1, PAGE)[pages] = log.memory.read(0, pages)
    over.set()
    for thread in threads:
        thread.join()
    pages = log.get(0).pages()
    copy.reshape(-1, PAGE)[pages] = log.memory.read(0, pages)
    assert (copy == array).all()


# --- descriptors


@scene
def out_of_descriptors_for_a_while(left: int) -> None:
    """That there is none left today says nothing about tomorrow."""
    array = dirtylog.empty(NPAGES * PAGE, np.uint8)
    _track_something(port="compare")  # and have every module imported
    with _few_descriptors(left), contextlib.suppress(dirtylog.DirtyLogError):
        dirtylog.track(array, port="uffd").close()
    _track_something()


@contextlib.contextmanager
def _few_descriptors(left: int) -> Iterator[None]:
    """Let this process open just so many more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(left):
            os.close(taken.pop())
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# --- privileges


@scene
def nobody_tracks() -> None:
    """A process without privileges. Only after an execve, or this prctl, are its own files in /proc its own."""
    _track_something()
    BufferPort._instance = None
    _become_nobody()
    assert _libc.prctl(4, 1, 0, 0, 0) == 0  # PR_SET_DUMPABLE
    _track_something()
    array, log = fresh()
    reader, writer = os.pipe()
    os.write(writer, b"x" * 10)
    os.readv(reader, [array.data[4 * PAGE : 4 * PAGE + 10]])
    assert written(log) == {4}, "what the kernel writes counts, too"


@scene
def nobody_who_was_root_compares() -> None:
    """After setuid, and no execve, the process may not open its own pagemap."""
    _track_something()
    array = dirtylog.empty(NPAGES * PAGE, np.uint8)
    _become_nobody()
    with dirtylog.track(array) as log:
        assert log.memory.port.name == "compare", log.memory.port.name
        array[3 * PAGE] = 1
        assert written(log) == {3}
    with pytest.raises(dirtylog.AccessDeniedError, match="pagemap"):
        dirtylog.track(array, port="uffd")


@scene
def without_the_system_call_the_device_will_do() -> None:
    _forbid_userfaultfd()
    _track_something()


@scene
def without_any_userfaultfd_there_is_comparing() -> None:
    _track_something(port="compare")
    import dirtylog.linux.buffer_port  # noqa: PLC0415 - Python's own files may be out of nobody's reach

    _become_nobody()
    assert _libc.prctl(4, 1, 0, 0, 0) == 0
    _forbid_userfaultfd()
    array = dirtylog.empty(NPAGES * PAGE, np.uint8)
    with dirtylog.track(array) as log:
        assert log.memory.port.name == "compare"
        array[3 * PAGE] = 1
        assert written(log) == {3}
    with pytest.raises(dirtylog.AccessDeniedError, match=r"seccomp.*compare"):
        dirtylog.track(array, port="uffd")


def _expect(found: set[int], wanted: set[int]) -> None:
    assert found == wanted, f"{found} instead of {wanted}"


def _track_something(port: str = "uffd") -> None:
    array = dirtylog.empty(NPAGES * PAGE, np.uint8)
    with dirtylog.track(array, port=port) as log:
        array[3 * PAGE] = 1
        _expect(written(log), {3})


def _become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def _forbid_userfaultfd() -> None:
    """Install a seccomp filter: load the number of the call; if it is that one, EPERM, else allow."""
    program = b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (0x20, 0, 0, 0),
            (0x15, 0, 1, abi.userfaultfd_number()),
            (0x06, 0, 0, 0x0005_0001),
            (0x06, 0, 0, 0x7FFF_0000),
        )
    )
    kept = ctypes.create_string_buffer(program)
    argument = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 4, ctypes.addressof(kept)))
    assert _libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert _libc.prctl(22, 2, argument) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    assert kept.raw


if __name__ == "__main__":
    faulthandler.dump_traceback_later(5 * SOON, exit=True)
    SCENES[sys.argv[1]](*map(int, sys.argv[2:]))

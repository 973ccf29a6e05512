"""A userfaultfd of another process: made by one of its threads, and taken from it.

All that has to run in the target is ``userfaultfd(2)``, for a userfaultfd belongs to the address space of who creates it, and
``close(2)``; both take integers only. The rest is done from outside, on a copy of the descriptor.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dirtylog.errors import AccessDeniedError, DirtyLogError, TargetGoneError, UnsupportedError
from dirtylog.linux import abi
from dirtylog.linux.arch import host_architecture
from dirtylog.linux.call_window import CallWindow, Code, TryAnotherError, find_code, open_memory
from dirtylog.linux.preflight import check_process, has_ended, read_status, threads_by_preference
from dirtylog.linux.ptrace import ATTACH_REMEDY, Tracee, let_go_if_ended, lives
from dirtylog.linux.ptrace_abi import Option
from dirtylog.linux.signals import block_signals
from dirtylog.linux.userfaultfd import FLAGS, Userfaultfd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dirtylog.linux.arch.architecture import Architecture

_ATTEMPTS = 8
_SECONDS = 0.001
"""How long to wait before the second attempt; twice as long before each one after it."""
_libc = ctypes.CDLL(None, use_errno=True)


def inject_userfaultfd(pid: int) -> Userfaultfd:
    """Return a userfaultfd of another process, enabled. One of its threads is stopped for about a millisecond.

    Raises :class:`TargetGoneError`, :class:`AccessDeniedError`, and :class:`UnsupportedError` with the reason why this process
    cannot be attached to without harm.
    """
    architecture = host_architecture()
    uffd = _in_a_thread_of_its_own(lambda: _inject(pid, architecture))
    try:
        uffd.enable()
    except BaseException:
        uffd.close()
        raise
    return uffd


def _in_a_thread_of_its_own(call: Callable[[], Userfaultfd]) -> Userfaultfd:
    """Call in a thread in which no signal is handled, and wait for it, come what may.

    A tracee belongs to the thread that seized it: when the thread ends it is let go, whatever went wrong before. A Ctrl-C is
    handled by the main thread, which waits here: so it comes after the call.
    """
    outcome: Future[Userfaultfd] = Future()

    def run() -> None:
        if outcome.set_running_or_notify_cancel():
            block_signals()
            try:
                outcome.set_result(call())
            except BaseException as error:  # noqa: BLE001 - it is raised again, in the thread that waits
                outcome.set_exception(error)

    thread = threading.Thread(target=run, name="dirtylog-ptrace")
    interrupt: BaseException | None = None
    try:
        thread.start()
    except BaseException as error:  # noqa: BLE001 - as below
        interrupt = error
        # Where it has begun it goes on, else it never will.
        outcome.cancel()
    while thread.is_alive() or lives(thread):
        try:
            thread.join()
        except BaseException as error:  # noqa: BLE001 - raised below: what the call has done must not be left alone
            interrupt = error
    if interrupt is not None:
        if not outcome.cancelled() and not outcome.exception():
            outcome.result().close()
        raise interrupt
    return outcome.result()


def _inject(pid: int, architecture: Architecture[Any]) -> Userfaultfd:
    reason = "they are in uninterruptible sleeps: waiting for a disk, or for a child of vfork"
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_SECONDS * 2 ** (attempt - 1))
        check_process(pid, architecture)
        with open_memory(pid) as memory:
            code = find_code(pid, architecture, memory)
        for tid in threads_by_preference(pid, architecture):
            try:
                return _inject_into(pid, tid, architecture, code)
            except TryAnotherError as error:
                reason = str(error)
    raise UnsupportedError(f"no thread of process {pid} can take a system call", pid=pid, reason=reason, remedy="try again")


def _inject_into(pid: int, tid: int, architecture: Architecture[Any], code: Code) -> Userfaultfd:
    window: CallWindow[Any] | None = None
    uffd: Userfaultfd | None = None
    try:
        with _seized(pid, tid) as tracee, open_memory(pid) as memory:
            window = CallWindow(tracee, architecture, code, memory)
            uffd = take_userfaultfd(window)
    except BaseException as error:
        if uffd is not None:
            uffd.close()
        # With the thread the whole process has gone, or it executes another program; that may wait for us to let the thread go.
        if window is not None and window.left is not None and not isinstance(error, TargetGoneError):
            _close_left(window, window.left)
        raise
    return uffd


@contextmanager
def _seized(pid: int, tid: int) -> Iterator[Tracee]:
    """Give a thread of a process, stopped. Its seccomp filter, if it has one, is suspended until it is let go."""
    try:
        tracee = Tracee(pid, tid, Option.TRACESYSGOOD)
        tracee.stop()
    except (TargetGoneError, AccessDeniedError) as error:
        # To attach to one that has ended is EPERM, too, and so it is to one that is traced.
        if not has_ended(pid, tid):
            if tracer := read_status(pid, tid).tracer:
                raise TryAnotherError(f"thread {tid} is being traced by process {tracer}") from error
            raise
        let_go_if_ended(pid, tid)
        raise TryAnotherError(f"thread {tid} has ended") from error
    try:
        if read_status(pid, tid).seccomp:
            try:
                tracee.set_options(Option.TRACESYSGOOD | Option.SUSPEND_SECCOMP)
            except DirtyLogError as error:
                raise UnsupportedError(
                    f"process {pid} filters its system calls (seccomp)",
                    pid=pid,
                    reason=f"userfaultfd might end it, and the filter cannot be suspended: {error.reason}",
                    remedy="be root with CAP_SYS_ADMIN, or let the program run dirtylog.agent",
                ) from error
        yield tracee
    finally:
        tracee.detach()


def take_userfaultfd(window: CallWindow[Any]) -> Userfaultfd:
    """Make a userfaultfd in the thread of ``window``, take a copy of it, and close the original.

    It must be closed there before anything is registered: else the registration would outlive us.
    """
    pid, architecture = window.tracee.pid, window.architecture
    uffd: Userfaultfd | None = None
    try:
        with window:
            fd = window.call(architecture.userfaultfd, FLAGS)
            if fd < 0:
                _raise_refused(pid, -fd)
            window.left = fd
            uffd = Userfaultfd(_copy_of(pid, fd))
            closed = window.call(architecture.close, fd)
            if closed:
                _raise_not_closed(pid, closed)
            window.left = None
    except BaseException:
        if uffd is not None:
            uffd.close()
        raise
    return uffd


def _close_left(window: CallWindow[Any], fd: int) -> None:
    """Close what a failure has left in the target, by a second call; if that fails too, it is a descriptor that watches nothing."""
    pid, architecture = window.tracee.pid, window.architecture
    with suppress(DirtyLogError, OSError):
        for tid in threads_by_preference(pid, architecture)[:1]:
            with _seized(pid, tid) as tracee, open_memory(pid) as memory:
                # Unless it executes another program by now, which has no such descriptor, but may have others.
                if "userfaultfd" in str(Path(f"/proc/{pid}/fd/{fd}").readlink()):
                    with CallWindow(tracee, architecture, window.code, memory) as again:
                        again.call(architecture.close, fd)


def _raise_refused(pid: int, code: int) -> NoReturn:
    name = errno.errorcode.get(code, str(code))
    remedies = {
        errno.EMFILE: "it has as many open files as it may: raise its RLIMIT_NOFILE (prlimit --nofile)",
        errno.EPERM: "a security module refuses it: allow userfaultfd for this program, or use port compare",
        errno.ENOSYS: "the kernel has none: use Linux 6.7 or later, or port compare",
    }
    kind = AccessDeniedError if code == errno.EPERM else UnsupportedError
    raise kind(f"process {pid} can have no userfaultfd", errno=code, pid=pid, reason=name, remedy=remedies.get(code))


def _raise_not_closed(pid: int, result: int) -> NoReturn:
    reason = errno.errorcode.get(-result, str(result))
    raise DirtyLogError(f"process {pid} cannot close its own copy of the userfaultfd", pid=pid, reason=reason, remedy="try again")


def _copy_of(pid: int, fd: int) -> int:
    """Return a copy of another process's descriptor (pidfd_getfd, Linux 5.6)."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise TargetGoneError(f"process {pid} is gone", pid=pid) from error
    try:
        # Safe: integers only.
        copy = int(_libc.syscall(abi.PIDFD_GETFD, pidfd, fd, 0))
        if copy < 0:
            code = ctypes.get_errno()
            raise AccessDeniedError(
                f"cannot take a descriptor of process {pid}",
                errno=code,
                pid=pid,
                reason=f"pidfd_getfd says {errno.errorcode.get(code)}",
                remedy=ATTACH_REMEDY,
            )
        return copy
    finally:
        os.close(pidfd)

"""ptrace(2): one thread of another process, stopped, looked at and changed.

Facts about the kernel that this file relies on (ptrace(2), kernel/ptrace.c):

* A tracee belongs to the *thread* that seized it: every request must come from there, and when that thread ends, however it ends,
  the kernel detaches its tracees, and they run on.
* PTRACE_SEIZE does not stop, and PTRACE_INTERRUPT stops without a signal: the tracee sees neither.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from dirtylog.errors import AccessDeniedError, DirtyLogError, TargetGoneError
from dirtylog.linux.layout import Struct
from dirtylog.linux.ptrace_abi import INTERRUPTED, PEEK, STOPPED, WAIT, WALL, Event, Option, Request, Stop, SystemCall, stop_of

if TYPE_CHECKING:
    import threading

    from dirtylog.linux.layout import Struct as AnyStruct

S = TypeVar("S", bound=Struct)

_SIGINFO_BYTES = 128
ALL_SIGNALS = (1 << 64) - 1
_SPIN_SECONDS = 0.002
_NAP_SECONDS = 0.0002
STOP_SECONDS = 10.0
"""How long a thread may take to stop: one in an uninterruptible sleep takes as long as that sleep."""


class _IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def ptrace(request: Request, tid: int, address: int = 0, data: int = 0) -> None:
    """Make one request. Safe: callers pass integers, or the address of a buffer of the request's length that they keep alive."""
    if _libc.ptrace(request, tid, address, data) == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), request.name)


class Tracee:
    """One thread of another process, seized. Used by the thread that made it only."""

    def __init__(self, pid: int, tid: int, options: Option) -> None:
        self.pid = pid
        self.tid = tid
        self._runs = False
        self.slept_in: SystemCall | None = None
        """The system call in which it slept before it was stopped: afterwards its registers may not tell."""
        try:
            ptrace(Request.SEIZE, tid, 0, options)
        except OSError as error:
            raise self.error(error, "cannot attach to") from error

    def interrupt(self) -> None:
        """Ask it to stop; :meth:`wait` for that. To be asked again after any other stop, which may have taken this away.

        (ptrace_stop in kernel/signal.c: so it is where a timer's signal is fetched, for which the lock is let go.)
        """
        self._ask(Request.INTERRUPT)

    def resume(self, request: Request = Request.CONT, sig: int = 0) -> None:
        """Let it run: CONT, SYSCALL (to the next boundary of a system call) or LISTEN (in a group stop)."""
        self._ask(request, data=sig)

    def take_stop(self) -> None:
        """Take a stop, which other threads of this process then do not see for an end; and the signal with it, should we die."""
        os.waitid(os.P_PID, self.tid, WAIT | os.WSTOPPED | os.WNOHANG)

    def let_run(self, sig: int = 0) -> None:
        """Let it run for good, with a signal that is delivered. The kernel lets it go when this thread ends.

        By then it is not stopped again. A detach makes a thread look whether it has signals, which ends the system call that it has
        just entered.
        """
        self.set_options(Option.NONE)
        self.resume(sig=sig)
        self._runs = True

    def detach(self) -> None:
        """Let it go."""
        if not self._runs:
            self._ask(Request.DETACH)

    def wait(self, seconds: float = STOP_SECONDS) -> Stop:
        """Wait until it stops. :class:`TargetGoneError` if it ends instead."""
        began = time.monotonic()
        while True:
            try:
                found = os.waitid(os.P_PID, self.tid, PEEK | os.WNOHANG)
            except ChildProcessError as error:
                raise TargetGoneError(f"process {self.pid} is gone", pid=self.pid) from error
            if found is not None:
                break
            waited = time.monotonic() - began
            if waited > seconds:
                raise DirtyLogError(
                    f"thread {self.tid} of process {self.pid} does not stop",
                    pid=self.pid,
                    reason=f"it is in an uninterruptible sleep for {seconds:g} s",
                    remedy="try again",
                )
            # A stop takes some 50 us, and a nap half as long again.
            if waited < _SPIN_SECONDS:
                os.sched_yield()
            else:
                time.sleep(_NAP_SECONDS)
        if found.si_code not in STOPPED:
            let_go_if_ended(self.pid, self.tid)
            raise TargetGoneError(f"process {self.pid} is gone", pid=self.pid, reason="it ended")
        return self.look_at(found.si_status)

    def look_at(self, status: int) -> Stop:
        """Return what the si_status of a stop says, and take the stop, unless it has a signal that would be taken with it."""
        stop = stop_of(status)
        if stop.event is not Event.SIGNAL:
            self.take_stop()
        return stop

    def wait_for(self, *events: Event, request: Request) -> Event:
        """Resume with ``request`` until a stop of these kinds; other stops are passed by.

        While every signal is blocked only SIGSTOP can come. It is let through: the process stops, but for this thread, which does
        when it is let go, unless a SIGCONT has come by then.
        """
        self.resume(request)
        while (stop := self.wait()).event not in events:
            if Event.TRAP in events:
                self.interrupt()
            self.resume(request, stop.signal if stop.event is Event.SIGNAL else 0)
        return stop.event

    def stop(self) -> None:
        """Interrupt it, and return when it stands. A signal that was on its way is let through first.

        In a job-control stop it stands already, and goes back to it when it is let go.
        """
        self.slept_in = _sleeps_in(self.pid, self.tid)
        self.interrupt()
        while (stop := self.wait()).event not in INTERRUPTED:
            self.interrupt()
            self.resume(sig=stop.signal if stop.event is Event.SIGNAL else 0)

    def registers(self, kind: type[S], note: int) -> S:
        """Return a register set as a struct."""
        value = kind()
        vector = _IoVector(ctypes.addressof(value), ctypes.sizeof(value))
        self._ask(Request.GETREGSET, note, ctypes.addressof(vector))
        return value

    def set_registers(self, value: AnyStruct, note: int) -> None:
        """Set a register set."""
        vector = _IoVector(ctypes.addressof(value), ctypes.sizeof(value))
        self._ask(Request.SETREGSET, note, ctypes.addressof(vector))

    def raw_registers(self, note: int, nbytes: int) -> bytes:
        """Return a register set of at most ``nbytes``; empty if there is none."""
        buffer = ctypes.create_string_buffer(nbytes)
        vector = _IoVector(ctypes.addressof(buffer), nbytes)
        try:
            self._ask(Request.GETREGSET, note, ctypes.addressof(vector))
        except DirtyLogError:
            return b""
        return buffer.raw[: vector.len]

    def signal_mask(self) -> int:
        """Return the blocked signals, one bit each."""
        mask = ctypes.c_uint64()
        self._ask(Request.GETSIGMASK, ctypes.sizeof(mask), ctypes.addressof(mask))
        return mask.value

    def set_signal_mask(self, blocked: int) -> None:
        """Set the blocked signals."""
        mask = ctypes.c_uint64(blocked)
        self._ask(Request.SETSIGMASK, ctypes.sizeof(mask), ctypes.addressof(mask))

    def signal_sender(self) -> int:
        """Return the process that sent the signal at whose delivery it stopped (si_pid)."""
        info = ctypes.create_string_buffer(_SIGINFO_BYTES)
        self._ask(Request.GETSIGINFO, data=ctypes.addressof(info))
        return int.from_bytes(info.raw[16:20], sys.byteorder)

    def set_options(self, options: Option) -> None:
        """Set the options."""
        self._ask(Request.SETOPTIONS, data=options)

    def configuration(self, request: Request, kind: type[S]) -> S | None:
        """Return what one of the two GET_..._CONFIG requests says; None where the kernel does not have it."""
        value = kind()
        try:
            ptrace(request, self.tid, ctypes.sizeof(value), ctypes.addressof(value))
        except OSError as error:
            if error.errno == errno.ESRCH:
                raise self.error(error, "lost") from error
            return None
        return value

    def error(self, error: OSError, what: str) -> DirtyLogError:
        """Return the typed error for a request that failed."""
        name = errno.errorcode.get(error.errno or 0)
        message = f"{what} thread {self.tid} of process {self.pid}"
        if error.errno == errno.ESRCH:
            return TargetGoneError(message, pid=self.pid, reason="it is gone")
        if error.errno == errno.EPERM:
            return AccessDeniedError(message, errno=error.errno, pid=self.pid, reason="ptrace says EPERM", remedy=ATTACH_REMEDY)
        return DirtyLogError(message, errno=error.errno, pid=self.pid, reason=f"ptrace says {name}")

    def _ask(self, request: Request, address: int = 0, data: int = 0) -> None:
        try:
            ptrace(request, self.tid, address, data)
        except OSError as error:
            raise self.error(error, f"{request.name} failed for") from error


ATTACH_REMEDY = (
    "be root or have CAP_SYS_PTRACE; as the same user, kernel.yama.ptrace_scope must be 0; in a container add --cap-add "
    "SYS_PTRACE; or let the program run dirtylog.agent"
)


def lives(thread: threading.Thread) -> bool:
    """Return whether a thread that has been joined is still there: until it has gone the kernel has not let its tracees go."""
    return thread.native_id is not None and Path(f"/proc/self/task/{thread.native_id}").exists()


def let_go_if_ended(pid: int, tid: int) -> None:
    """Let a thread go that has ended, and that any thread of this process traces.

    A thread that executes a program waits for that, and who attaches to it waits for both. Not the first thread, for which nobody
    waits so: its end is for the parent to see, which may be this process.
    """
    if tid == pid:
        return
    with contextlib.suppress(ChildProcessError):
        found = os.waitid(os.P_PID, tid, WALL | os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if found is not None and found.si_code not in STOPPED:
            os.waitpid(tid, WALL | os.WNOHANG)


def _sleeps_in(pid: int, tid: int) -> SystemCall | None:
    try:
        words = Path(f"/proc/{pid}/task/{tid}/syscall").read_bytes().split()
    except OSError:
        return None
    if len(words) != len(("number", *range(6), "sp", "pc")):  # it runs, or sleeps for another reason
        return None
    try:
        number, (*arguments, stack_pointer, program_counter) = int(words[0]), [int(word, 16) for word in words[1:]]
    except ValueError as error:
        raise DirtyLogError(f"the system call of thread {tid} cannot be read", pid=pid, reason=str(error)) from error
    return SystemCall(number, tuple(arguments), stack_pointer, program_counter)

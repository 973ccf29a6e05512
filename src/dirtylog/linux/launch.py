"""A program started here, so that its writes are logged from its first instruction to its last.

The program is traced from before its start, by a thread of this process. It stops at the first instruction of every program that it
executes, where it is given a userfaultfd: nothing of it has run, and were we to die in that instant it would end with us
(PTRACE_O_EXITKILL, for that instant only). And it stops when it exits, with all its memory, for a last look. Signals that it gets
pass through the tracer. Should we die later, it runs on untraced.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dirtylog.errors import AccessDeniedError, DirtyLogError, InvalidArgumentError, TargetGoneError
from dirtylog.linux.arch import host_architecture
from dirtylog.linux.call_window import CallWindow, find_code, open_memory
from dirtylog.linux.injection import take_userfaultfd
from dirtylog.linux.preflight import GONE, read_status
from dirtylog.linux.ptrace import Tracee
from dirtylog.linux.ptrace_abi import INTERRUPTED, PEEK, STOPPED, WAIT, Event, Option, Request, Stop
from dirtylog.linux.signals import block_signals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dirtylog.linux.userfaultfd import Userfaultfd

_TRACED = Option.TRACESYSGOOD | Option.TRACEEXEC | Option.TRACEEXIT
# Runs in place of the program until it is traced; without the word to go it ends. Python ignores SIGPIPE and SIGXFSZ, and sets
# LC_CTYPE, none of which the program must inherit.
_STUB = """\
import os, signal, sys
with open("/proc/self/environ", "rb") as file:
    environment = dict(one.split(b"=", 1) for one in file.read().split(bytes(1)) if b"=" in one)
for name in ("SIGPIPE", "SIGXFSZ"):
    signal.signal(getattr(signal, name), signal.SIG_DFL)
gate, answer = int(sys.argv[1]), int(sys.argv[2])
os.write(answer, b".")
if not os.read(gate, 1):
    os._exit(127)
os.set_inheritable(gate, False)
os.set_inheritable(answer, False)
try:
    os.execvpe(sys.argv[3], sys.argv[3:], environment)
except OSError as error:
    os.write(answer, str(error.errno).encode())
    os._exit(127)
"""
_OTHER_THREADS_SECONDS = 1.0
_EXEC_SECONDS = 0.001
_END_SECONDS = 5.0
_LOOK_SECONDS = 0.05
_libc = ctypes.CDLL(None, use_errno=True)


class Launched:
    """A program that this process started and traces. It stands at its first instruction until :meth:`go`."""

    def __init__(self, command: Sequence[str]) -> None:
        if not command:
            raise InvalidArgumentError("no command: name a program, and its arguments")
        if not command[0] or any("\0" in word for word in command):
            raise InvalidArgumentError(
                f"{command[0]!r} cannot be executed", reason="a program has a name, and no word has a zero byte in it"
            )
        self._architecture = host_architecture()
        self._uffds: queue.SimpleQueue[Userfaultfd | BaseException] = queue.SimpleQueue()
        self._begun = False
        self._go = threading.Event()
        self._pause_wanted = False
        self._paused = threading.Event()
        self._unpause = threading.Event()
        self.ending = threading.Event()
        """It is exiting, and stands still with all its memory until :meth:`let_end`; or it has ended."""
        self._let_end = threading.Event()
        self.status: int | None = None
        """Its exit status, negative for the signal that ended it; None while it runs."""
        self._stopped = False
        self._thread: threading.Thread | None = None
        try:
            self._start(command)
        except BaseException:
            self._abandon()
            raise

    def _start(self, command: Sequence[str]) -> None:
        gate, open_gate = os.pipe()
        answer, give_answer = os.pipe()
        try:
            try:
                self._process = subprocess.Popen(  # noqa: S603 - to start the user's program is what this is for
                    (sys.executable, "-I", "-S", "-c", _STUB, str(gate), str(give_answer), *command),
                    pass_fds=(gate, give_answer),
                )
            except (OSError, UnicodeError) as error:
                if isinstance(error, OSError) and error.errno != errno.E2BIG:
                    raise
                raise InvalidArgumentError(f"{command[0]!r} cannot be executed", reason=str(error)) from error
            self.pid = self._process.pid
            os.close(give_answer)
            give_answer = -1
            # Popen returns in the middle of the stub's own execve: traced then, it would be taken for the program's.
            os.read(answer, 1)
            thread = threading.Thread(target=self._trace, args=(open_gate,), name="dirtylog-ptrace", daemon=True)
            thread.start()
            self._thread, open_gate = thread, -1
            refused = os.read(answer, 16)
            if refused:
                thread.join()
                raise _cannot_start(command[0], int(refused))
        finally:
            for fd in (gate, open_gate, answer, give_answer):
                if fd >= 0:
                    os.close(fd)

    def _abandon(self) -> None:
        """Leave nothing of a start that failed."""
        if not hasattr(self, "_process"):
            return
        if self._thread is None:
            self._process.kill()
            self._process.wait()
        elif self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.close()

    def userfaultfd(self) -> Userfaultfd | None:
        """Return the userfaultfd of the program that it executes now. One call for each program that is logged.

        None if it got none: another thread than the first has executed the program, and it is not traced any more.
        """
        try:
            while self._uffds.empty() and read_status(self.pid).tracer:
                time.sleep(_EXEC_SECONDS)
            found = self._uffds.get_nowait()
            while not self._uffds.empty():
                # Of a program that has executed another since.
                if not isinstance(found, BaseException):
                    found.close()
                found = self._uffds.get_nowait()
        except queue.Empty:
            return None
        if isinstance(found, BaseException):
            raise found
        return found

    @property
    def started(self) -> bool:
        """Whether it was let go."""
        return self._go.is_set()

    def go(self) -> None:
        """Let it run: for the first time, or after a :meth:`pause`."""
        self._go.set()
        self._pause_wanted = False
        self._unpause.set()

    def pause(self) -> None:
        """Return when its first thread stands still. Others are :class:`~dirtylog.linux.freezer.Freezer`'s."""
        if self._pause_wanted or not self._go.is_set() or self.ending.is_set():
            return
        self._paused.clear()
        self._unpause.clear()
        self._pause_wanted = True
        # To the first thread only, whose tracer takes it away: the program never sees it. No other signal can be blocked as little.
        # Safe: integers only.
        _libc.syscall(self._architecture.tgkill, self.pid, self.pid, int(signal.SIGSTOP))
        while not self._paused.wait(_LOOK_SECONDS) and not self.ending.is_set():
            if self._stopped or read_status(self.pid, self.pid).state in GONE:
                return  # somebody else has stopped it, or it has ended before other threads

    def let_end(self) -> None:
        """Let it end: the last look has been taken."""
        self._let_end.set()

    def end(self) -> None:
        """Let it end, and wait for that, if it is ending."""
        self.let_end()
        if self.ending.is_set() and self._thread is not None:
            self._thread.join(_END_SECONDS)

    def close(self) -> None:
        """End it, if it has not ended: SIGTERM, and SIGKILL after five seconds. A second call does nothing."""
        self.let_end()
        for sig in (signal.SIGTERM, signal.SIGKILL):
            if self._thread is None or not self._thread.is_alive():
                break
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sig)
            self.go()
            self._thread.join(_END_SECONDS)
        while not self._uffds.empty():
            left = self._uffds.get_nowait()
            if not isinstance(left, BaseException):
                left.close()

    # --- in the tracer's thread

    def _trace(self, gate: int) -> None:
        block_signals()
        try:
            tracee = Tracee(self.pid, self.pid, _TRACED | Option.EXITKILL)
        except DirtyLogError as error:
            self._uffds.put(error)
            self._process.kill()
            self._ended(os.waitpid(self.pid, 0)[1])
            return
        else:
            os.write(gate, b".")
        finally:
            os.close(gate)
        try:
            self._follow(tracee)
        except BaseException as error:  # noqa: BLE001 - it is raised where the userfaultfd is waited for
            self._uffds.put(error)
        self.ending.set()
        self._paused.set()

    def _follow(self, tracee: Tracee) -> None:
        while self.status is None:
            try:
                # Not by its number: who waits for that sleeps on when another thread executes a program and takes the number over.
                found = os.waitid(os.P_ALL, 0, PEEK)
            except ChildProcessError:
                self._wait_untraced()
                return
            if found is not None and found.si_code in STOPPED:
                stop = tracee.look_at(found.si_status)
                # Where it has been killed meanwhile, its end is what comes next.
                with contextlib.suppress(TargetGoneError):
                    self._answer(tracee, stop)
            else:
                self._ended(os.waitpid(self.pid, WAIT)[1])

    def _wait_untraced(self) -> None:
        """Wait for its end only: another thread than the first has executed a program, which none of ours traces."""
        pidfd = os.pidfd_open(self.pid)
        try:
            select.select([pidfd], [], [])
        finally:
            os.close(pidfd)
        self._ended(os.waitpid(self.pid, 0)[1])

    def _answer(self, tracee: Tracee, stop: Stop) -> None:
        sig = 0
        self._stopped = stop.event is Event.GROUP
        if stop.event is Event.EXEC:
            self._give_userfaultfd(tracee)
        elif stop.event is Event.EXIT:
            if self._begun:
                self._hold_end()
        elif stop.event is Event.GROUP:
            tracee.resume(Request.LISTEN)
            return
        elif stop.event is Event.SIGNAL:
            if stop.signal == signal.SIGSTOP and self._pause_wanted and tracee.signal_sender() == os.getpid():
                tracee.take_stop()
                self._paused.set()
                self._unpause.wait()
            else:
                sig = stop.signal
        tracee.resume(sig=sig)

    def _give_userfaultfd(self, tracee: Tracee) -> None:
        """Go on from the middle of execve to the program's first instruction, and make a userfaultfd there."""
        self._begun = True
        tracee.set_options(_TRACED | Option.EXITKILL)
        tracee.interrupt()
        tracee.wait_for(*INTERRUPTED, request=Request.CONT)
        try:
            with open_memory(self.pid) as memory:
                code = find_code(self.pid, self._architecture, memory, begun=False)
                uffd = take_userfaultfd(CallWindow(tracee, self._architecture, code, memory, self_restoring=False))
        except DirtyLogError as error:
            self._uffds.put(error)
        else:
            self._put_enabled(uffd)
        tracee.set_options(_TRACED)
        self._go.wait()
        # Should somebody have stopped the process meanwhile, this shows it.
        tracee.interrupt()

    def _put_enabled(self, uffd: Userfaultfd) -> None:
        try:
            uffd.enable()
        except DirtyLogError as error:
            uffd.close()
            self._uffds.put(error)
        else:
            self._uffds.put(uffd)

    def _hold_end(self) -> None:
        """Wait for the last look, if this is the end: its first thread may end long before the others."""
        began = time.monotonic()
        tasks = Path(f"/proc/{self.pid}/task")
        while sum(1 for _ in tasks.iterdir()) > 1:
            if time.monotonic() - began > _OTHER_THREADS_SECONDS:
                return
            time.sleep(0.001)
        self.ending.set()
        self._let_end.wait()

    def _ended(self, status: int) -> None:
        self.status = self._process.returncode = os.waitstatus_to_exitcode(status)


def _cannot_start(program: str, code: int) -> DirtyLogError:
    reason = os.strerror(code)
    if code in (errno.EACCES, errno.EPERM):
        return AccessDeniedError(f"{program!r} may not be executed", errno=code, reason=reason)
    return InvalidArgumentError(
        f"{program!r} cannot be executed", errno=code, reason=reason, remedy="name a program in PATH, or its path"
    )

"""Processes to be tracked that look after themselves: victim.c, compiled when first wanted, and what is seen from outside."""

from __future__ import annotations

import os
import platform
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import pytest

from built import built, compiler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_REPLY_SECONDS = 60.0
SOON = 20.0
"""How long a test waits for what must come: long enough for a machine that does much else."""

NOBODY = 65534
GENTLE = (
    *("nanosleep", "clock_nanosleep", "poll", "ppoll", "select", "pselect", "futex", "futex_until", "read", "read_timer", "wait4"),
    *("pause", "sigsuspend"),
)
"""Kinds of threads whose system call goes on after any stop."""

EINTR_PRONE = (
    *("epoll_wait", "epoll_pwait", "epoll_pwait2", "epoll_forever", "sigtimedwait", "semtimedop", "semop", "accept", "accept4"),
    *("recvfrom", "read_socket", "io_getevents", "io_uring_enter"),
)
"""Kinds of threads whose system call the kernel ends with EINTR after any stop."""


def missing_victims() -> str | None:
    """Return what keeps this machine from starting victims, or from making system calls in them."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "system calls are injected on Linux on x86_64 only"
    if compiler() is None:
        return "no C compiler"
    from dirtylog.linux.userfaultfd import missing_uffd  # noqa: PLC0415 - it needs Linux

    missing = missing_uffd()
    return None if missing is None else f"no asynchronous userfaultfd here: {missing}"


needs_victims = pytest.mark.skipif(missing_victims() is not None, reason=missing_victims() or "")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do this")


def program(*flags: str) -> Path:
    """Return the program, compiled with ``flags``; skip the test where that cannot be."""
    try:
        return built("victim.c", *flags)
    except subprocess.CalledProcessError:
        if not flags:
            raise
        pytest.skip(f"cannot compile with {' '.join(flags)}")


class Worker(NamedTuple):
    """A thread of a victim; ``counter`` is the address at which it counts its rounds."""

    kind: str
    tid: int
    counter: int


class Report(NamedTuple):
    """What a thread has to say: EINTRs although no handler ran, its longest round in microseconds, and how many handlers ran."""

    kind: str
    tid: int
    rounds: int
    spurious: int
    slowest: int
    handled: int


class Victim:
    """A running victim.c. On exit of the context it must say that it is well, unless the test has ended it."""

    def __init__(self, *words: str, flags: Sequence[str] = (), user: int | None = None) -> None:
        groups: dict[str, Any] = {} if user is None else {"user": user, "group": user, "extra_groups": ()}
        self._process = subprocess.Popen(
            (program(*flags), *words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, **groups
        )
        self.pid = self._process.pid
        self.workers: list[Worker] = []
        self.ticks = 0
        self._buffer = b""
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Read what it says of itself: after its start, and after it has executed itself."""
        self.workers.clear()
        while (line := self.line()) != "ready":
            word, *rest = line.split()
            if word == "thread":
                self.workers.append(Worker(rest[0], int(rest[1]), int(rest[2], 16)))
            elif word == "ticks":
                self.ticks = int(rest[0], 16)
            elif word != "soon":
                pytest.fail(f"the victim does not start: {line}")

    def line(self) -> str:
        """Return the next line that it says; fail when it ends or hangs instead."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + _REPLY_SECONDS
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                pytest.fail(f"the victim says nothing: {Path(f'/proc/{self.pid}/status').read_text(encoding='ascii')}")
            said = os.read(self._process.stdout.fileno(), 1 << 16)
            if not said:
                pytest.fail(f"the victim ended: {self._process.wait()}")
            self._buffer += said
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def order(self, text: str) -> None:
        """Tell it to do something."""
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode() + b"\n")

    def check(self) -> None:
        """Let every thread do two rounds, and look whether all is as it should be: with it, and with its tracer."""
        self.order("check")
        self._must_say_ok()
        traced = [tid for tid in threads_of(self.pid) if tracer_of(self.pid, tid)]
        assert not traced, f"still traced: {traced}"

    def reports(self) -> list[Report]:
        """Return what its threads have to say."""
        self.order("report")
        lines = list(iter(self.line, "end"))
        return [Report(kind, *(int(number) for number in rest)) for kind, *rest in (line.split() for line in lines)]

    def forget(self) -> None:
        """Let the next reports begin here."""
        self.order("forget")
        self._must_say_ok()

    def spurious(self) -> dict[str, int]:
        """Return the kinds of threads that had EINTR although no signal was handled, and how often."""
        return {report.kind: report.spurious for report in self.reports() if report.spurious}

    def terminate(self) -> None:
        """Have one that has a single thread say how it is, and end."""
        self._process.send_signal(signal.SIGTERM)
        self._must_say_ok()
        self._must_exit_with_0()

    def kill(self) -> int:
        """End it, and return its exit status."""
        self._process.kill()
        return self._process.wait(SOON)

    def wait(self) -> int:
        """Return its exit status once it has ended."""
        return self._process.wait(SOON)

    @property
    def ended(self) -> bool:
        """Whether it is known to have ended."""
        return self._process.poll() is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and not self.ended and self.workers and self.workers[0].tid != self.pid:
                self.order("quit")
                self._must_say_ok()
                self._must_exit_with_0()
        finally:
            self.close()

    def _must_say_ok(self) -> None:
        said = self.line()
        assert said == "ok", said

    def _must_exit_with_0(self) -> None:
        status = self.wait()
        assert status == 0, f"exit status {status}"

    def close(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def tracer_of(pid: int, tid: int | None = None) -> int:
    """Return the process that traces a thread, or 0; 0 as well when the thread has ended."""
    try:
        lines = Path(f"/proc/{pid}/task/{tid or pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("TracerPid:"))


def state_of(pid: int) -> str:
    """Return the letter of a process's state."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    return next(line.split()[1] for line in lines if line.startswith("State:"))


def threads_of(pid: int) -> list[int]:
    """Return the threads of a process."""
    return [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]


def descriptors_of(pid: int) -> dict[int, str]:
    """Return the open files of a process, by descriptor."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except FileNotFoundError:
            continue
    return found


def watched_mappings(pid: int) -> int:
    """Return how many mappings of a process a userfaultfd write-protects."""
    text = Path(f"/proc/{pid}/smaps").read_text(encoding="utf-8", errors="surrogateescape")
    return sum("uw" in line.split() for line in text.splitlines() if line.startswith("VmFlags:"))


@contextmanager
def same_descriptors(pid: int) -> Iterator[None]:
    """Require that a process has the same open files soon after the block; ``pid`` may be this process."""
    before = descriptors_of(pid)
    yield
    deadline = time.monotonic() + 1.0
    while new := {fd: name for fd, name in descriptors_of(pid).items() if fd not in before}:
        assert time.monotonic() < deadline, f"left open: {new}"
        time.sleep(0.001)


def eventually(true: Callable[[], bool], what: str) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


def only_thread(monkeypatch: pytest.MonkeyPatch, tid: int) -> None:
    """Have injections choose this thread."""
    from dirtylog.linux import injection  # noqa: PLC0415 - it needs Linux

    monkeypatch.setattr(injection, "threads_by_preference", lambda *_: [tid])

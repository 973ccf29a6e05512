"""A process frozen and let go: every thread stands still, whatever it does, and afterwards none can tell that it did."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from dirtylog import DirtyLogError, TargetGoneError
from dirtylog.linux.freezer import Freezer
from dirtylog.linux.ptrace import Tracee
from victims import (
    EINTR_PRONE,
    GENTLE,
    Victim,
    eventually,
    needs_victims,
    program,
    state_of,
    threads_of,
    tracer_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_victims

_WHILE = 0.03
_FREEZE_AND_WAIT = """\
import sys, time
from dirtylog.linux.freezer import Freezer
Freezer(int(sys.argv[1])).freeze()
print("frozen", flush=True)
time.sleep(60)
"""
# Is slow to go on once it holds one thread besides the first.
_FREEZE_SLOWLY = """\
import sys, time
from dirtylog import DirtyLogError
from dirtylog.linux.freezer import Freezer
from dirtylog.linux.ptrace import Tracee
stop, pid = Tracee.stop, int(sys.argv[1])
def stop_and_be_slow(tracee):
    stop(tracee)
    time.sleep(0.2 if tracee.tid != pid else 0)
Tracee.stop = stop_and_be_slow
print("ready", flush=True)
sys.stdin.readline()
freezer = Freezer(pid)
try:
    freezer.freeze()
except DirtyLogError:
    pass
freezer.thaw()
print("done", flush=True)
"""


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Wait two seconds for a stop instead of ten, and leave no thread behind that traces."""
    monkeypatch.setattr(Tracee.wait, "__defaults__", (2.0,))
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "dirtylog-ptrace"]


@contextlib.contextmanager
def freezer_of(pid: int) -> Iterator[Freezer]:
    """Give a freezer that lets go in the end, or what it holds could not even be killed."""
    freezer = Freezer(pid)
    try:
        yield freezer
    finally:
        freezer.thaw()


class Seen:
    """Numbers of a victim's, read from outside."""

    def __init__(self, victim: Victim) -> None:
        # A thread's, which lives when the first one has ended.
        tid = victim.workers[0].tid
        self._memory = os.open(f"/proc/{victim.pid}/task/{tid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        self._addresses = [victim.ticks, *(worker.counter for worker in victim.workers)]

    def numbers(self) -> list[int]:
        return [int.from_bytes(os.pread(self._memory, 8, address), "little") for address in self._addresses]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._memory)


def test_no_thread_runs_until_it_is_let_go() -> None:
    with (
        Victim("compute", "compute+ticked", "poll@1", "epoll_wait@1", "sequence@1", "rseq*2") as victim,
        Seen(victim) as seen,
        freezer_of(victim.pid) as freezer,
    ):
        for _ in range(5):
            assert not freezer.frozen
            freezer.freeze()
            assert freezer.frozen
            assert all(tracer_of(victim.pid, tid) for tid in threads_of(victim.pid))  # type: ignore[unreachable]  # it changes meanwhile
            before = seen.numbers()
            time.sleep(_WHILE)
            assert seen.numbers() == before
            freezer.thaw()
            assert not freezer.frozen
            victim.check()
            assert all(now > then for now, then in zip(seen.numbers()[1:], before[1:], strict=True))


def test_threads_that_are_made_meanwhile_are_stopped_too() -> None:
    with Victim("--spawn=8", "compute", "poll@1") as victim, Seen(victim) as seen, freezer_of(victim.pid) as freezer:
        for _ in range(10):
            freezer.freeze()
            before, threads = seen.numbers(), set(threads_of(victim.pid))
            time.sleep(0.005)
            assert seen.numbers() == before
            assert set(threads_of(victim.pid)) == threads
            freezer.thaw()
            eventually(lambda before=before: seen.numbers()[0] > before[0], "the threads do not run")  # type: ignore[misc]  # a stand-in
        victim.check()


@pytest.mark.parametrize("kind", [*GENTLE, *EINTR_PRONE])
def test_a_system_call_goes_on_as_if_nothing_had_been(kind: str) -> None:
    with Victim(f"{kind}@25") as victim, freezer_of(victim.pid) as freezer:
        for _ in range(5):
            freezer.freeze()
            time.sleep(0.003)
            freezer.thaw()
            time.sleep(0.003)
        victim.check()
        assert victim.spurious() == {}


@pytest.mark.parametrize("number", [signal.SIGCHLD, signal.SIGWINCH, signal.SIGURG, signal.SIGCONT])
def test_a_signal_that_is_ignored_interrupts_nothing(number: signal.Signals) -> None:
    """The kernel keeps it for a tracer, who must not take it for a reason to end a system call."""
    with Victim("--single", "epoll_wait@50") as victim, Seen(victim) as seen, freezer_of(victim.pid) as freezer:
        for _ in range(3):
            freezer.freeze()
            os.kill(victim.pid, number)
            freezer.thaw()
            before = seen.numbers()
            eventually(lambda before=before: seen.numbers() > before, "it does nothing")  # type: ignore[misc]  # a stand-in
        victim.terminate()
        assert victim.line() == "spurious 0"


def test_a_signal_that_comes_meanwhile_is_handled_afterwards() -> None:
    with Victim("--single", "epoll_wait@60000") as victim, freezer_of(victim.pid) as freezer:
        freezer.freeze()
        os.kill(victim.pid, signal.SIGTERM)
        time.sleep(_WHILE)
        assert not victim.ended
        freezer.thaw()
        # It ends its wait, which has no other end.
        assert victim.line() == "ok"


def test_a_death_of_the_freezer_lets_the_target_run() -> None:
    with Victim("compute", "poll@1", "nanosleep@1", "sequence@1") as victim, Seen(victim) as seen:
        freezing = subprocess.Popen((sys.executable, "-c", _FREEZE_AND_WAIT, str(victim.pid)), stdout=subprocess.PIPE)
        assert freezing.stdout is not None
        assert freezing.stdout.readline() == b"frozen\n"
        before = seen.numbers()
        time.sleep(_WHILE)
        assert seen.numbers() == before
        freezing.kill()
        assert freezing.wait() == -signal.SIGKILL
        freezing.stdout.close()
        victim.check()
        assert victim.spurious() == {}


def test_a_second_call_does_nothing() -> None:
    with Victim("compute", "poll@5") as victim, freezer_of(victim.pid) as freezer:
        freezer.thaw()
        freezer.freeze()
        freezer.freeze()
        freezer.thaw()
        freezer.thaw()
        victim.check()


def test_a_process_that_has_ended_and_is_not_waited_for() -> None:
    with Victim("compute") as victim, freezer_of(victim.pid) as freezer:
        os.kill(victim.pid, signal.SIGKILL)
        eventually(lambda: state_of(victim.pid) == "Z", "it does not end")
        with pytest.raises(TargetGoneError):
            freezer.freeze()
        assert not freezer.frozen
        assert victim.kill() == -signal.SIGKILL


def test_a_process_that_is_not_there() -> None:
    with Victim("compute") as victim, freezer_of(victim.pid) as freezer:
        victim.kill()
        for _ in range(2):
            with pytest.raises(TargetGoneError):
                freezer.freeze()
            assert not freezer.frozen


def test_a_process_killed_while_it_is_frozen() -> None:
    with Victim("compute", "epoll_wait@5") as victim, freezer_of(victim.pid) as freezer:
        freezer.freeze()
        os.kill(victim.pid, signal.SIGKILL)
        eventually(lambda: state_of(victim.pid) == "Z", "it does not end")
        freezer.thaw()
        assert victim.wait() == -signal.SIGKILL


@pytest.mark.parametrize("name", ["registers", "set_registers", "detach"])
def test_a_process_killed_while_it_is_let_go(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    call = getattr(Tracee, name)

    def kill_and_call(tracee: Tracee, *arguments: Any) -> Any:
        os.kill(tracee.pid, signal.SIGKILL)
        eventually(lambda: state_of(tracee.pid) == "Z", "it does not end")
        return call(tracee, *arguments)

    with Victim("--single", "epoll_wait@60000") as victim, freezer_of(victim.pid) as freezer:
        # Its registers are set, if it is stopped in this call.
        call_of_it = Path(f"/proc/{victim.pid}/syscall")
        eventually(lambda: call_of_it.read_text(encoding="ascii").startswith("232 "), "it does not wait")
        freezer.freeze()
        monkeypatch.setattr(Tracee, name, kill_and_call)
        freezer.thaw()
        assert victim.wait() == -signal.SIGKILL


def test_a_process_that_is_stopped_already_stays_so() -> None:
    with Victim("compute", "poll@5") as victim, Seen(victim) as seen, freezer_of(victim.pid) as freezer:
        os.kill(victim.pid, signal.SIGSTOP)
        eventually(lambda: state_of(victim.pid) == "T", "it does not stop")
        before = seen.numbers()
        freezer.freeze()
        assert freezer.frozen
        freezer.thaw()
        eventually(lambda: state_of(victim.pid) == "T", "it is not stopped any more")
        assert seen.numbers() == before
        os.kill(victim.pid, signal.SIGCONT)
        victim.check()


def test_a_process_stopped_and_let_go_by_others_while_it_is_frozen() -> None:
    with Victim("compute", "poll@5") as victim, Seen(victim) as seen, freezer_of(victim.pid) as freezer:
        for signals in ((signal.SIGSTOP, signal.SIGCONT), (signal.SIGSTOP,)):
            freezer.freeze()
            before = seen.numbers()
            for number in signals:
                os.kill(victim.pid, number)
            time.sleep(_WHILE)
            assert seen.numbers() == before
            freezer.thaw()
            if signals[-1] == signal.SIGSTOP:
                eventually(lambda: state_of(victim.pid) == "T", "the stop is lost")
                os.kill(victim.pid, signal.SIGCONT)
            victim.check()


def test_a_process_whose_first_thread_has_ended() -> None:
    with Victim("--leaves", "compute", "poll@5") as victim, Seen(victim) as seen, freezer_of(victim.pid) as freezer:
        eventually(lambda: state_of(victim.pid) == "Z", "the first thread does not end")
        freezer.freeze()
        before = seen.numbers()
        time.sleep(_WHILE)
        assert seen.numbers() == before
        freezer.thaw()
        victim.check()


def test_another_thread_that_executes_a_program_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the place, and the number, of the first thread, which is stopped already."""
    stop = Tracee.stop
    begun: list[int] = []

    def stop_and_be_late(tracee: Tracee) -> None:
        stop(tracee)
        if not begun:
            begun.append(tracee.tid)
            time.sleep(0.1)

    with Victim("compute", "poll@5") as victim, freezer_of(victim.pid) as freezer:
        victim.order("exec-other")
        assert victim.line() == "soon"
        monkeypatch.setattr(Tracee, "stop", stop_and_be_late)
        # An error is as good: it may be tried again.
        with contextlib.suppress(DirtyLogError):
            freezer.freeze()
            running = [tid for tid in threads_of(victim.pid) if not tracer_of(victim.pid, tid)]
            assert running == []
        freezer.thaw()
        victim.wait_until_ready()
        victim.check()


def test_a_thread_that_executes_a_program_once_others_are_held() -> None:
    """It waits for the others to end, which they do when they are waited for; and whoever attaches to it meanwhile waits for it."""
    with Victim("compute", "compute") as victim:
        freezing = subprocess.Popen(
            (sys.executable, "-c", _FREEZE_SLOWLY, str(victim.pid)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert freezing.stdout is not None
        try:
            assert freezing.stdout.readline() == "ready\n"
            victim.order("exec-other")
            assert victim.line() == "soon"
            said, _ = freezing.communicate("go\n", timeout=10)
            assert said == "done\n"
        finally:
            freezing.kill()
            freezing.communicate()
            victim.wait_until_ready()
        victim.check()


def test_a_process_that_waits_for_a_child_of_vfork() -> None:
    """Nothing stops it: after a while that is said, and it goes on."""
    target = subprocess.Popen((program(), "--vfork"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert target.stdout is not None
    assert target.stdout.readline() == b"ready\n"
    freezer = Freezer(target.pid)
    with pytest.raises(DirtyLogError, match="does not stop") as caught:
        freezer.freeze()
    assert caught.value.remedy == "try again"
    assert not freezer.frozen
    assert target.communicate(b"x")[0] == b"ok\n"
    assert target.returncode == 0


def test_exit_of_a_process_while_it_is_being_frozen() -> None:
    for microseconds in range(0, 4000, 100):
        target = subprocess.Popen((program(), f"--live={microseconds}"))
        with freezer_of(target.pid) as freezer, contextlib.suppress(TargetGoneError):
            freezer.freeze()
        assert target.wait() == 0

"""What other processes, and the target's own threads, do to the target while a system call is made in it."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from dirtylog import DirtyLogError, TargetGoneError
from dirtylog.linux import call_window, injection
from dirtylog.linux.injection import inject_userfaultfd
from dirtylog.linux.mappings import read_mappings
from dirtylog.linux.ptrace import Tracee
from dying_injector import DyingInjector
from injection_stages import FEWEST_STAGES, Stages, once
from known_limits import known_limit
from victims import Victim, eventually, needs_victims, only_thread, program, same_descriptors, state_of, threads_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = needs_victims

_TGKILL = 234
_libc = ctypes.CDLL(None)


@pytest.fixture(autouse=True)
def _ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """See that an injection ends: after two seconds of a wait in vain instead of ten, and after many requests of one kind."""
    monkeypatch.setattr(Tracee.wait, "__defaults__", (2.0,))
    Stages(lambda *_: None, monkeypatch.setattr)


def send_to_thread(victim: Victim, tid: int, number: signal.Signals) -> None:
    """Send a signal to a thread."""
    assert _libc.syscall(_TGKILL, victim.pid, tid, int(number)) == 0


def outcome(inject: Callable[[], Any]) -> DirtyLogError | None:
    """Inject, and return the error. Another kind of exception fails the test, and so does a descriptor that is left here."""
    with same_descriptors(os.getpid()):
        try:
            inject().close()
        except DirtyLogError as error:
            return error
    return None


def every_stage(monkeypatch: pytest.MonkeyPatch, victim: Victim, tid: int, action: Callable[[], object]) -> Iterator[str]:
    """Inject with an action before each stage in turn, and give the stage's name after each injection."""
    for number in range(100):
        with monkeypatch.context() as patch:
            only_thread(patch, tid)
            stages = Stages(once(number, action), patch.setattr)
            error = outcome(lambda: inject_userfaultfd(victim.pid))
        if number >= len(stages.names):
            assert number >= FEWEST_STAGES
            return
        assert error is None, f"before {stages.names[number]}: {error!r}"
        yield f"before {stages.names[number]}"


@pytest.mark.parametrize("kind", ["compute", "poll@5"])
def test_a_target_killed_in_any_stage_is_gone(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    done = False
    number = 0
    while not done:
        with Victim(kind) as victim, monkeypatch.context() as patch:

            def kill(pid: int = victim.pid) -> None:
                os.kill(pid, signal.SIGKILL)
                eventually(lambda: state_of(pid) == "Z" or not threads_of(pid), "it does not end")

            only_thread(patch, victim.workers[0].tid)
            stages = Stages(once(number, kill), patch.setattr)
            error = outcome(lambda pid=victim.pid: inject_userfaultfd(pid))  # type: ignore[misc]  # a stand-in
            done = number >= len(stages.names)
            assert isinstance(error, TargetGoneError) or done, f"before {stages.names[number]}: {error!r}"
            victim.kill()
        number += 1
    assert number >= FEWEST_STAGES


def test_the_exit_status_of_a_child_that_ends_in_the_window_is_its_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    with Victim("compute") as victim, monkeypatch.context() as patch:
        only_thread(patch, victim.pid)
        Stages(once(14, lambda: os.kill(victim.pid, signal.SIGKILL)), patch.setattr)
        outcome(lambda: inject_userfaultfd(victim.pid))
        assert victim.wait() == -signal.SIGKILL


@known_limit
def test_a_child_that_another_thread_waits_for() -> None:
    """The kernel may give that wait a stop: it takes it for the end, and the injector waits for the stop in vain."""
    child = subprocess.Popen((program(), "--live=300000"))
    statuses: list[int] = []
    waiting = threading.Thread(target=lambda: statuses.append(os.waitpid(child.pid, 0)[1]))
    waiting.start()
    try:
        for _ in range(3):
            assert outcome(lambda: inject_userfaultfd(child.pid)) is None
    finally:
        waiting.join()
        child.returncode = 0
    assert statuses == [0]


@pytest.mark.parametrize("kind", ["compute", "poll@5", "epoll_wait@5"])
def test_a_target_that_is_stopped_in_any_stage_stays_stopped(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    with Victim(kind, "compute") as victim, same_descriptors(victim.pid):
        for stage in every_stage(monkeypatch, victim, victim.workers[0].tid, lambda: os.kill(victim.pid, signal.SIGSTOP)):
            eventually(lambda: state_of(victim.pid) == "T", f"it is not stopped: {stage}")
            os.kill(victim.pid, signal.SIGCONT)
            victim.check()


@pytest.mark.parametrize("kind", ["compute", "poll@5"])
def test_a_target_that_is_stopped_and_let_go_in_any_stage_runs(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    def stop_and_go() -> None:
        os.kill(victim.pid, signal.SIGSTOP)
        os.kill(victim.pid, signal.SIGCONT)

    with Victim(kind, "compute") as victim, same_descriptors(victim.pid):
        for _ in every_stage(monkeypatch, victim, victim.workers[0].tid, stop_and_go):
            victim.check()


def test_a_stop_that_was_undone_some_stages_later_stays_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop that the injector holds back must not come after the SIGCONT that undid it."""
    with Victim("compute", "compute") as victim:
        for number in range(4, FEWEST_STAGES):
            with monkeypatch.context() as patch:
                only_thread(patch, victim.workers[0].tid)

                def act(stage: int, _name: str, done: bool, number: int = number) -> None:
                    if not done and stage in (number, number + 3):
                        os.kill(victim.pid, signal.SIGSTOP if stage == number else signal.SIGCONT)

                Stages(act, patch.setattr)
                assert outcome(lambda: inject_userfaultfd(victim.pid)) is None
            victim.check()


def test_storms_of_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    storm = random.Random(7)
    with Victim("compute", "poll@3", "epoll_wait@3", "sequence@1") as victim, same_descriptors(victim.pid):
        blower = subprocess.Popen(("sh", "-c", f"while sleep 0.001; do kill -STOP {victim.pid}; kill -CONT {victim.pid}; done"))
        try:
            for _ in range(60):
                only_thread(monkeypatch, storm.choice(victim.workers).tid)
                error = outcome(lambda: inject_userfaultfd(victim.pid))
                assert error is None or "is stopped" in str(error)
        finally:
            blower.kill()
            blower.wait()
        os.kill(victim.pid, signal.SIGCONT)
        victim.check()


@pytest.mark.parametrize("kind", ["epoll_forever@60000", "semop@60000", "read@60000", "pause@60000", "sigsuspend@60000"])
def test_a_signal_in_any_stage_interrupts_the_system_call(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A program may rely on it: its handler says that it is to end, and its wait, which has no end, returns."""
    with Victim(kind) as victim:
        worker = victim.workers[0]
        memory = os.open(f"/proc/{victim.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        pread = os.pread
        try:

            def rounds() -> int:
                return int.from_bytes(pread(memory, 8, worker.counter), "little")

            before = rounds()
            for stage in every_stage(monkeypatch, victim, worker.tid, lambda: send_to_thread(victim, worker.tid, signal.SIGUSR1)):
                eventually(lambda before=before: rounds() > before, f"the call goes on: {stage}")  # type: ignore[misc]  # a stand-in
                before = rounds()
                time.sleep(0.002)
        finally:
            os.close(memory)
        assert victim.spurious() == {}
        victim.close()


@pytest.mark.parametrize("order", ["exec", "exec-other"])
def test_a_target_that_executes_a_program_before_it_is_stopped(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    find_code = call_window.find_code

    def find_and_be_late(*arguments: Any, **named: Any) -> Any:
        patch.setattr(injection, "find_code", find_code)
        found = find_code(*arguments, **named)
        begun = read_mappings(victim.pid)[0].start
        victim.order(order)
        eventually(lambda: [one.start for one in read_mappings(victim.pid)][:1] not in ([], [begun]), "it does not execute")
        return found

    with Victim("compute", "poll@5") as victim:
        with monkeypatch.context() as patch:
            # Into the first thread: who executes waits until the tracer of any other has seen that end.
            only_thread(patch, victim.pid)
            patch.setattr(injection, "find_code", find_and_be_late)
            outcome(lambda: inject_userfaultfd(victim.pid))
        victim.wait_until_ready()
        with same_descriptors(victim.pid):
            victim.check()
            inject_userfaultfd(victim.pid).close()


def test_a_target_whose_other_thread_executes_a_program_in_any_stage() -> None:
    """That thread waits for the one that is stopped to end, and for its tracer to know: who attaches to another waits for both."""
    with DyingInjector() as injector, Victim("compute", "poll@5") as victim:
        for stage in range(FEWEST_STAGES):
            tid = victim.pid if stage % 2 else victim.workers[0].tid
            victim.order("exec-other")
            assert victim.line() == "soon"
            end = injector.inject(victim.pid, tid, stage=stage, after=False, pause=0.06)
            assert end.signal == 0, end.stage
            assert end.exit in (0, 1), end.stage
            victim.wait_until_ready()
            victim.check()


def test_a_target_that_executes_one_program_after_the_other() -> None:
    runs = subprocess.Popen((program(), "--exec=1500"), stdout=subprocess.PIPE)
    tries = 0
    while runs.poll() is None:
        outcome(lambda: inject_userfaultfd(runs.pid))
        tries += 1
    assert tries
    assert runs.communicate()[0] == b"ok\n"
    assert runs.returncode == 0


def test_targets_that_end_at_any_moment() -> None:
    lives = random.Random(5)
    for _ in range(80):
        target = subprocess.Popen((program(), f"--live={lives.randrange(5000)}"))
        time.sleep(lives.uniform(0, 0.003))
        error = outcome(lambda pid=target.pid: inject_userfaultfd(pid))  # type: ignore[misc]  # a stand-in
        assert error is None or isinstance(error, TargetGoneError), repr(error)
        assert target.wait() == 0


def test_threads_that_come_and_go_while_one_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The youngest first: most of them end before anything can be done with them, and the process does not."""
    with Victim("--spawn=3", "poll@5") as victim, same_descriptors(victim.pid):
        monkeypatch.setattr(injection, "threads_by_preference", lambda *_: sorted(threads_of(victim.pid), reverse=True))
        for _ in range(150):
            inject_userfaultfd(victim.pid).close()
        victim.check()

"""Injections that fail half-way, for any reason at any stage: the target is as it was, and nothing is left open anywhere."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from dirtylog import AccessDeniedError, DirtyLogError
from dirtylog.linux import injection
from dirtylog.linux.arch.x86_64 import X86_64
from dirtylog.linux.injection import inject_userfaultfd
from dirtylog.linux.ptrace import Tracee
from dirtylog.linux.ptrace_abi import Request
from dirtylog.linux.userfaultfd import Userfaultfd
from injection_stages import FEWEST_STAGES, Stages, once
from interrupts import interrupt
from victims import SOON, Victim, descriptors_of, needs_victims, only_thread, same_descriptors, watched_mappings

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = needs_victims

_GETPID = 39


class MishapError(Exception):
    """Nobody's."""


def refuse() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def mishap() -> None:
    raise MishapError


def fail_at_every_stage(
    monkeypatch: pytest.MonkeyPatch, victim: Victim, fail: Callable[[], None]
) -> list[tuple[str, Exception | None]]:
    """Inject and fail at each stage in turn; the victim must be well each time, and nothing may be left open here.

    Nor there, but where it is the close that fails: a userfaultfd without memory.
    """
    ends: list[tuple[str, Exception | None]] = []
    for number in range(100):
        failure: Exception | None = None
        before = descriptors_of(victim.pid)
        with monkeypatch.context() as patch, same_descriptors(os.getpid()):
            only_thread(patch, victim.workers[number % len(victim.workers)].tid)
            stages = Stages(once(number, fail), patch.setattr)
            try:
                inject_userfaultfd(victim.pid).close()
            except (DirtyLogError, OSError, MishapError) as error:
                failure = error
        victim.check()
        if number >= len(stages.names):
            break
        ends.append((stages.names[number], failure))
        left = [name for fd, name in descriptors_of(victim.pid).items() if fd not in before]
        assert left == [] or (left == ["anon_inode:[userfaultfd]"] and stages.names[:number].count("SYSCALL") > 0), ends[-1]
    assert len(ends) >= FEWEST_STAGES
    return ends


def test_an_exception_at_any_stage_leaves_the_target_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of a call: nothing else can fail in a thread that handles no signals."""
    with Victim("compute", "sequence@1", "poll@3", "futex@3+ticked") as victim:
        ends = fail_at_every_stage(monkeypatch, victim, mishap)
        assert [end for end in ends if not isinstance(end[1], MishapError)] == []
        assert watched_mappings(victim.pid) == 0


def test_a_request_that_the_kernel_refuses_gives_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the call: the copy of the descriptor is made in another way, and has a test of its own."""
    with Victim("compute", "sequence@1", "poll@3", "futex@3+ticked") as victim:
        ends = fail_at_every_stage(monkeypatch, victim, refuse)
        # What was refused may also have been done in another way.
        wrong = [end for end in ends if end[0] != "pidfd_getfd" and not isinstance(end[1], DirtyLogError | None)]
        assert wrong == []


def test_the_copy_of_the_descriptor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def syscall(self, *_: object) -> int:
            ctypes.set_errno(errno.EPERM)
            return -1

    with Victim("compute", "poll@5") as victim, same_descriptors(victim.pid), same_descriptors(os.getpid()):
        monkeypatch.setattr(injection, "_libc", Refusing())
        with pytest.raises(AccessDeniedError, match="pidfd_getfd says EPERM"):
            inject_userfaultfd(victim.pid)
        monkeypatch.undo()
        victim.check()


def test_a_descriptor_that_cannot_be_closed_in_the_target_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered would stay so after the end of this process."""
    with Victim("compute", "poll@5") as victim, same_descriptors(os.getpid()):
        # In the place of close, getpid: it closes nothing.
        monkeypatch.setattr(X86_64, "close", _GETPID)
        with pytest.raises(DirtyLogError, match="close"):
            inject_userfaultfd(victim.pid).close()
        monkeypatch.undo()
        victim.check()


def test_features_that_the_kernel_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_features(_: Userfaultfd) -> None:
        raise AccessDeniedError("no features", remedy="none")

    with Victim("compute", "poll@5") as victim, same_descriptors(victim.pid), same_descriptors(os.getpid()):
        monkeypatch.setattr(Userfaultfd, "enable", refuse_features)
        with pytest.raises(AccessDeniedError, match="no features"):
            inject_userfaultfd(victim.pid)
        victim.check()


# One that arrives as a call returns what it made finds nobody who could close it: then it goes with a warning.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_ctrl_c_at_any_point_where_it_can_arrive() -> None:
    with Victim("compute", "poll@3", "epoll_wait@3") as victim, same_descriptors(victim.pid):
        before = descriptors_of(os.getpid())
        made: list[Userfaultfd] = []
        step = 0
        while interrupt(lambda: made.append(inject_userfaultfd(victim.pid)), step):
            left = {fd: name for fd, name in descriptors_of(os.getpid()).items() if fd not in before}
            assert left == {}, f"at step {step}"
            step += 1
        made.pop().close()
        assert step > 3
        victim.check()


@pytest.mark.parametrize("when", ["start", "join"])
def test_a_ctrl_c_while_the_other_thread_works(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """The interrupt comes out, but not before the other thread is done, whose descriptor is closed."""
    thread_class = injection.threading.Thread  # type: ignore[attr-defined]  # the name that the module looks up
    original = getattr(thread_class, when)
    block_signals, begun = injection.block_signals, threading.Event()  # type: ignore[attr-defined]  # the name that the module looks up

    def interrupted(thread: Any) -> None:
        monkeypatch.setattr(thread_class, when, original)
        if when == "start":
            original(thread)
        begun.set()
        raise KeyboardInterrupt

    def block_signals_later() -> None:
        begun.wait(SOON)
        block_signals()

    with Victim("compute", "poll@3") as victim, same_descriptors(victim.pid):
        with same_descriptors(os.getpid()):
            monkeypatch.setattr(injection, "block_signals", block_signals_later)
            monkeypatch.setattr(thread_class, when, interrupted)
            with pytest.raises(KeyboardInterrupt):
                inject_userfaultfd(victim.pid)
            assert not [one for one in injection.threading.enumerate() if one.name == "dirtylog-ptrace"]  # type: ignore[attr-defined]  # the name that the module looks up
        victim.check()


def test_a_thread_that_does_not_stop_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is let go as it is, and the next injection finds nothing in its way."""
    stop = Tracee.stop

    def stop_in_vain(tracee: Tracee) -> None:
        # It is let go first, so that its stop never comes.
        tracee._ask(Request.INTERRUPT)
        tracee.wait()
        tracee.resume()
        tracee.wait(0.05)

    with Victim("compute", "poll@3") as victim, same_descriptors(victim.pid), same_descriptors(os.getpid()):
        monkeypatch.setattr(Tracee, "stop", stop_in_vain)
        with pytest.raises(DirtyLogError, match="does not stop") as caught:
            inject_userfaultfd(victim.pid)
        assert caught.value.remedy == "try again"
        monkeypatch.setattr(Tracee, "stop", stop)
        victim.check()
        inject_userfaultfd(victim.pid).close()
        victim.check()

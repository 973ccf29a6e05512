"""Processes in which no system call can be made, or by whom not: a typed error says why and what helps, and nothing happens."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dirtylog import DirtyLogError, InvalidArgumentError, TargetGoneError, UnsupportedError
from dirtylog.linux import injection
from dirtylog.linux.arch import host_architecture
from dirtylog.linux.freezer import Freezer
from dirtylog.linux.injection import inject_userfaultfd
from dirtylog.linux.preflight import _check_executable
from dirtylog.linux.ptrace import Tracee
from dirtylog.linux.ptrace_abi import Option
from victims import (
    NOBODY,
    Victim,
    eventually,
    needs_root,
    needs_victims,
    only_thread,
    program,
    same_descriptors,
    state_of,
    threads_of,
    tracer_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = needs_victims

_PR_CAPBSET_DROP, _CAP_SYS_ADMIN = 24, 21
# Says how an injection went: run by whoever may do less than this process.
_INJECT = """\
import encodings.ascii, json, os, sys
from dirtylog.linux.injection import inject_userfaultfd
if sys.argv[2]:
    os.setgroups([])
    os.setgid(int(sys.argv[2]))
    os.setuid(int(sys.argv[2]))
try:
    inject_userfaultfd(int(sys.argv[1])).close()
except Exception as error:
    print(json.dumps({"kind": type(error).__name__, "text": str(error), "remedy": getattr(error, "remedy", None)}))
else:
    print(json.dumps({"kind": None}))
"""


def inject_as(pid: int, user: int | None = None, *, prepare: Callable[[], None] | None = None, before: tuple[str, ...] = ()) -> Any:
    """Inject in a process of another user, or with less capabilities, and return what it says."""
    command = (*before, sys.executable, "-c", _INJECT, str(pid), str(user or ""))
    return json.loads(subprocess.run(command, capture_output=True, check=True, preexec_fn=prepare).stdout)


@contextmanager
def refused(victim: Victim, kind: type[DirtyLogError], *words: str) -> Iterator[None]:
    """Require an error of exactly this kind with these words, a remedy, and a victim as it was."""
    with same_descriptors(victim.pid), same_descriptors(os.getpid()):
        with pytest.raises(DirtyLogError) as caught:
            yield
        assert type(caught.value) is kind
        assert caught.value.pid == victim.pid
        assert caught.value.remedy
        for word in words:
            assert word in str(caught.value)


def test_a_process_with_as_many_files_as_it_may_have() -> None:
    with Victim("--full", "compute", "nanosleep@5") as victim:
        for _ in range(5):
            with refused(victim, UnsupportedError, "EMFILE", "RLIMIT_NOFILE"):
                inject_userfaultfd(victim.pid)
        victim.check()
        assert victim.spurious() == {}


@needs_root
@pytest.mark.parametrize("action", ["errno", "kill"])
def test_a_seccomp_filter_that_cannot_be_suspended(action: str) -> None:
    def give_up_administration() -> None:
        ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, _CAP_SYS_ADMIN, 0, 0, 0)

    with Victim(f"--seccomp={action}", "compute", "poll@5") as victim:
        said = inject_as(victim.pid, prepare=give_up_administration)
        assert said["kind"] == "UnsupportedError"
        assert "seccomp" in said["text"]
        assert "CAP_SYS_ADMIN" in said["remedy"]
        victim.check()


def test_a_process_that_is_being_traced() -> None:
    with Victim("compute", "poll@5") as victim:
        freezer = Freezer(victim.pid)
        freezer.freeze()
        try:
            with refused(victim, UnsupportedError, "is being traced"):
                inject_userfaultfd(victim.pid)
        finally:
            freezer.thaw()
        victim.check()


def test_a_process_of_which_another_thread_is_being_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    with Victim("compute", "poll@5") as victim:
        traced, free = victim.workers
        monkeypatch.setattr(injection, "threads_by_preference", lambda *_: [traced.tid, free.tid])
        # By the thread of this test, which may go on to do other things.
        tracee = Tracee(victim.pid, traced.tid, Option.NONE)
        try:
            inject_userfaultfd(victim.pid).close()
        except DirtyLogError as error:
            assert "traced" in str(error)  # noqa: PT017 - either is right: to say so, or to take the other thread
        finally:
            tracee.stop()
            tracee.detach()
        victim.check()


def test_a_process_that_is_stopped() -> None:
    with Victim("compute", "poll@5") as victim:
        os.kill(victim.pid, signal.SIGSTOP)
        eventually(lambda: state_of(victim.pid) == "T", "it does not stop")
        with refused(victim, UnsupportedError, "stopped", f"kill -CONT {victim.pid}"):
            inject_userfaultfd(victim.pid)
        assert state_of(victim.pid) == "T"
        os.kill(victim.pid, signal.SIGCONT)
        victim.check()


def test_a_process_that_waits_for_a_child_of_vfork() -> None:
    victim = subprocess.Popen((program(), "--vfork"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert victim.stdout is not None
    assert victim.stdout.readline() == b"ready\n"
    with pytest.raises(UnsupportedError, match="vfork") as caught:
        inject_userfaultfd(victim.pid)
    assert caught.value.remedy == "try again"
    assert victim.communicate(b"x")[0] == b"ok\n"
    assert victim.returncode == 0


def test_a_child_of_vfork_and_its_parent_are_not_harmed() -> None:
    """The memory of the child is its parent's."""
    victim = subprocess.Popen((program(), "--vfork"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert victim.stdout is not None
    assert victim.stdout.readline() == b"ready\n"
    child = int(Path(f"/proc/{victim.pid}/task/{victim.pid}/children").read_text(encoding="ascii"))
    inject_userfaultfd(child).close()
    assert victim.communicate(b"x")[0] == b"ok\n"
    assert victim.returncode == 0


def test_a_process_that_has_ended() -> None:
    victim = Victim("compute")
    os.kill(victim.pid, signal.SIGKILL)
    eventually(lambda: state_of(victim.pid) == "Z", "it does not end")
    with pytest.raises(TargetGoneError):
        inject_userfaultfd(victim.pid)
    assert victim.kill() == -signal.SIGKILL
    with pytest.raises(TargetGoneError):
        inject_userfaultfd(victim.pid)
    victim.close()


def test_a_process_whose_first_thread_has_ended() -> None:
    with Victim("--leaves", "compute", "poll@5") as victim:
        eventually(lambda: state_of(victim.pid) == "Z", "the first thread does not end")
        with pytest.raises(DirtyLogError) as caught:
            inject_userfaultfd(victim.pid)
        assert "thread" in str(caught.value)
        victim.order("check")
        assert victim.line() == "ok"


@pytest.mark.parametrize("pid", [0, -1, -5, 1 << 22, 1 << 40])
def test_there_is_no_such_process(pid: int) -> None:
    with pytest.raises((TargetGoneError, InvalidArgumentError)):
        inject_userfaultfd(pid)


def test_a_thread_of_the_kernel() -> None:
    if Path("/proc/2/comm").read_text(encoding="ascii") != "kthreadd\n":
        pytest.skip("no threads of the kernel are seen from here")
    with pytest.raises(InvalidArgumentError, match="thread of the kernel"):
        inject_userfaultfd(2)


def test_this_process() -> None:
    with pytest.raises(InvalidArgumentError):
        inject_userfaultfd(os.getpid())


def test_a_thread_in_the_place_of_a_process() -> None:
    with Victim("compute", "poll@5") as victim, same_descriptors(victim.pid), same_descriptors(os.getpid()):
        with pytest.raises(InvalidArgumentError):
            inject_userfaultfd(victim.workers[0].tid)
        victim.check()


def test_a_go_program() -> None:
    path = next((found for found in map(shutil.which, ("docker", "terraform", "gofmt")) if found), None)
    if path is None:
        pytest.skip("no Go program is known to be here")
    target = subprocess.Popen((path, "--help"), stdout=subprocess.DEVNULL)
    # So that it does not end under the test. A stopped process would be refused for that first.
    os.kill(target.pid, signal.SIGSTOP)
    try:
        with pytest.raises(UnsupportedError, match="Go program") as caught:
            _check_executable(target.pid, host_architecture())
        assert caught.value.remedy == "use port compare"
    finally:
        target.kill()
        target.wait()


def test_a_process_whose_threads_all_handle_system_calls_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    with Victim("compute+dispatched") as victim:
        only_thread(monkeypatch, victim.workers[0].tid)
        with refused(victim, UnsupportedError, "syscall user dispatch"):
            inject_userfaultfd(victim.pid)
        victim.check()


@needs_root
def test_who_has_no_rights_may_attach_to_processes_of_its_own_only() -> None:
    with Victim("compute", "poll@5", user=NOBODY) as own, Victim("compute") as foreign:
        assert inject_as(own.pid, NOBODY)["kind"] is None
        own.check()
        said = inject_as(foreign.pid, NOBODY)
        assert said["kind"] == "AccessDeniedError"
        assert "CAP_SYS_PTRACE" in said["remedy"]
        assert threads_of(foreign.pid)
        assert tracer_of(foreign.pid) == 0
        foreign.check()


@needs_root
@pytest.mark.parametrize("hidepid", [1, 2, 4])
def test_where_processes_are_hidden_from_other_users(hidepid: int) -> None:
    with Victim("compute") as foreign:
        mount = f'mount -t proc -o hidepid={hidepid} proc /proc && exec "$@"'
        said = inject_as(foreign.pid, NOBODY, before=("unshare", "--mount", "sh", "-c", mount, "sh"))
        assert said["kind"] in {"AccessDeniedError", "TargetGoneError"}
        foreign.check()

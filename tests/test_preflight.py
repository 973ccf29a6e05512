"""What is looked at before a system call is made in another process."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from dirtylog import InvalidArgumentError, TargetGoneError, UnsupportedError
from dirtylog.linux import preflight
from dirtylog.linux.arch import host_architecture
from dirtylog.linux.arch.x86_64 import X86_64
from dirtylog.linux.injection import inject_userfaultfd
from dirtylog.linux.preflight import check_process, read_status, threads_by_preference
from victims import EINTR_PRONE, GENTLE, Victim, eventually, needs_victims, state_of

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_victims

_PR_SET_NAME = 15


@pytest.fixture
def sleeper() -> Iterator[int]:
    """Give a process that does nothing."""
    process = subprocess.Popen(("sleep", "60"))
    yield process.pid
    process.kill()
    process.wait()


def test_a_process_in_order(sleeper: int) -> None:
    status = check_process(sleeper, host_architecture())
    assert (status.tracer, status.seccomp, status.has_memory, status.pinned, status.shadow_stack) == (0, False, True, 0, False)


def test_a_name_that_looks_like_a_status_tells_nothing() -> None:
    """Its lines come first, and what the kernel says later counts."""
    before = Path("/proc/self/task").joinpath(str(threading.get_native_id()), "comm").read_bytes()
    libc = ctypes.CDLL(None)
    try:
        libc.prctl(_PR_SET_NAME, b"a\rState:\tZ\r(b", 0, 0, 0)
        status = read_status(os.getpid(), threading.get_native_id())
        assert status.state == "R"
        assert status.has_memory
    finally:
        libc.prctl(_PR_SET_NAME, before.rstrip(b"\n"), 0, 0, 0)


def test_a_name_of_any_octets() -> None:
    libc = ctypes.CDLL(None)
    before = Path("/proc/self/task").joinpath(str(threading.get_native_id()), "comm").read_bytes()
    try:
        libc.prctl(_PR_SET_NAME, b"\xff\xfe: \x85 (x", 0, 0, 0)
        assert read_status(os.getpid(), threading.get_native_id()).tracer == 0
    finally:
        libc.prctl(_PR_SET_NAME, before.rstrip(b"\n"), 0, 0, 0)


def test_a_process_that_has_ended() -> None:
    child = subprocess.Popen((sys.executable, "-c", ""))
    eventually(lambda: state_of(child.pid) == "Z", "it does not end")
    with pytest.raises(TargetGoneError, match="has ended"):
        check_process(child.pid, host_architecture())
    child.wait()
    with pytest.raises(TargetGoneError, match="there is no process"):
        check_process(child.pid, host_architecture())
    with pytest.raises(TargetGoneError):
        threads_by_preference(child.pid, host_architecture())


def test_a_thread_of_the_kernel() -> None:
    if Path("/proc/2/comm").read_text(encoding="ascii") != "kthreadd\n":
        pytest.skip("no threads of the kernel are seen from here")
    with pytest.raises(InvalidArgumentError, match="thread of the kernel"):
        check_process(2, host_architecture())


def test_a_stopped_process_is_told_how_to_go_on(sleeper: int) -> None:
    os.kill(sleeper, signal.SIGSTOP)
    eventually(lambda: state_of(sleeper) == "T", "it does not stop")
    with pytest.raises(UnsupportedError, match="stopped") as caught:
        check_process(sleeper, host_architecture())
    assert f"kill -CONT {sleeper}" in (caught.value.remedy or "")


def test_a_program_for_another_machine(sleeper: int) -> None:
    class Other(X86_64):
        elf_machine: ClassVar[int] = 183

    with pytest.raises(UnsupportedError, match="another machine") as caught:
        check_process(sleeper, Other())
    assert "ELF machine 62" in (caught.value.reason or "")


@pytest.mark.parametrize("contents", [b"", b"\x7f", b"\x7fELF\x01", b"#!/bin/sh\n", b"\x7fELF\x02\x01\x01"], ids=ascii)
def test_a_program_file_that_is_cut_short_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sleeper: int, contents: bytes
) -> None:
    (tmp_path / "exe").write_bytes(contents)

    class Elsewhere(Path):
        _flavour: ClassVar[Any] = getattr(type(Path()), "_flavour", None)

        def __new__(cls, *parts: str) -> Any:
            return Path(tmp_path / "exe") if parts == (f"/proc/{sleeper}/exe",) else Path(*parts)

    monkeypatch.setattr(preflight, "Path", Elsewhere)
    with pytest.raises(UnsupportedError, match="another machine"):
        preflight._check_executable(sleeper, host_architecture())


def test_a_program_that_was_removed_while_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "sleep\r\u2028again"
    shutil.copy2(shutil.which("sleep") or "/bin/sleep", path)
    process = subprocess.Popen((path, "60"))
    path.unlink()
    try:
        assert check_process(process.pid, host_architecture()).has_memory
    finally:
        process.kill()
        process.wait()


def test_threads_in_lasting_sleeps_come_first_and_interruptible_ones_last() -> None:
    with Victim("epoll_wait@60000", "nanosleep@60000", "accept@60000", "futex@60000", "compute", flags=()) as victim:
        kinds = {worker.tid: worker.kind for worker in victim.workers}
        order: list[str] = []

        def settled() -> bool:
            order[:] = [kinds[tid] for tid in threads_by_preference(victim.pid, host_architecture()) if tid in kinds]
            return order[:2] == ["nanosleep", "futex"] and order[2] == "compute"

        eventually(settled, f"the order is {order}")
        assert set(order[3:]) == {"epoll_wait", "accept"}
        victim.close()


def test_every_kind_of_sleep_is_known_for_what_it_is() -> None:
    """Where the kernel ends a system call with EINTR after a stop, it must not be preferred."""
    architecture = host_architecture()
    with Victim(*(f"{kind}@60000" for kind in (*GENTLE, *EINTR_PRONE))) as victim:

        def number_of(tid: int) -> int:
            call = Path(f"/proc/{victim.pid}/task/{tid}/syscall").read_text(encoding="ascii").split()[0]
            return -1 if call == "running" else int(call)

        # read_socket is a read, which only a time limit of the socket makes interruptible: numbers do not tell.
        wrong = {}
        for worker in victim.workers:
            eventually(lambda worker=worker: number_of(worker.tid) >= 0, f"{worker.kind} does not sleep")  # type: ignore[misc]  # a stand-in
            known = number_of(worker.tid) in (architecture.restartable if worker.kind in GENTLE else architecture.interruptible)
            if not known and worker.kind != "read_socket":
                wrong[worker.kind] = number_of(worker.tid)
        victim.close()
        assert wrong == {}


def test_a_thread_that_ends_while_threads_are_looked_at() -> None:
    with Victim("--spawn=6", "poll@5") as victim:
        for _ in range(200):
            assert victim.pid in threads_by_preference(victim.pid, host_architecture())


def test_no_thread_can_be_stopped(monkeypatch: pytest.MonkeyPatch, sleeper: int) -> None:
    status = read_status(sleeper)
    monkeypatch.setattr(preflight, "read_status", lambda *_: status._replace(state="D"))
    assert threads_by_preference(sleeper, host_architecture()) == []
    with pytest.raises(UnsupportedError, match="uninterruptible sleeps") as caught:
        inject_userfaultfd(sleeper)
    assert caught.value.remedy == "try again"

"""Exit statuses of runs of processes, each by causing what it stands for; and that no target is harmed, however dirtylog ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from dirtylog.cli import main
from dirtylog.linux.ptrace import Tracee
from dirtylog.linux.ptrace_abi import Option
from dirtylog.linux.soft_dirty import missing_soft_dirty
from victims import NOBODY, descriptors_of, needs_root, needs_victims, state_of, threads_of
from writers import (
    ARENA_MAP,
    SHARED_MAP,
    Writer,
    arena_pages,
    dirtylog,
    eventually,
    finish,
    run_in_process_of,
    start,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

QUICK = ("--rounds", "2", "--interval", "0.02")
FOREVER = ("--rounds", "1000000", "--interval", "0.01")


def status_of(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else 1


# --- 2: usage


USAGE = [
    (["run", "pid:"], "pid:"),
    (["run", "pid:abc"], "'pid:abc'"),
    (["run", "pid:-1"], "'pid:-1'"),
    (["run", "pid:1.5"], "'pid:1.5'"),
    (["run", "pid: 5"], "'pid: 5'"),
    (["run", "pid:\u0665"], "pid:"),
    (["run", "pid:0"], "0 is not a process id"),
    (["run", "pid:4294967297"], "4294967297"),
    (["run", "pid:99999999999999999999999"], "99999999999999999999999"),
    (["run", f"pid:{os.getpid()}"], "dirtylog.track"),
    (["run", "1234"], "'1234'"),
    (["run", "--"], "no command"),
    (["run", "pid:1", "--", "true"], "two targets"),
    (["run", "pid:1", "--port", "paper"], "'paper'"),
    (["run", "pid:1", "--size", "1MiB"], "size are choices of guests"),
    (["run", "pid:1", "--vcpus", "2"], "vcpus are choices of guests"),
    (["run", "pid:1", "--log", "ring"], "log are choices of KVM guests"),
    (["run", "pid:1", "--backing", "thp"], "backing are choices of KVM guests"),
    (["run", "pid:1", "--ring-entries", "1024"], "ring entries are choices of KVM guests"),
    (["run", "pid:1", "--entry", "0"], "--image"),
    (["run", "--size", "1MiB", "--", "true"], "size are choices of guests"),
    (["run", "emu:x86", "--port", "uffd"], "port are choices of processes"),
    (["run", "emu:x86", "--map", "heap"], "maps are choices of processes"),
    (["run", "kvm", "--port", "compare"], "port are choices of processes"),
    (["run", "--", "/no/such/command"], "/no/such/command"),
    (["run", "--", "no-such-command-anywhere"], "PATH"),
    (["run", "--", ""], "''"),
]


@pytest.mark.parametrize(("arguments", "named"), USAGE, ids=[" ".join(words) for words, _ in USAGE])
def test_bad_input_exits_2_and_names_the_value(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(arguments) == 2
    captured = capsys.readouterr()
    assert named in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("word", "rule"),
    [
        ("heaps", "choose heap, stack"),
        ("Heap", "choose heap, stack"),
        ("", "choose heap, stack"),
        ("1000-2000", "0x1000-0x2000"),
        ("0x1000", "0x1000-0x2000"),
        ("0x2000-0x1000", "START below END"),
        ("0x1000-0x1000", "START below END"),
    ],
)
def test_a_word_that_is_no_map_exits_2_with_the_rule(word: str, rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(["run", f"pid:{os.getppid()}", "--map", word]) == 2
    err = capsys.readouterr().err
    assert repr(word) in err
    assert rule in err


def test_a_thread_is_no_process(capsys: pytest.CaptureFixture[str]) -> None:
    with Writer("spin", "1") as target:
        tid = max(threads_of(target.pid))
        assert tid != target.pid
        assert status_of(["run", f"pid:{tid}", *QUICK]) == 2
        assert "Tgid" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/proc/2/comm"), reason="the kernel's threads are not seen here")  # noqa: PTH110 - at import
def test_a_thread_of_the_kernel_has_no_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert Path("/proc/2/comm").read_text(encoding="ascii") == "kthreadd\n"
    assert status_of(["run", "pid:2", *QUICK]) == 2
    assert "thread of the kernel" in capsys.readouterr().err


def test_what_no_program_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("no program\n", encoding="ascii")
    text.chmod(0o755)
    assert status_of(["run", "--", str(text)]) == 2
    assert "Exec format error" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_may_not_be_executed_exits_4(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / what
    path.mkdir() if what == "directory" else path.write_bytes(b"#!/bin/sh\n")
    assert status_of(["run", "--", str(path)]) == 4
    err = capsys.readouterr().err
    assert str(path) in err
    assert "Permission denied" in err


# --- 3: cannot


@contextlib.contextmanager
def traced(pid: int) -> Iterator[None]:
    tracee = Tracee(pid, pid, Option.NONE)
    tracee.stop()
    yield
    tracee.detach()


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: state_of(pid) == "T", "it does not stop")
    yield
    os.kill(pid, signal.SIGCONT)


@needs_victims
def test_a_target_that_is_traced_or_stopped_exits_3_with_port_uffd() -> None:
    with Writer() as target:
        for how, words in (
            (traced, (f"traced by process {os.getpid()}", "end the debugger")),
            (stopped, ("stopped", "kill -CONT")),
        ):
            with how(target.pid):
                ran = dirtylog("run", f"pid:{target.pid}", "--port", "uffd", *QUICK)
                assert (ran.status, ran.out) == (3, "")
                assert all(word in ran.err for word in words), ran.err


@pytest.mark.skipif(missing_soft_dirty() is None, reason="this kernel has soft-dirty bits")
def test_a_port_that_the_kernel_does_not_have_exits_3_and_says_what_was_tried() -> None:
    with Writer() as target:
        ran = dirtylog("run", f"pid:{target.pid}", "--port", "soft-dirty", *QUICK)
        assert (ran.status, ran.out) == (3, "")
        for word in ("written, cleared, and written again", "CONFIG_MEM_SOFT_DIRTY", "port uffd or compare"):
            assert word in ran.err


# --- 4: permission


@needs_root
@pytest.mark.parametrize("port", ["auto", "uffd", "compare"])
def test_another_user_s_process_exits_4_with_a_remedy(port: str) -> None:
    with Writer() as target:
        ran = run_in_process_of(NOBODY, "run", f"pid:{target.pid}", "--port", port, *QUICK)
        assert (ran.status, ran.out) == (4, "")
        assert "CAP_SYS_PTRACE" in ran.err


@needs_root
@needs_victims
def test_the_same_user_s_process_needs_no_privilege() -> None:
    with Writer("spin", "5", user=NOBODY) as target:
        ran = run_in_process_of(NOBODY, "run", f"pid:{target.pid}", "--map", ARENA_MAP, *QUICK, "--json")
        assert ran.status == 0, ran.err
        assert (ran.document["port"], ran.document["attached"]) == ("uffd", "injected")
        assert [arena_pages(found) for found in ran.document["rounds"]] == [{5}, {5}]


# --- 5: gone


@pytest.mark.parametrize("port", [pytest.param("uffd", marks=needs_victims), "compare"])
def test_a_target_that_vanishes_exits_5_and_what_was_gathered_is_printed(port: str) -> None:
    for how in ("--json", "--jsonl", "-f"):
        with (
            Writer("spin", "5") as target,
            start("run", f"pid:{target.pid}", "--port", port, "--map", ARENA_MAP, *FOREVER, how) as process,
        ):
            if how == "--json":
                eventually(lambda: f"/proc/{target.pid}/pagemap" in descriptors_of(process.pid).values(), "it does not begin")
                time.sleep(0.5)
            elif process.stdout is not None:
                process.stdout.readline()
            target.kill()
            ran = finish(process)
            assert ran.status == 5
            assert f"process {target.pid}" in ran.err
            if how == "--json":
                assert ran.document["complete"] is False
                assert ran.document["total"]["dirty_pages"] > 0
            elif how == "-f":
                assert "(ended early, exit 5)" in ran.out
                assert "blind spot: " in ran.out


@pytest.mark.parametrize("how", ["never was", "ended", "zombie"])
def test_a_process_that_is_not_there_exits_5(how: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Writer() as target:
        target.process.kill()
        if how == "zombie":
            eventually(lambda: state_of(target.pid) == "Z", "it does not end")
        else:
            target.kill()
        pid = 4194305 if how == "never was" else target.pid
        for port in ("auto", "compare"):
            assert status_of(["run", f"pid:{pid}", "--port", port, *QUICK]) == 5
            assert str(pid) in capsys.readouterr().err


# --- 6: incomplete


@needs_victims
def test_a_shared_writable_mapping_exits_6_and_is_named_twice() -> None:
    with Writer("share", "spin", "5") as target:
        for extra in ((), ("--json",), ("--jsonl",)):
            ran = dirtylog("run", f"pid:{target.pid}", *QUICK, *extra)
            assert ran.status == 6
            assert "writes may have been missed" in ran.err
            assert "shared" in ran.err
            assert "/dev/zero" in ran.err
            if extra:
                assert "shared" in ran.lines[-1]["incomplete"][0]
            else:
                assert any(line.startswith("incomplete: ") and "/dev/zero" in line for line in ran.out.splitlines())
        assert ran.lines[-1].get("complete", False) is False


@needs_victims
def test_what_is_not_chosen_makes_nothing_incomplete() -> None:
    with Writer("share") as target:
        assert dirtylog("run", f"pid:{target.pid}", "--map", ARENA_MAP, *QUICK).status == 0
        assert dirtylog("run", f"pid:{target.pid}", "--map", SHARED_MAP, *QUICK).status == 6
        assert dirtylog("run", f"pid:{target.pid}", "--port", "compare", *QUICK).status == 0, "comparing sees all writers"


@needs_victims
def test_memory_that_somebody_else_watches_exits_6_and_is_named() -> None:
    with Writer("spin", "5") as target, start("run", f"pid:{target.pid}", "--map", ARENA_MAP, *FOREVER, "--jsonl") as first:
        assert first.stdout is not None
        first.stdout.readline()
        ran = dirtylog("run", f"pid:{target.pid}", "--port", "uffd", *QUICK, "--json")
        assert ran.status == 6
        assert ARENA_MAP in ran.err
        assert "userfaultfd" in ran.err
        assert hex(ran.document["skipped_mappings"][0]["address"]) == ARENA_MAP.partition("-")[0]
        assert arena_pages(json.loads(first.stdout.readline())) == {5}, "the first one does not suffer"
        first.send_signal(signal.SIGINT)
        assert finish(first).status == 130

"""A process whose first thread has ended while others go on: the kernel shows no memory under its number any more.

What such a process writes is reported, or it is said that it is not: silence would be taken for quiet.
"""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest

import dirtylog
from dirtylog import DirtyLog, DirtyLogError
from dirtylog.observe.rounds import rounds
from launches import command, get_all, in_time, is_quiet, reports
from victims import needs_victims, state_of, tracer_of
from writers import ARENA_MAP, Writer, eventually, finish, is_gone, pages_in_arena, start

if TYPE_CHECKING:
    from dirtylog.linux.process import ProcessMemory

pytestmark = needs_victims

PORTS = ("uffd", "compare")


def leave(target: Writer) -> None:
    target.say("leave busy 6")
    eventually(lambda: state_of(target.pid) == "Z", "its first thread does not end")


def reports_or_says_so(log: DirtyLog, page: int) -> bool:
    try:
        return reports(log, page) or bool(log.memory.incomplete)
    except DirtyLogError:
        return True


@pytest.mark.parametrize("port", PORTS)
def test_it_leaves_before_the_log(port: str) -> None:
    with Writer("spin", "5") as target:
        leave(target)
        try:
            memory = dirtylog.open(f"pid:{target.pid}", port=port)
        except DirtyLogError as error:
            assert "has ended" not in str(error), "it has not"  # noqa: PT017 - either will do
        else:
            with memory, DirtyLog(memory) as log:
                assert reports_or_says_so(log, 5)
        target.kill()


@pytest.mark.parametrize("port", PORTS)
def test_it_leaves_in_the_middle(port: str) -> None:
    with Writer("spin", "5") as target:
        with dirtylog.open(f"pid:{target.pid}", port=port) as memory, DirtyLog(memory) as log:
            assert reports(log, 5)
            leave(target)
            assert reports_or_says_so(log, 5)
        assert tracer_of(target.pid) == 0
        target.kill()


def test_a_run_in_whose_middle_it_leaves_does_not_exit_0() -> None:
    with (
        Writer("spin", "5") as target,
        start("run", f"pid:{target.pid}", "--map", ARENA_MAP, "--rounds", "40", "--interval", "0.05", "--jsonl") as process,
    ):
        assert process.stdout is not None
        process.stdout.readline()
        leave(target)
        ran = finish(process)
        assert ran.status != 0 or ran.lines[-1]["runs"], "it stores page 5 every millisecond"
        target.kill()


def test_a_command_s_first_thread_leaves() -> None:
    with command("spin", "7", "leave", "sleep", "1700", "store", "9", "exit", "3") as (memory, log):
        memory.resume()
        found: list[set[int]] = []
        try:
            found.extend(pages_in_arena(one.dirty) for one in rounds(log, None, 0.1))
        except DirtyLogError:
            pass
        else:
            assert 9 in set().union(*found)
        began = time.monotonic()
        memory.close()
        assert time.monotonic() - began < 1
        assert memory.status in (3, -signal.SIGTERM), "its end, or ours of it"


def test_it_is_paused_all_the_same() -> None:
    with command("spin", "2", "leave", "busy", "1") as (memory, log):
        memory.resume()
        eventually(lambda: state_of(memory.pid) == "Z", "its first thread does not end")
        _pause(memory, log)
    assert is_gone(memory.pid)


def _pause(memory: ProcessMemory, log: DirtyLog) -> None:
    try:
        in_time(memory.pause)
        assert is_quiet(log)
        in_time(memory.resume)
        time.sleep(0.1)
        assert get_all(log), "it does not go on"
    except DirtyLogError:
        return

"""Commands: logged from the first instruction to the last, and as they would be if nobody logged them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import pytest

import dirtylog
from dirtylog import InvalidArgumentError, TargetGoneError
from dirtylog.linux.launch import Launched
from dirtylog.observe.rounds import rounds
from known_limits import known_limit
from launches import command, get_all, reports, rounds_of
from victims import descriptors_of, needs_victims, same_descriptors, state_of, threads_of, tracer_of
from writers import EARLY_PAGE, NPAGES, children, compiled, eventually, is_gone, pages_in_arena, writer

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs_victims

# It has no C library, and no code before this.
FIRST_INSTRUCTION = """
static volatile char pages[8 * 4096] __attribute__((aligned(4096)));
void _start(void) {
    pages[5 * 4096] = 1;
    __asm__ volatile("mov $231, %eax; xor %edi, %edi; syscall");
}
"""


# --- from the first instruction


def test_the_first_instruction_is_logged() -> None:
    program = compiled(FIRST_INSTRUCTION, "first", "-nostdlib", "-static", "-fno-stack-protector")
    with command(program=(program,)) as (memory, log):
        memory.resume()
        (found,) = rounds(log, None, 10)
        written = [(slot.permissions, dirty.pages().tolist()) for slot, dirty in found.dirty.items() if dirty]
        pages = next(pages for permissions, pages in written if len(pages) == 1 and permissions == "rw-p")
        slot = next(slot for slot, dirty in found.dirty.items() if dirty.pages().tolist() == pages and slot.permissions == "rw-p")
        assert memory.read(slot.id, pages)[0, 0] == 1
        assert len(written) == 1, "what has not been written is not reported: not what execve has laid on the stack either"


def test_constructors_are_logged() -> None:
    with command("early", "store", "3") as (_, log):
        assert set().union(*rounds_of(log)) == {3, EARLY_PAGE}


@pytest.mark.parametrize("port", ["uffd", "compare"])
def test_it_stands_at_its_first_instruction_until_it_may_go(port: str) -> None:
    with command("early", "store", "3", port=port) as (memory, log):
        time.sleep(0.2)
        assert get_all(log) == set()
        assert memory.status is None
        assert {3, EARLY_PAGE} <= set().union(*rounds_of(log))


def test_a_static_program() -> None:
    with command("early", "store", "3", program=(writer("-static"),)) as (_, log):
        assert set().union(*rounds_of(log)) == {3, EARLY_PAGE}


def test_a_script(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(f'#!/bin/sh\n{writer()} store 1\nexec {writer()} early store "$@"\n', encoding="ascii")
    script.chmod(0o755)
    with command("3", "4", program=(str(script),)) as (memory, log):
        assert {3, 4, EARLY_PAGE} <= set().union(*rounds_of(log))
        memory.close()
        assert memory.status == 0


# --- one program after the other


def test_each_program_of_a_chain_is_logged() -> None:
    words = (
        "store",
        "1",
        "sleep",
        "200",
        "exec",
        "store",
        "2",
        "sleep",
        "200",
        "exec",
        "early",
        "store",
        "3",
        "sleep",
        "200",
        "store",
        "9",
    )
    with command(*words) as (memory, log):
        found = rounds_of(log)
        assert {1, 2, 3, EARLY_PAGE} <= set().union(*found)
        assert {9} in found[-2:]
        assert memory.stats.programs == 3
        memory.close()
        assert memory.status == 0


@known_limit
def test_programs_that_execute_one_another_at_once() -> None:
    with command(*("exec", "exec", "exec", "exec", "exec"), "early", "store", "3", "exit", "4") as (memory, log):
        assert {3, EARLY_PAGE} <= set().union(*rounds_of(log))
        memory.close()
        assert memory.status == 4


def test_another_thread_executes_a_program() -> None:
    with command("store", "1", "sleep", "100", "thread-exec", "early", "store", "3", "sleep", "300", "store", "9") as (memory, log):
        found: set[int] = set()
        # The program that it executes is not traced any more: its end is seen too late, and said.
        memory.resume()
        with contextlib.suppress(TargetGoneError):
            for one in rounds(log, None, 0.05):
                found |= pages_in_arena(one.dirty)
        assert {3, EARLY_PAGE} <= found
        memory.close()
        assert memory.status == 0


@pytest.mark.parametrize("program", ["/no/such/program", "no-such-program", "/etc/passwd", "/etc", "", "a\0b"], ids=repr)
def test_what_cannot_be_executed_leaves_nothing_behind(program: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = children()
    with same_descriptors(os.getpid()):
        with pytest.raises((InvalidArgumentError, dirtylog.AccessDeniedError)) as caught:
            dirtylog.open([program])
        assert repr(program) in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert children() == before
    assert not [thread for thread in threading.enumerate() if thread.name == "dirtylog-ptrace"]


# --- to the last instruction


ENDS: dict[str, tuple[tuple[str, ...], int]] = {
    "returns": ((), 0),
    "exits": (("exit", "3"), 3),
    "exits in another thread": (("elsewhere", "exit", "3"), 3),
    "ends by SIGTERM": (("raise", "15"), -15),
    "ends by SIGKILL": (("raise", "9"), -9),
    "ends by SIGSEGV": (("raise", "11"), -11),
    "ends by SIGTERM in another thread": (("elsewhere", "raise", "15"), -15),
    "ends while others store": (("spin", "9", "sleep", "50", "exit", "5"), 5),
}


@pytest.mark.parametrize("end", ENDS)
def test_what_is_written_just_before_the_end_is_reported(end: str) -> None:
    words, status = ENDS[end]
    for page in range(10, 15):
        with command("sleep", "60", "store", "9", str(page), *words) as (memory, log):
            assert set().union(*rounds_of(log, 0.03)) == {9, page}
            memory.close()
            assert memory.status == status


def test_it_is_read_at_its_end() -> None:
    with command("store", "9", "exit", "3") as (memory, log):
        memory.resume()
        assert memory.ending(20)
        log.update()
        slot = next(slot for slot in memory.slots if slot.npages == NPAGES)
        assert memory.read(slot.id, [9])[0, 0] == 1
        assert memory.status is None
        assert not is_gone(memory.pid)
        memory.close()
        assert memory.status == 3


def test_one_that_is_killed_from_outside_has_a_last_round() -> None:
    with command("busy", "7") as (memory, log):
        memory.resume()
        assert reports(log, 7)
        slot = next(slot for slot in memory.slots if slot.npages == NPAGES)
        before = memory.read(slot.id, [7])[0, 0]
        eventually(lambda: memory.read(slot.id, [7])[0, 0] != before, "it does nothing")
        os.kill(memory.pid, signal.SIGKILL)
        assert memory.ending(20)
        assert 7 in get_all(log)
        memory.close()
        assert memory.status == -9


def test_children_go_on_and_are_not_waited_for() -> None:
    read, write = os.pipe()
    saved = os.dup(1)
    os.dup2(write, 1)
    try:
        with command("daemon", "60", "store", "9", "exit", "0") as (memory, log):
            assert 9 in set().union(*rounds_of(log))
            memory.close()
            assert memory.status == 0
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(write)
    child = int(os.read(read, 100).split()[-1])
    os.close(read)
    try:
        assert not is_gone(child)
        assert tracer_of(child) == 0
    finally:
        os.kill(child, signal.SIGKILL)


# --- it is ended


def test_close_ends_it_with_sigterm() -> None:
    with command("busy", "1") as (memory, _):
        memory.resume()
        memory.close()
        assert memory.status == -signal.SIGTERM
        assert is_gone(memory.pid)


@pytest.mark.parametrize("how", ["it ignores SIGTERM", "it is stopped"])
def test_close_ends_one_that_does_not_listen(how: str) -> None:
    words = ("ignore", "15", "store", "1", "busy", "2") if how == "it ignores SIGTERM" else ("store", "1", "busy", "2")
    with command(*words) as (memory, log):
        memory.resume()
        assert reports(log, 2)
        if how == "it is stopped":
            os.kill(memory.pid, signal.SIGSTOP)
            eventually(lambda: state_of(memory.pid) in "tT", "it does not stop")
        began = time.monotonic()
        memory.close()
        assert time.monotonic() - began < 15
        assert memory.status in (-signal.SIGKILL, -signal.SIGTERM)
        assert is_gone(memory.pid)


def test_close_before_it_has_begun() -> None:
    with command("early", "busy", "1") as (memory, _):
        memory.close()
        assert memory.status == -signal.SIGTERM


@pytest.mark.timeout(300)
def test_two_hundred_quick_commands_leave_nothing_behind() -> None:
    before = children()
    with same_descriptors(os.getpid()):
        for number in range(200):
            launched = Launched([writer(), "store", "1"])
            launched.userfaultfd().close()  # type: ignore[union-attr]  # there is one
            if number % 3:
                launched.go()
                if number % 2:
                    assert launched.ending.wait(20)
            launched.close()
            assert launched.status in (0, -signal.SIGTERM)
    assert not [thread for thread in threading.enumerate() if thread.name == "dirtylog-ptrace"]
    eventually(lambda: len(threads_of(os.getpid())) < 20, "threads are left behind")
    assert children() == before
    assert len(descriptors_of(os.getpid())) < 100


test_two_hundred_quick_commands_leave_nothing_behind = pytest.mark.timeout(300)(
    test_two_hundred_quick_commands_leave_nothing_behind
)

"""Commands and what comes from outside: signals, pauses, the terminal's Ctrl-Z, and the sudden death of who logs them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dirtylog.linux.launch import Launched
from launches import command, get_all, in_time, is_quiet, reports
from victims import needs_victims, state_of, threads_of, tracer_of, watched_mappings
from writers import NPAGES, PAGE, command_line, eventually, finish, is_gone, start, writer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dirtylog.linux.process import ProcessMemory

pytestmark = needs_victims

USR1_PAGE = 100 + signal.SIGUSR1


# --- signals pass through


def test_a_handler_runs() -> None:
    with command("handle", str(int(signal.SIGUSR1)), "spin", "2", "busy", "1") as (memory, log):
        memory.resume()
        assert reports(log, 2)
        for _ in range(20):
            os.kill(memory.pid, signal.SIGUSR1)
            assert reports(log, USR1_PAGE)
        memory.close()
        assert memory.status == -signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGKILL, signal.SIGRTMIN])
def test_a_signal_from_outside_ends_it(number: int) -> None:
    with command("busy", "1") as (memory, log):
        memory.resume()
        assert reports(log, 1)
        os.kill(memory.pid, number)
        assert memory.ending(20)
        memory.close()
        assert memory.status == -number


def test_a_signal_that_comes_before_the_first_instruction_is_kept() -> None:
    with command("early", "busy", "1") as (memory, log):
        os.kill(memory.pid, signal.SIGUSR1)
        time.sleep(0.05)
        assert get_all(log) == set()
        memory.resume()
        assert memory.ending(20)
        memory.close()
        assert memory.status == -signal.SIGUSR1


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN])
def test_it_stops_and_goes_on(number: int) -> None:
    with command("spin", "2", "busy", "1") as (memory, log):
        memory.resume()
        assert reports(log, 1)
        for _ in range(5):
            os.kill(memory.pid, number)
            eventually(lambda: state_of(memory.pid) in "tT", "it does not stop")
            eventually(lambda: is_quiet(log), "it stores, although it is stopped")
            os.kill(memory.pid, signal.SIGCONT)
            assert reports(log, 1)
            assert reports(log, 2)


def test_ctrl_z_and_fg() -> None:
    """As a shell does it: SIGTSTP to the process group, dirtylog and command, and SIGCONT to it later."""
    words = ("run", "--jsonl", "--interval", "0.05", "--rounds", "100000", "--", writer(), "spin", "2", "sleep", "60000")
    with start(*words, process_group=0) as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
            os.killpg(process.pid, signal.SIGTSTP)
            eventually(lambda: state_of(process.pid) == "T", "dirtylog does not stop")
            time.sleep(0.2)
            os.killpg(process.pid, signal.SIGCONT)
            for _ in range(20):
                line = process.stdout.readline()
            assert f"[{0x10000000000 // PAGE + 2}, 1]" in line, "the command does not go on"
        os.killpg(process.pid, signal.SIGINT)
        assert finish(process).status == 130


# --- paused


def test_pause_stops_every_thread_and_resume_lets_them_go() -> None:
    with command("spin", "2", "spin", "3", "spin", "4", "busy", "1") as (memory, log):
        memory.resume()
        for _ in range(25):
            assert all(reports(log, page) for page in (1, 2, 3, 4))
            memory.pause()
            memory.pause()
            get_all(log)
            time.sleep(0.004)
            assert get_all(log) == set()
            contents = arena(memory)
            time.sleep(0.004)
            assert arena(memory) == contents
            memory.resume()
        memory.close()
        assert memory.status == -signal.SIGTERM


def arena(memory: ProcessMemory) -> bytes:
    slot = next(slot for slot in memory.slots if slot.npages == NPAGES)
    return memory.read(slot.id, list(range(NPAGES))).tobytes()


def test_close_waits_for_the_end_whichever_thread_takes_the_signal() -> None:
    """The first thread may be killed by another's exit while it stands in a stop of its tracer."""
    for _ in range(40):
        with command("spin", "2", "spin", "3", "spin", "4", "busy", "1") as (memory, log):
            memory.resume()
            for _ in range(5):
                assert reports(log, 2)
                memory.pause()
                memory.resume()
            memory.close()
            assert memory.status == -signal.SIGTERM
            assert is_gone(memory.pid)


def test_signals_that_come_during_a_pause_are_kept() -> None:
    with command("handle", str(int(signal.SIGUSR1)), "spin", "2", "busy", "1") as (memory, log):
        memory.resume()
        for _ in range(10):
            assert reports(log, 1)
            memory.pause()
            get_all(log)
            os.kill(memory.pid, signal.SIGUSR1)
            time.sleep(0.01)
            assert get_all(log) == set()
            memory.resume()
            assert reports(log, USR1_PAGE)


@pytest.mark.parametrize("nthreads", [1, 3])
def test_somebody_else_stops_it_during_a_pause(nthreads: int) -> None:
    with command(*("spin", "2") * (nthreads - 1), "busy", "1") as (memory, log):
        memory.resume()
        assert reports(log, 1)
        memory.pause()
        os.kill(memory.pid, signal.SIGSTOP)
        in_time(memory.resume)
        eventually(lambda: state_of(memory.pid) in "tT" and is_quiet(log), "it is not stopped")
        os.kill(memory.pid, signal.SIGCONT)
        assert reports(log, 1), "it does not go on"
        in_time(memory.pause)
        assert is_quiet(log)
        in_time(memory.resume)
        assert reports(log, 1)


@pytest.mark.parametrize("nthreads", [1, 3])
def test_a_pause_of_one_that_somebody_else_has_stopped(nthreads: int) -> None:
    with command(*("spin", "2") * (nthreads - 1), "busy", "1") as (memory, log):
        memory.resume()
        assert reports(log, 1)
        os.kill(memory.pid, signal.SIGSTOP)
        eventually(lambda: state_of(memory.pid) in "tT" and is_quiet(log), "it is not stopped")
        in_time(memory.pause)
        assert is_quiet(log)
        in_time(memory.resume)
        os.kill(memory.pid, signal.SIGCONT)
        assert reports(log, 1), "it does not go on"


def test_a_pause_of_one_that_has_ended() -> None:
    with command("exit", "3") as (memory, _):
        memory.resume()
        assert memory.ending(20)
        in_time(memory.pause)
        in_time(memory.resume)
        memory.close()
        assert memory.status == 3


def test_pauses_of_one_that_is_stopped_and_continued_all_the_time() -> None:
    chance = random.Random(2)
    with command("spin", "2", "busy", "1") as (memory, log):
        memory.resume()
        assert reports(log, 1)
        over = threading.Event()

        def disturb() -> None:
            while not over.is_set():
                os.kill(memory.pid, signal.SIGSTOP)
                time.sleep(chance.random() * 0.002)
                os.kill(memory.pid, signal.SIGCONT)
                time.sleep(chance.random() * 0.004)

        disturber = threading.Thread(target=disturb)
        disturber.start()
        try:
            for _ in range(30):
                in_time(memory.pause)
                in_time(memory.resume)
        finally:
            over.set()
            disturber.join()
        assert reports(log, 1), "it does not go on"


# --- who logs it dies


@pytest.fixture
def talking() -> Iterator[tuple[subprocess.Popen[str], Any, Any]]:
    """Give a dirtylog that has started a writer that obeys, and pipes to that writer."""
    words = ("run", "--jsonl", "--interval", "0.01", "--rounds", "100000", "--", writer(), "spin", "2", "obey")
    process = subprocess.Popen(command_line(*words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    yield process, process.stdin, process.stdout
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()


def wait_for(word: str, said: Any) -> None:
    """Read until the command has said something."""
    while (line := said.readline()) != f"{word}\n":
        assert line, "it has ended"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0, 0.003, 0.02, 0.1, 0.3])
def test_the_command_runs_on(how: int, delay: float, talking: tuple[subprocess.Popen[str], Any, Any]) -> None:
    process, say, said = talking
    wait_for("ready", said)
    (child,) = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()]
    time.sleep(delay)
    process.send_signal(how)
    process.wait(20)
    say.write("store 1\nsay here\n")
    wait_for("here", said)
    assert tracer_of(child) == 0
    eventually(lambda: watched_mappings(child) == 0, "its memory is still watched")
    say.close()
    assert "{" not in said.read()
    eventually(lambda: is_gone(child), "it does not end with its input")


def test_killed_at_any_moment_of_the_start_it_leaves_a_command_that_is_well_or_none() -> None:
    for twentieth in range(24):
        read, write = os.pipe()
        words = ("run", "--jsonl", "--", writer(), "say", "begun", "sleep", "300", "say", "done")
        process = subprocess.Popen(command_line(*words), stdout=write)
        os.close(write)
        time.sleep(twentieth / 40)
        process.kill()
        process.wait()
        with open(read, encoding="utf-8") as pipe:  # noqa: PTH123 - a descriptor
            said = [line.strip() for line in pipe if not line.startswith("{")]
        assert said in ([], ["begun", "done"])


# Its main thread is interrupted after so many seconds, in the middle of a start.
INTERRUPTED = """\
import signal, sys, dirtylog.linux.launch
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))
try:
    dirtylog.linux.launch.Launched(sys.argv[2:]).close()
except KeyboardInterrupt:
    print("interrupted")
finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
"""


def test_an_interrupt_in_the_middle_of_a_start_leaves_no_command() -> None:
    interrupted = 0
    for millisecond in range(1, 40, 2):
        words = (writer(), "say", "begun", "sleep", "100")
        ran = subprocess.run(
            (sys.executable, "-c", INTERRUPTED, str(millisecond / 1000), *words), capture_output=True, text=True, check=True
        )
        assert "begun" not in ran.stdout, "it ran, although nobody let it go"
        interrupted += "interrupted" in ran.stdout
    assert interrupted


def test_a_tracer_that_is_killed_while_the_command_is_paused() -> None:
    program = (
        "import os, signal, sys, dirtylog\n"
        "memory = dirtylog.open(sys.argv[1:])\n"
        "memory.resume(); memory.pause()\n"
        "print(memory.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    words = (writer(), "spin", "3", "busy", "2")
    with subprocess.Popen((sys.executable, "-c", program, *words), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.stdout.close()
    try:
        eventually(lambda: state_of(child) in "RS", "it does not go on")
        assert all(tracer_of(child, tid) == 0 for tid in threads_of(child))
    finally:
        os.kill(child, signal.SIGKILL)


def test_two_commands_at_once() -> None:
    first, second = Launched([writer(), "exit", "3"]), Launched([writer(), "exit", "4"])
    for one in (second, first):
        one.userfaultfd().close()  # type: ignore[union-attr]  # there is one
        one.go()
    for one in (first, second):
        assert one.ending.wait(20)
        one.close()
    assert (first.status, second.status) == (3, 4)


def test_a_command_can_be_logged_again() -> None:
    with command("spin", "2", "busy", "1") as (memory, log):
        memory.resume()
        assert reports(log, 1)
        log.stop()
        assert not is_gone(memory.pid)
        log.start()
        assert reports(log, 1)

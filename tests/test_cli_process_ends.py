"""However dirtylog ends while it logs a process, the process is as it was: interrupted, killed, or with nobody who reads it."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time

import pytest

from dirtylog.cli import main
from victims import Victim, needs_victims, same_descriptors, watched_mappings
from writers import ARENA_MAP, Writer, children, eventually, finish, start, writer

FOREVER = ("--rounds", "1000000", "--interval", "0.01")


@pytest.mark.parametrize("port", [pytest.param("uffd", marks=needs_victims), "compare"])
def test_an_interrupt_exits_130_and_the_target_runs_on(port: str) -> None:
    with (
        Writer("spin", "5") as target,
        start("run", f"pid:{target.pid}", "--map", ARENA_MAP, "--port", port, *FOREVER, "--jsonl") as process,
    ):
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        ran = finish(process)
        assert ran.status == 130
        assert first["round"] == 1
        target.check_unharmed()


@needs_victims
def test_an_interrupt_at_any_time_shows_no_traceback() -> None:
    with Writer("spin", "5") as target:
        for tenth in range(12):
            with start("run", f"pid:{target.pid}", *FOREVER, "--json") as process:
                time.sleep(tenth / 10)
                process.send_signal(signal.SIGINT)
                process.wait(60)
                err = process.stderr.read() if process.stderr else ""
            assert process.returncode in (130, -signal.SIGINT)
            assert process.returncode == -signal.SIGINT or "Traceback" not in err, err
            target.check_unharmed()


@needs_victims
def test_a_reader_that_goes_away_is_no_traceback() -> None:
    with Writer("spin", "5") as target:
        with start("run", f"pid:{target.pid}", *FOREVER, "--jsonl") as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.readline()
            process.stdout.close()
            err = process.stderr.read()
            assert process.wait(60) == 1
        assert err == ""
        target.check_unharmed()


@needs_victims
def test_killed_at_random_moments_it_leaves_nothing_behind() -> None:
    chance = random.Random(1)
    with Victim("compute*2", "nanosleep@5", "futex@5", "read@5") as victim:
        for turn in range(16):
            with start("run", f"pid:{victim.pid}", *FOREVER, "--jsonl") as process:
                assert process.stdout is not None
                if turn % 2:
                    process.stdout.readline()
                time.sleep(chance.random() * (0.05 if turn % 2 else 1))
                process.kill()
            victim.check()
            eventually(lambda: watched_mappings(victim.pid) == 0, "its memory is still watched")


@needs_victims
def test_a_command_leaves_nothing_behind_here() -> None:
    before = children()
    with same_descriptors(os.getpid()):
        assert main(["run", "--", "/no/such/command"]) == 2
        assert main(["run", "--rounds", "2", "--interval", "0.02", "--", writer(), "sleep", "60000"]) == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dirtylog")]
    assert children() == before

"""A process that two log, or that is left: by a close, by the death of who logged it, by its own first thread."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import dirtylog
from address_space import ANONYMOUS, SHARED
from puppets import Puppet, follow, logged
from victims import eventually, needs_victims, same_descriptors, tracer_of, watched_mappings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dirtylog import DirtyLog

pytestmark = needs_victims

NPAGES = 64
EVERYTHING = set(range(NPAGES))


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    with Puppet() as started:
        yield started


def filled(puppet: Puppet) -> int:
    address = puppet.map(NPAGES)
    puppet.fill(address, NPAGES)
    return address


# --- two logs of one process


def test_the_second_of_two_logs_says_that_it_sees_nothing(puppet: Puppet) -> None:
    address = filled(puppet)
    with logged(puppet) as (_, first):
        follow(first)
        with logged(puppet) as (memory, second):
            puppet.store(address, [5])
            assert follow(second).count() == 0
            assert len(memory.slots) == 0
            assert any("is not logged" in reason for reason in memory.incomplete)
            assert any("userfaultfd" in skipped.reason for skipped in memory.skipped)
            assert follow(first).at(address, NPAGES) == {5}, "the second took nothing away"
            first.stop()
            assert follow(second).at(address, NPAGES) == EVERYTHING, "what it could not log so far is new to it"
            assert memory.incomplete == ()
            puppet.store(address, [6])
            assert follow(second).at(address, NPAGES) == {6}


def test_two_logs_share_a_process_by_mappings(puppet: Puppet) -> None:
    address, shared = filled(puppet), puppet.map(NPAGES, SHARED | ANONYMOUS)
    with logged(puppet, maps=["shared"]) as (_, first), logged(puppet, maps=["anonymous"]) as (_, second):
        follow(first)
        follow(second)
        puppet.store(address, [1])
        puppet.store(shared, [2])
        reported = follow(first), follow(second)
        assert [one.at(address, NPAGES) for one in reported] == [set(), {1}]
        assert [one.at(shared, NPAGES) for one in reported] == [{2}, set()]


def test_beside_another_log_there_is_comparing(puppet: Puppet) -> None:
    address = filled(puppet)
    with logged(puppet) as (_, first), logged(puppet, port="compare", maps=["anonymous"]) as (_, second):
        follow(first)
        follow(second)
        puppet.store(address, [5], 9)
        assert follow(first).at(address, NPAGES) == {5}
        assert follow(second).at(address, NPAGES) == {5}


def test_a_process_that_watches_memory_of_its_own() -> None:
    """What it watches is its own affair, and said not to be logged; all else is."""
    script = (
        "import dirtylog, numpy as np; a = dirtylog.empty(64 * 4096, np.uint8); a[:] = 1; log = dirtylog.track(a, port='uffd');"
        "print(a.ctypes.data, flush=True); input(); a[::4096] = 2; print(log.get(0).count(), flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as target:
        assert target.stdin is not None
        assert target.stdout is not None
        address = int(target.stdout.readline())
        with dirtylog.open(f"pid:{target.pid}", port="uffd") as memory, dirtylog.DirtyLog(memory) as log:
            assert follow(log).at(address, NPAGES) == set()
            assert any(f"{address:#x}" in reason for reason in memory.incomplete)
            assert len(memory.slots) > 10
            target.stdin.write("\n")
            target.stdin.flush()
            assert target.stdout.readline() == "64\n", "it sees all of its own writes"
            assert follow(log).count() > 0
        target.communicate("\n")
        assert target.returncode == 0


# --- it is left


def test_a_close_leaves_nothing_behind(puppet: Puppet) -> None:
    address = filled(puppet)
    puppet.order(f"thread {filled(puppet)} 4096 {NPAGES}")
    with same_descriptors(puppet.pid), same_descriptors(os.getpid()):
        for _ in range(5):
            with logged(puppet) as (_, log):
                puppet.store(address, [1])
                assert follow(log).at(address, NPAGES) >= {1}
                assert watched_mappings(puppet.pid) > 5
            assert watched_mappings(puppet.pid) == 0
            assert tracer_of(puppet.pid) == 0
    puppet.order("quiet 0 0 0")
    puppet.store(address, range(NPAGES), 9)
    assert puppet.peek(address, 1) == b"\x09"


def test_who_logs_it_dies(puppet: Puppet) -> None:
    address = filled(puppet)
    script = (
        "import dirtylog, sys\n"
        "with dirtylog.open(f'pid:{sys.argv[1]}', port='uffd') as memory, dirtylog.DirtyLog(memory) as log:\n"
        "    while True:\n"
        "        log.update()\n"
        "        print(sum(log.get(slot.id).count() for slot in memory.slots), flush=True)\n"
        "        if 'paused' in sys.argv: memory.pause()\n"
    )
    for how in ("running", "paused"):
        with subprocess.Popen([sys.executable, "-c", script, str(puppet.pid), how], stdout=subprocess.PIPE) as tracker:
            assert tracker.stdout is not None
            for _ in range(3):
                assert tracker.stdout.readline()
            assert watched_mappings(puppet.pid) > 5
            os.kill(tracker.pid, signal.SIGKILL)
            assert tracker.wait() == -signal.SIGKILL
        eventually(lambda: watched_mappings(puppet.pid) == 0, "nothing is watched any more")
        puppet.store(address, range(NPAGES), 7)
        assert puppet.peek(address, 1) == b"\x07"
        assert tracer_of(puppet.pid) == 0


def test_a_log_that_is_stopped_and_started_again(puppet: Puppet) -> None:
    address = filled(puppet)
    with dirtylog.open(f"pid:{puppet.pid}", port="uffd") as memory:
        log: DirtyLog = dirtylog.DirtyLog(memory)
        for _ in range(3):
            with log:
                follow(log)
                puppet.store(address, [1])
                assert follow(log).at(address, NPAGES) == {1}
            assert watched_mappings(puppet.pid) == 0
            gone, new = filled(puppet), filled(puppet)
            puppet.unmap(gone, NPAGES)
            with log:
                assert follow(log).at(new, NPAGES) in (set(), EVERYTHING)

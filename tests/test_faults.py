"""How many page faults a source has taken: what logging costs it is among them."""

from __future__ import annotations

import mmap
import os
import struct
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import dirtylog
from dirtylog import DirtyLog, DirtyLogError
from dirtylog.compare import ComparePort
from dirtylog.emulated.arch.ppc_hv import PpcHvPort
from dirtylog.emulated.arch.x86 import X86PmlPort
from dirtylog.kvm.guest import make_kvm_guest
from dirtylog.kvm.ports import KvmBitmapPort, KvmManualPort
from dirtylog.kvm.ring_port import KvmRingPort
from dirtylog.kvm.statistics import KvmStatistics, faults_taken
from kvm_here import needs_kvm
from sources import open_source, sources

if TYPE_CHECKING:
    from collections.abc import Callable

    from dirtylog import Memory

SOON = 20.0
SIZE = 1 << 20

HARDWARE_LOGS = (X86PmlPort, PpcHvPort)
"""Their processor logs a store by itself; a page stays writable."""
KVM = (KvmBitmapPort, KvmManualPort, KvmRingPort)


def until(met: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not met():
        assert time.monotonic() < end, "this should have happened long ago"
        time.sleep(0.005)


def written_pages(memory: Memory, log: DirtyLog) -> int:
    """Let the source run until something is reported, stop it, and return how many pages were reported since the call."""
    total = 0
    end = time.monotonic() + SOON
    while not total:
        assert time.monotonic() < end, "nothing was written"
        memory.resume()
        time.sleep(0.01)
        memory.pause()
        total = log.get(0).count()
    return total


@pytest.mark.parametrize("name", sources(lambda port: not issubclass(port, (ComparePort, *HARDWARE_LOGS, *KVM))))
def test_a_first_store_after_a_get_is_a_fault(name: str) -> None:
    with open_source(name, SIZE) as memory, DirtyLog(memory) as log:
        written_pages(memory, log)
        before = memory.faults
        pages = written_pages(memory, log)
        assert before is not None
        assert memory.faults is not None
        assert memory.faults - before >= pages > 0


@pytest.mark.parametrize("name", sources(lambda port: issubclass(port, HARDWARE_LOGS)))
def test_where_the_processor_logs_by_itself_a_store_is_none(name: str) -> None:
    with open_source(name, SIZE) as memory, DirtyLog(memory) as log:
        until(lambda: written_pages(memory, log) > 0 and (memory.faults or 0) >= SIZE >> 12)
        before = memory.faults
        written_pages(memory, log)
        assert memory.faults == before


def test_a_source_that_was_just_opened_has_taken_none() -> None:
    with dirtylog.open("emu:arm64", size=SIZE) as memory:
        assert memory.faults == 0


# --- KVM


@pytest.mark.parametrize("name", sources(lambda port: issubclass(port, KVM)))
def test_kvm_counts_the_faults_of_its_vcpus_or_nobody_does(name: str) -> None:
    """Faults that stay 0 while instructions are interpreted are not counted: then the answer is None, never 0."""
    with open_source(name, SIZE, vcpus=2) as memory, DirtyLog(memory) as log:
        assert memory.faults in (0, None)
        written_pages(memory, log)
        assert memory.faults is None or memory.faults > 0


@needs_kvm
def test_statistics_can_be_read_while_the_vcpu_runs_and_end_with_it() -> None:
    with make_kvm_guest(SIZE) as memory:
        statistics = memory.cpus[0].statistics
        if statistics is None:
            pytest.skip("this kernel has no binary statistics")
        assert statistics.read("no_such_counter") is None
        before = statistics.read("exits")
        assert before is not None
        memory.resume()
        until(lambda: (statistics.read("exits") or 0) > before)
        memory.pause()
        fd = statistics.fileno()
    assert statistics.closed
    assert memory.faults is None
    with pytest.raises(DirtyLogError, match="closed"):
        statistics.read("exits")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def statistics_of(cut: int = 0, **counters: int) -> KvmStatistics:
    """Return statistics as a kernel would give them, in another order than ours; ``cut`` bytes are missing at the end."""
    names, size = [name.encode() for name in counters], 48
    description = struct.Struct(f"=IhHII{size}s")
    table, data = 100, 100 + len(names) * description.size
    fd = os.memfd_create("statistics")
    os.pwrite(fd, struct.pack("=6I", 0, size, len(names), 24, table, data), 0)
    for index, (name, value) in enumerate(zip(names, counters.values(), strict=True)):
        place = 8 * (len(names) - 1 - index)
        os.pwrite(fd, description.pack(0, 0, 1, place, 0, name), table + index * description.size)
        os.pwrite(fd, struct.pack("=Q", value), data + place)
    os.truncate(fd, os.fstat(fd).st_size - cut)
    return KvmStatistics(fd)


def faults_of(*vcpus: dict[str, int]) -> int | None:
    opened = [statistics_of(**counters) for counters in vcpus]
    try:
        return faults_taken(opened)
    finally:
        for one in opened:
            one.close()


@pytest.mark.parametrize(
    ("vcpus", "faults"),
    [
        (({"exits": 9, "pf_taken": 7, "insn_emulation": 1}, {"pf_taken": 1 << 40, "exits": 3, "insn_emulation": 0}), (1 << 40) + 7),
        (({"pf_taken": 0, "insn_emulation": 0},), 0),
        (({"pf_taken": 0, "insn_emulation": 12},), None),
        (({"pf_taken": 0, "insn_emulation": 12}, {"pf_taken": 1, "insn_emulation": 12}), 1),
        (({"pf_taken": 3},), 3),
        (({"pf_fixed": 3, "insn_emulation": 0},), None),
        (({"pf_taken": 3}, {"pf_fixed": 3}), None),
        ((), 0),
    ],
)
def test_faults_are_those_of_all_vcpus_as_far_as_they_are_counted(vcpus: tuple[dict[str, int], ...], faults: int | None) -> None:
    assert faults_of(*vcpus) == faults


def test_a_vcpu_without_statistics_makes_the_number_unknown() -> None:
    with statistics_of(pf_taken=3) as counted:
        assert faults_taken([counted]) == 3
        assert faults_taken([counted, None]) is None
    assert faults_taken([counted]) is None, "it is closed"


def test_statistics_that_are_cut_off_are_refused() -> None:
    with statistics_of(pf_taken=3) as counted:
        os.truncate(counted.fileno(), 110)
        with pytest.raises(DirtyLogError, match="statistics"):
            counted.read("pf_taken")
    with pytest.raises(DirtyLogError, match="statistics"):
        statistics_of(cut=40, pf_taken=3)


# --- processes and buffers


def test_the_faults_of_a_process_are_counted_through_an_exec_until_it_ends() -> None:
    with subprocess.Popen(["/bin/sh", "-c", "read line; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        with dirtylog.open(f"pid:{process.pid}", port="compare") as memory:
            before = memory.faults
            assert before is not None
            assert before >= 0
            process.stdin.write(b"go on\n")
            process.stdin.flush()
            until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "cat\n")
            until(lambda: (memory.faults or 0) > before)
            process.stdin.close()
            until(lambda: memory.faults is None)


def test_a_process_of_a_closed_memory_is_not_asked() -> None:
    with subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE) as process:
        with dirtylog.open(f"pid:{process.pid}", port="compare") as memory:
            pass
        assert memory.faults is None
        assert process.stdin is not None
        process.stdin.close()


def test_a_buffer_s_count_begins_when_it_is_opened() -> None:
    """It is of the whole process; those of before are left out."""
    resource = pytest.importorskip("resource", reason="it is Unix's")
    array = dirtylog.empty((1000, mmap.PAGESIZE), "uint8")
    array[:, 0] = 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with dirtylog.track(array, port="compare") as log:
        first = log.memory.faults
        assert first is not None
        assert first < before
        dirtylog.empty((500, mmap.PAGESIZE), "uint8")[:, 0] = 1
        assert (log.memory.faults or 0) > first

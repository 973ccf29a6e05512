"""vCPUs: pause and resume, faults, reset, shutdown, and flushes of running ones."""

from __future__ import annotations

import time

import numpy as np
import pytest

from dirtylog import DirtyLog, DirtyLogError, GuestFaultError, InvalidArgumentError
from dirtylog.emulated.arch import PORTS
from dirtylog.emulated.guest import make_guest
from dirtylog.guests.machine import RAM_SLOT, ROM_SLOT
from dirtylog.guests.programs import Pattern
from dirtylog.guests.vcpu import VcpuState

NPAGES = 64


def test_a_guest_starts_paused_and_resumes_where_it_was_paused() -> None:
    with make_guest("arm64", NPAGES << 12) as memory:
        before = memory.read(RAM_SLOT, np.arange(NPAGES))
        time.sleep(0.01)
        assert np.array_equal(before, memory.read(RAM_SLOT, np.arange(NPAGES)))
        for _ in range(3):
            memory.resume()
            time.sleep(0.01)
            memory.pause()
            now = memory.read(RAM_SLOT, np.arange(NPAGES))
            assert not np.array_equal(before, now), "it ran"
            time.sleep(0.005)
            assert np.array_equal(now, memory.read(RAM_SLOT, np.arange(NPAGES))), "it stands still"
            before = now


@pytest.mark.parametrize("arch", PORTS)
def test_a_store_outside_every_slot_stops_the_vcpu_with_all_that_is_known(arch: str) -> None:
    bad = 64 << 20
    with make_guest(arch, NPAGES << 12, loops=[Pattern(base=bad, count=1)]) as memory:
        memory.resume()
        with pytest.raises(GuestFaultError) as caught:
            memory.wait(timeout=30)
        error = caught.value
        assert error.address == bad
        assert error.architecture in (arch, memory.port.isa)
        assert f"{bad:#x}" in str(error)
        vcpu = memory.vcpus[0]
        assert vcpu.state is VcpuState.FAULTED
        if memory.port.isa != "trace":
            rom = memory.slots[ROM_SLOT].base_gfn << 12
            assert rom < error.pc < rom + 64, "the pc is that of the store"
        memory.pause()


def test_a_store_to_a_read_only_slot_is_a_fault() -> None:
    with make_guest("x86", NPAGES << 12) as small:
        rom = small.slots[ROM_SLOT].base_gfn << 12
    with make_guest("x86", NPAGES << 12, loops=[Pattern(base=rom, count=1)]) as memory, DirtyLog(memory) as log:
        memory.resume()
        with pytest.raises(GuestFaultError):
            memory.wait(timeout=30)
        assert not log.get(ROM_SLOT).any()


def test_one_vcpu_s_fault_leaves_the_others_running() -> None:
    loops = [Pattern(base=1 << 40, count=1), Pattern(base=0, mask=NPAGES - 1)]
    with make_guest("riscv", NPAGES << 12, vcpus=2, loops=loops) as memory, DirtyLog(memory) as log:
        memory.resume()
        assert memory.vcpus[0].wait(timeout=30)
        log.get(RAM_SLOT)
        time.sleep(0.02)
        assert log.get(RAM_SLOT).any()
        assert memory.vcpus[1].state is VcpuState.READY


@pytest.mark.parametrize("arch", PORTS)
def test_a_reset_guest_does_it_all_again(arch: str) -> None:
    with make_guest(arch, NPAGES << 12, loops=[Pattern(base=0, mask=NPAGES - 1, count=10)]) as memory, DirtyLog(memory) as log:
        for _ in range(3):
            memory.resume()
            assert memory.wait(timeout=30)
            assert log.get(RAM_SLOT).pages().tolist() == list(range(10))
            memory.reset()


@pytest.mark.parametrize("arch", PORTS)
def test_a_faulted_vcpu_can_be_reset(arch: str) -> None:
    with make_guest(arch, NPAGES << 12, loops=[Pattern(base=1 << 31, count=1)]) as memory:
        for _ in range(2):
            memory.resume()
            with pytest.raises(GuestFaultError):
                memory.wait(timeout=30)
            memory.reset()
            memory.check()


def test_a_running_vcpu_cannot_be_reset() -> None:
    with make_guest("x86", NPAGES << 12) as memory:
        memory.resume()
        with pytest.raises(DirtyLogError, match="running"):
            memory.vcpus[0].reset()


def test_closing_while_running_ends_every_thread() -> None:
    memory = make_guest("mips", NPAGES << 12, vcpus=8)
    memory.resume()
    time.sleep(0.01)
    memory.close()
    memory.close()
    assert all(vcpu.state is VcpuState.CLOSED and not vcpu.in_guest for vcpu in memory.vcpus)


def test_a_log_outlives_its_guest_s_vcpus() -> None:
    memory = make_guest("s390", NPAGES << 12)
    log = DirtyLog(memory)
    log.start()
    memory.resume()
    time.sleep(0.02)
    memory.close()
    dirty = log.get(RAM_SLOT)
    assert dirty.any()
    assert memory.read(RAM_SLOT, dirty.pages()).any()
    log.stop()


def test_eight_vcpus_and_no_ninth() -> None:
    with make_guest("arm64", 1024 << 12, vcpus=8) as memory, DirtyLog(memory) as log:
        memory.resume()
        time.sleep(0.1)
        assert log.get(RAM_SLOT).any()
        memory.pause()
        with pytest.raises(InvalidArgumentError, match="at most 8"):
            memory.add_vcpu(lambda index: memory.vcpus[index].cpu)


def test_slots_come_before_vcpus() -> None:
    with make_guest("arm64", NPAGES << 12) as memory, pytest.raises(InvalidArgumentError, match="after a vCPU"):
        memory.add_slot(3, 1 << 20, 1)


@pytest.mark.parametrize("arch", PORTS)
def test_a_flush_of_running_vcpus_comes_before_the_get_returns(arch: str) -> None:
    """A page that is hot is reported in every round: were a translation to survive a get, it would be missing once."""
    pages = 4
    loops = [Pattern(base=index * pages << 12, mask=pages - 1) for index in range(2)]
    late = 1 if arch == "ppc-hv" else 0
    with make_guest(arch, NPAGES << 12, vcpus=2, loops=loops) as memory, DirtyLog(memory) as log:
        memory.resume()
        time.sleep(0.05)
        log.get(RAM_SLOT)
        missed = 0
        for _ in range(20):
            before = memory.read(RAM_SLOT, np.arange(2 * pages))
            time.sleep(0.01)
            after = memory.read(RAM_SLOT, np.arange(2 * pages))
            written = set(np.flatnonzero((before != after).any(axis=1)).tolist())
            reported = set(log.get(RAM_SLOT).pages().tolist())
            if late:
                reported |= set(log.get(RAM_SLOT).pages().tolist())
            missed += len(written - reported)
        assert missed == 0


def test_memory_write_checks_its_input_and_changes_nothing() -> None:
    with make_guest("x86", NPAGES << 12) as memory, DirtyLog(memory) as log:
        for pages, shape in (([0], (1, 4095)), ([0, 1], (1, 4096)), ([NPAGES], (1, 4096)), ([-1], (1, 4096))):
            with pytest.raises(InvalidArgumentError):
                memory.write(RAM_SLOT, pages, np.ones(shape, np.uint8))
        assert not log.get(RAM_SLOT).any()
        assert not memory.read(RAM_SLOT, np.arange(NPAGES)).any()
        out = np.empty((2, 4096), np.uint8)
        assert memory.read(RAM_SLOT, [1, 2], out) is out

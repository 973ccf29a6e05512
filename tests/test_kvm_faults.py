"""Ends of KVM guests, wanted and not: half-way through being made, while they run, twice, under a get; nothing stays behind."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dirtylog import CopyFaultError, DirtyLog, DirtyLogError, GuestFaultError, Image, InvalidArgumentError, LoggingOffError
from dirtylog import open as open_target
from dirtylog.guests.machine import RAM_SLOT
from dirtylog.guests.programs import Pattern
from dirtylog.kvm.arch.x86_64_registers import Regs
from dirtylog.kvm.guest import make_kvm_guest
from dirtylog.options import Backing, KvmOptions, Log
from kvm_bare import HLT, NOWHERE, PAGE, bare_guest, held, nothing_is_left
from kvm_here import needs_kvm

if TYPE_CHECKING:
    from collections.abc import Callable

    from dirtylog.kvm.memory import KvmMemory

pytestmark = needs_kvm
every_log = pytest.mark.parametrize("log", Log, ids=lambda log: log.value)

SIZE = 1 << 20
SOON = 10.0


def guest(log: Log = Log.BITMAP, *, vcpus: int = 2, loops: list[Pattern] | None = None) -> KvmMemory:
    """Return a guest that writes its memory for ever, which is a memfd, so that it can be seen."""
    options = KvmOptions(log=log, backing=Backing.MEMFD, ring_entries=4096)
    return make_kvm_guest(SIZE, program="random", vcpus=vcpus, loops=loops, options=options)


class MishapError(Exception):
    """A consumer's own."""


def test_what_a_guest_holds_is_seen() -> None:
    before = held()
    with guest(Log.RING, vcpus=2) as memory, DirtyLog(memory):
        memory.resume()
        now = held()
        assert now.descriptors >= before.descriptors + 5, "the system, the machine, two vCPUs, and the memory"
        assert now.mappings == before.mappings + 5, "two run pages, two rings, the memory"
        assert now.threads == before.threads + 3, "two vCPUs and the collector"
        memory.pause()
    assert held() == before


@every_log
def test_a_guest_that_runs_freely_is_closed_and_holds_nothing(log: Log) -> None:
    with nothing_is_left():
        for _ in range(3):
            memory = guest(log, vcpus=3)
            dirty = DirtyLog(memory)
            dirty.start()
            memory.resume()
            dirty.get(RAM_SLOT)
            time.sleep(0.01)
            memory.close()
            assert all(not vcpu.in_guest for vcpu in memory.vcpus)


@every_log
def test_a_guest_that_is_not_logged_or_never_ran_is_closed_and_holds_nothing(log: Log) -> None:
    with nothing_is_left():
        guest(log).close()
        memory = guest(log)
        memory.resume()
        memory.close()


@every_log
def test_a_close_amid_an_exception_holds_nothing(log: Log) -> None:
    def run_into_trouble() -> None:
        with guest(log) as memory, DirtyLog(memory):
            memory.resume()
            raise MishapError

    with nothing_is_left(), pytest.raises(MishapError):
        run_into_trouble()


@every_log
def test_a_second_close_and_a_stop_after_it_do_nothing(log: Log) -> None:
    with nothing_is_left():
        memory = guest(log)
        with DirtyLog(memory) as dirty:
            memory.resume()
            memory.close()
            memory.close()
        dirty.stop()
        memory.close()


@every_log
def test_what_is_closed_says_so(log: Log) -> None:
    memory = guest(log)
    dirty = DirtyLog(memory)
    dirty.start()
    rom = memory.architecture.make_rom(2 << 20, 3 << 20, b"\xf4")
    cpu = memory.cpus[0].vcpu
    ram = memory.slots[RAM_SLOT]
    page = np.zeros((1, PAGE), np.uint8)
    memory.close()
    calls: list[Callable[[], object]] = [
        lambda: memory.add_slot(7, 1 << 20, 1),
        lambda: memory.add_vcpu(rom, rom.program),
        lambda: memory.remove_slot(RAM_SLOT),
        lambda: memory.move_slot(RAM_SLOT, 1 << 20),
        lambda: memory.read(RAM_SLOT, [0]),
        lambda: memory.write(RAM_SLOT, [0], page),
        lambda: memory.contents(ram),
        lambda: memory.memfd(RAM_SLOT),
        lambda: memory.load(0, b"\xf4"),
        lambda: memory.host_write(0, 16).__enter__(),
        memory.reset,
        lambda: memory.cpus[0].pc,
        cpu.run,
        lambda: cpu.get(Regs),
        lambda: memory.vm.create_vcpu(7),
        memory.vm.reset_dirty_rings,
        memory.system.create_vm,
        lambda: dirty.get(RAM_SLOT),
    ]
    for number, call in enumerate(calls):
        with pytest.raises(DirtyLogError):
            pytest.fail(f"call {number} returned {call()!r}")
    memory.pause()
    memory.check()


def test_a_get_after_a_close_finds_no_slot() -> None:
    memory = guest()
    with DirtyLog(memory) as dirty:
        memory.close()
        with pytest.raises(LoggingOffError, match="there is no slot 0; the slots are: none"):
            dirty.get(RAM_SLOT)


@every_log
def test_what_races_with_a_close_ends_with_typed_errors_only(log: Log) -> None:
    page = np.ones((1, PAGE), np.uint8)
    with nothing_is_left():
        for delay in (0, 0.001, 0.005):
            memory = guest(log)
            dirty = DirtyLog(memory)
            dirty.start()
            memory.resume()
            calls: list[Callable[[], object]] = [
                lambda dirty=dirty: dirty.get(RAM_SLOT),  # type: ignore[misc]  # bound early
                lambda memory=memory: memory.read(RAM_SLOT, [0, 1]),  # type: ignore[misc]
                lambda memory=memory: memory.write(RAM_SLOT, [5], page),  # type: ignore[misc]
                lambda memory=memory: memory.host_write(0, 64).__enter__().release(),  # type: ignore[misc]
            ]
            with ThreadPoolExecutor(len(calls)) as threads:
                ends = [threads.submit(until_it_raises, call) for call in calls]
                time.sleep(delay)
                memory.close()
                errors = [end.result(timeout=SOON) for end in ends]
            assert [error for error in errors if not isinstance(error, DirtyLogError) or isinstance(error, CopyFaultError)] == []
            del memory, dirty, calls, ends, errors


def until_it_raises(call: Callable[[], object]) -> Exception:
    try:
        while True:
            call()
    except Exception as error:  # noqa: BLE001 - which, the caller asks
        return error.with_traceback(None)


@every_log
def test_closes_that_race_with_one_another_are_one(log: Log) -> None:
    with nothing_is_left():
        memory = guest(log)
        memory.resume()
        barrier = threading.Barrier(3)

        def close() -> None:
            barrier.wait()
            memory.close()

        with ThreadPoolExecutor(3) as threads:
            for end in [threads.submit(close) for _ in range(3)]:
                end.result(timeout=SOON)


@every_log
def test_a_vcpu_that_faults_leaves_the_others_running_and_its_error_to_be_asked_for(log: Log) -> None:
    loops = [Pattern(base=0, mask=63), Pattern(base=NOWHERE, count=1), Pattern(base=64 << 12, mask=63)]
    with nothing_is_left():
        memory = guest(log, vcpus=3, loops=loops)
        with DirtyLog(memory) as dirty:
            memory.resume()
            assert memory.vcpus[1].wait(timeout=SOON)
            dirty.get(RAM_SLOT)
            for page in (0, 64):
                deadline = time.monotonic() + SOON
                while page not in dirty.get(RAM_SLOT):
                    assert time.monotonic() < deadline, "the others have stopped"
            with pytest.raises(GuestFaultError, match="vCPU 1 of the x86 guest"):
                memory.check()
            memory.pause()
            memory.resume()
            memory.close()
        assert isinstance(memory.vcpus[1].error, GuestFaultError)
        memory.vcpus[1].error = None
        del memory, dirty


BAD_OPENS: dict[str, Callable[[], object]] = {
    "no vCPUs": lambda: open_target("kvm", size=SIZE, vcpus=0),
    "nine vCPUs": lambda: open_target("kvm", size=SIZE, vcpus=9),
    "an unknown program": lambda: open_target("kvm:nap", size=SIZE),
    "half a page": lambda: open_target("kvm", size=SIZE + 1),
    "no memory": lambda: open_target("kvm", size=0),
    "a ring that is no power of two": lambda: open_target("kvm", size=SIZE, log="ring", ring_entries=1000),
    "a ring that the kernel refuses": lambda: open_target("kvm", size=SIZE, log="ring", ring_entries=64),
    "an image for another guest": lambda: open_target("kvm", size=SIZE, backing="memfd", image=Image((), 0, isa="arm64")),
    "an image with a halt address": lambda: open_target("kvm", size=SIZE, backing="memfd", image=Image.raw(b"\xf4", halt=0)),
    "an image that does not fit": lambda: open_target("kvm", size=SIZE, backing="memfd", image=Image.raw(b"\xf4", load=SIZE)),
}


@pytest.mark.parametrize("how", BAD_OPENS)
def test_an_open_that_fails_holds_nothing(how: str) -> None:
    with nothing_is_left():
        refuse(BAD_OPENS[how])


def refuse(call: Callable[[], object]) -> None:
    with pytest.raises(InvalidArgumentError):
        call()


def test_slots_that_are_refused_or_removed_hold_nothing() -> None:
    with bare_guest(HLT) as memory, nothing_is_left():
        for _ in range(3):
            slot = memory.add_slot(9, 1 << 20, 16, backing=Backing.MEMFD)
            assert memory.memfd(9) is not None
            refuse(lambda: memory.add_slot(10, (1 << 20) + 8, 16, backing=Backing.MEMFD))
            # Its last byte is the last of all addresses, which only the kernel minds.
            refuse(lambda: memory.add_slot(10, (1 << 52) - 16, 16, backing=Backing.MEMFD))
            assert memory.slots.get(10) is None
            memory.remove_slot(9)
            with pytest.raises(DirtyLogError, match="gone"):
                memory.contents(slot)
            del slot


def test_memory_that_somebody_still_looks_at_outlives_its_guest() -> None:
    with nothing_is_left():
        memory = guest(loops=[Pattern(base=0, value=7, count=1)], vcpus=1)
        view = memory.contents(memory.slots[RAM_SLOT])
        memory.resume()
        assert memory.wait(timeout=SOON)
        memory.close()
        assert view[0, 0] == 7
        del view, memory

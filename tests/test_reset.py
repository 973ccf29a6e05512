"""Fast reset: memory and registers are the baseline's again, nobody else loses a page, and no interrupt leaves half of it."""

from __future__ import annotations

import itertools
import random
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dirtylog import (
    DirtyLog,
    DirtyLogError,
    GuestFaultError,
    Image,
    InvalidArgumentError,
    SlotFlags,
    UnsupportedError,
    empty,
    track,
)
from dirtylog.emulated.arch import PORTS
from dirtylog.emulated.cpu_unicorn import UnicornCpu
from dirtylog.emulated.guest import make_guest
from dirtylog.guests.baseline import Baseline
from dirtylog.guests.machine import RAM_SLOT, ROM_SLOT
from dirtylog.guests.programs import PAGE_SIZE, Pattern
from dirtylog.guests.vcpu import VcpuState
from dirtylog.kvm.memory import KvmMemory
from dirtylog.kvm.ports import KvmPort
from dirtylog.port import ProtectPort
from interrupts import interrupt
from kvm_bare import NOWHERE, PAGE, bare_guest
from kvm_here import needs_kvm
from sources import open_source, sources
from store_guests import BufferGuest, ProcessGuest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dirtylog.guests.machine import Machine
    from dirtylog.port import Port

NPAGES = 256
NBYTES = NPAGES * PAGE_SIZE
STORES = 40
WALK = Pattern(base=64 * PAGE_SIZE, mul=5, add=3, mask=127, count=STORES)
"""Forty stores to as many pages."""


def is_guest(port: type[Port]) -> bool:
    return port in PORTS.values() or issubclass(port, KvmPort)


def open_guest(name: str, *loops: Pattern, **options: Any) -> Machine[Any]:
    loops = loops or (WALK,)
    if "image" not in options:
        options["loops"] = loops
    memory = open_source(name, NBYTES, vcpus=len(loops), **options)
    assert not isinstance(memory, (BufferGuest, ProcessGuest))
    return memory


def everything(memory: Machine[Any]) -> dict[int, NDArray[np.uint8]]:
    return {slot.id: memory.contents(slot).copy() for slot in memory.slots}


def same(first: dict[int, NDArray[np.uint8]], second: dict[int, NDArray[np.uint8]]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[slot], second[slot]) for slot in first)


def run(memory: Machine[Any]) -> None:
    memory.resume()
    assert memory.wait(60)
    memory.pause()


def halted(memory: Machine[Any]) -> bool:
    return memory.vcpus[0].state is VcpuState.HALTED


@pytest.mark.parametrize("name", sources(is_guest))
def test_after_a_reset_the_guest_makes_the_same_stores_again(name: str) -> None:
    with open_guest(name) as memory, DirtyLog(memory) as log, Baseline(log) as baseline:
        before = everything(memory)
        ends = []
        for _ in range(4):
            run(memory)
            assert halted(memory)
            ends.append(everything(memory))
            assert not same(ends[-1], before)
            count = memory.reset_to(baseline)
            assert count == STORES or (count > STORES and memory.port.exactness.value == "superset")
            assert same(everything(memory), before)
            assert not halted(memory)
        assert all(same(end, ends[0]) for end in ends)
        assert memory.reset_to(baseline) == 0, "pages that were put back are clean for the baseline"


@pytest.mark.parametrize("name", sources(is_guest))
def test_a_reset_in_the_middle_of_a_run_and_of_two_vcpus(name: str) -> None:
    endless = [Pattern(base=start * PAGE_SIZE, mul=5, add=3, mask=31) for start in (64, 128)]
    with open_guest(name, *endless) as memory, DirtyLog(memory) as log:
        memory.resume()
        while not memory.contents(memory.slots[RAM_SLOT])[128:160].any():
            pass
        memory.pause()
        baseline = Baseline(log)
        before, pcs = everything(memory), [vcpu.cpu.pc for vcpu in memory.vcpus]
        states = memory.vcpu_states()
        for _ in range(5):
            memory.resume()
            while same(everything(memory), before):
                pass
            memory.pause()
            baseline.reset()
            assert same(everything(memory), before)
            assert [vcpu.cpu.pc for vcpu in memory.vcpus] == pcs
            if name in PORTS:
                assert memory.vcpu_states() == states


def test_a_halted_vcpu_stays_halted_and_one_that_faulted_since_does_not() -> None:
    late = Pattern(base=64 * PAGE_SIZE, mul=1, add=1, mask=(1 << 20) - 1)
    for name in ("x86", "ia64"):
        with open_guest(name, WALK, late) as memory, DirtyLog(memory) as log:
            memory.vcpus[0].resume()
            assert memory.vcpus[0].wait(60)
            memory.pause()
            baseline = Baseline(log)
            before = everything(memory)
            memory.resume()
            assert memory.vcpus[1].wait(60)
            memory.pause()
            assert memory.vcpus[1].state is VcpuState.FAULTED
            with pytest.raises(GuestFaultError):
                memory.check()
            assert baseline.reset() == NPAGES - 64
            memory.check()
            assert [vcpu.state for vcpu in memory.vcpus] == [VcpuState.HALTED, VcpuState.READY]
            assert same(everything(memory), before)


@needs_kvm
def test_an_access_that_nobody_answered_is_not_completed_after_a_reset() -> None:
    # mov eax, [rsi]; mov [rdi], eax; hlt: the load is refused, and its vCPU faults with the load still to be completed.
    with bare_guest("8b06 8907 f4", {"rsi": NOWHERE, "rdi": PAGE, "rax": 7}) as memory, DirtyLog(memory) as log:
        baseline = Baseline(log)
        state = memory.architecture.save(memory.system, memory.cpus[0].vcpu)
        for _ in range(3):
            memory.resume()
            assert memory.vcpus[0].wait(60)
            memory.pause()
            assert isinstance(memory.vcpus[0].error, GuestFaultError)
            baseline.reset()
            again = memory.architecture.save(memory.system, memory.cpus[0].vcpu)
            assert (again.regs, again.sregs, again.events) == (state.regs, state.sregs, state.events)  # type: ignore[attr-defined]  # an X86State


# --- what is written, and by whom

WRITES = st.lists(
    st.tuples(st.sampled_from(["guest", "write", "device", "reset", "get", "other", "drop"]), st.integers(0, 1 << 30)), max_size=25
)


@pytest.mark.parametrize("name", sources(is_guest))
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(WRITES)
def test_whatever_was_written_memory_is_the_baseline_s_and_others_keep_a_true_copy(name: str, steps: list[tuple[str, int]]) -> None:
    """The other consumer's copy is brought up to date with what it is told alone; so is that of whoever calls get."""
    with open_guest(name) as memory, DirtyLog(memory) as log:
        ram = memory.slots[RAM_SLOT]
        other, second = log.consumer("other"), Baseline(log)
        copies = {"other": everything(memory), "get": everything(memory)}
        baseline = Baseline(log)
        before = everything(memory)
        for what, seed in (*steps, ("other", 0), ("get", 0), ("reset", 0), ("other", 0), ("get", 0)):
            draw = random.Random(seed)
            if what == "guest":
                run(memory)
                if draw.random() < 0.5:
                    memory.reset()
            elif what == "write":
                chosen = draw.sample(range(NPAGES), draw.randrange(1, 20))
                memory.write(RAM_SLOT, chosen, np.full((len(chosen), PAGE_SIZE), seed % 255 + 1, np.uint8))
            elif what == "device" and isinstance(memory, KvmMemory):
                with memory.host_write(draw.randrange(NBYTES - 9000), 9000) as view:
                    view[:] = draw.randbytes(9000)
            elif what == "reset":
                baseline.reset()
                assert same(everything(memory), before)
            elif what == "get":
                for slot in memory.slots:
                    pages = log.get(slot.id).pages()
                    copies["get"][slot.id][pages] = memory.contents(slot)[pages]
            elif what in ("other", "drop"):
                take(memory, log, copies["other"], fail=what == "drop")
        assert same(copies["other"], before)
        assert same(copies["get"], before)
        assert other.name == "other"
        assert second.reset() >= 0
        assert same(everything(memory), before)
        assert ram.npages == NPAGES


def take(memory: Machine[Any], log: DirtyLog, copy: dict[int, NDArray[np.uint8]], *, fail: bool) -> None:
    """Bring the other consumer's copy up to date, or give up half way."""
    with log.consumer("other").epoch() as epoch:
        for slot_id, dirty in epoch.dirty.items():
            pages = dirty.pages()[: dirty.count() // 2 if fail else None]
            copy[slot_id][pages] = memory.contents(memory.slots[slot_id])[pages]
        if fail:
            epoch.rollback()


@pytest.mark.parametrize(
    "name", ["x86", "s390", pytest.param("kvm-bitmap", marks=needs_kvm), pytest.param("kvm-ring", marks=needs_kvm)]
)
def test_a_page_that_another_took_before_the_reset_is_dirty_for_it_again(name: str) -> None:
    with open_guest(name) as memory, DirtyLog(memory) as log, Baseline(log) as baseline:
        other = log.consumer("other")
        memory.write(RAM_SLOT, [7], np.full((1, PAGE_SIZE), 9, np.uint8))
        with other.epoch() as epoch:
            assert 7 in epoch.dirty[RAM_SLOT].pages()
        assert 7 in log.get(RAM_SLOT).pages()
        assert baseline.reset() >= 1
        with other.epoch() as epoch:
            assert 7 in epoch.dirty[RAM_SLOT].pages(), "to put it back was a write"
        assert 7 in log.get(RAM_SLOT).pages()
        with other.epoch() as epoch:
            assert 7 not in epoch.dirty[RAM_SLOT].pages()


@pytest.mark.parametrize("name", ["x86", pytest.param("kvm-manual", marks=needs_kvm)])
def test_a_log_with_manual_protect_that_begins_with_all_pages_dirty(name: str) -> None:
    with open_guest(name) as memory:
        assert isinstance(memory.port, ProtectPort)
        with DirtyLog(memory, manual_protect=True, initially_all_set=True) as log, Baseline(log) as baseline:
            before = everything(memory)
            for _ in range(3):
                run(memory)
                assert memory.reset_to(baseline) >= STORES
                assert same(everything(memory), before)


def test_a_read_only_slot_that_this_process_wrote_is_put_back_too() -> None:
    with open_guest("arm64") as memory, DirtyLog(memory) as log, Baseline(log) as baseline:
        before = everything(memory)
        memory.write(ROM_SLOT, [0], np.zeros((1, PAGE_SIZE), np.uint8))
        assert baseline.reset() == 1
        assert same(everything(memory), before)
        run(memory)
        assert memory.vcpus[0].state is VcpuState.HALTED, "and its code is what runs"


def test_code_that_the_guest_or_this_process_wrote_is_put_back_and_what_was_there_runs() -> None:
    # mov byte [rip+2], 2; mov al, 1 (which becomes mov al, 2); mov [0x2000], al; hlt
    code = bytes.fromhex("c6050100000002 b001 8804250020 0000 f4".replace(" ", ""))
    with make_guest("x86", NBYTES, image=Image.raw(code, load=0x1000)) as memory, DirtyLog(memory) as log:
        ram = memory.contents(memory.slots[RAM_SLOT])
        baseline = Baseline(log)
        # The operand is written before it is fetched, by whichever of the two: it is the one that counts.
        for value in (2, 5, 2):
            run(memory)
            assert ram[2, 0] == 2
            baseline.reset()
            patched = ram[1:2].copy()
            patched[0, 6] = value
            memory.write(RAM_SLOT, [1], patched)
            baseline.reset()
            assert ram[1, 6] == 2
        cpu = memory.vcpus[0].cpu
        assert isinstance(cpu, UnicornCpu)
        assert 1 in cpu._code


def test_translated_code_does_not_outlive_a_reset() -> None:
    # cmp byte [0x3000], 0 (so that the page is data first); jmp 0x3000; there: mov al, 1; mov [0x2000], al; hlt
    code = bytes.fromhex("803c250030000000 e9f31f0000").ljust(2 * PAGE_SIZE, b"\0") + bytes.fromhex("b001 88042500200000 f4")
    with make_guest("x86", NBYTES, image=Image.raw(code, load=0x1000)) as memory:
        ram = memory.contents(memory.slots[RAM_SLOT])
        with DirtyLog(memory) as log, Baseline(log) as baseline:
            patched = ram[3:4].copy()
            patched[0, 1] = 7
            memory.write(RAM_SLOT, [3], patched)
            run(memory)
            assert ram[2, 0] == 7
            baseline.reset()
            run(memory)
            assert ram[2, 0] == 1


def test_code_that_the_guest_writes_itself_is_what_runs_before_and_after_a_reset() -> None:
    """Its page is mapped for a fetch, then for a store to data that is there too, then stored to without a miss, and fetched."""
    call, store, patch = "e8{:08x}", "880425{:08x}", "c60425{:08x}"
    code = bytes.fromhex("bc00800000")  # mov esp, 0x8000
    for number in range(4):
        # call 0x3000; mov [0x2000 + number], al; mov byte [0x3800], number; mov byte [0x3001], 7 + number
        code += bytes.fromhex(call.format(int.from_bytes((0x3000 - 0x1000 - len(code) - 5).to_bytes(4, "little"))))
        code += bytes.fromhex(store.format(int.from_bytes((0x2000 + number).to_bytes(4, "little"))))
        code += bytes.fromhex(patch.format(int.from_bytes((0x3800).to_bytes(4, "little")))) + bytes([number])
        code += bytes.fromhex(patch.format(int.from_bytes((0x3001).to_bytes(4, "little")))) + bytes([7 + number])
    # hlt; and at 0x3000: mov al, 5; ret
    image = Image.raw((code + b"\xf4").ljust(2 * PAGE_SIZE, b"\0") + bytes.fromhex("b005c3"), load=0x1000)
    with make_guest("x86", NBYTES, image=image) as memory, DirtyLog(memory) as log, Baseline(log) as baseline:
        for _ in range(3):
            run(memory)
            assert memory.contents(memory.slots[RAM_SLOT])[2, :4].tolist() == [5, 7, 8, 9]
            assert baseline.reset() == 3


def test_two_baselines_stand_side_by_side() -> None:
    with open_guest("mips") as memory, DirtyLog(memory) as log, Baseline(log) as first:
        before = everything(memory)
        run(memory)
        with Baseline(log) as second:
            after = everything(memory)
            assert first.nbytes == second.nbytes == sum(slot.nbytes for slot in memory.slots)
            for _ in range(2):
                memory.write(RAM_SLOT, [3], np.full((1, PAGE_SIZE), 3, np.uint8))
                first.reset()
                assert same(everything(memory), before)
                second.reset()
                assert same(everything(memory), after)
                assert memory.vcpus[0].state is VcpuState.HALTED


def test_after_a_stop_everything_is_put_back() -> None:
    with open_guest("x86") as memory, DirtyLog(memory) as log:
        baseline, other = Baseline(log), log.consumer("other")
        before = everything(memory)
        log.stop()
        memory.write(RAM_SLOT, [7], np.full((1, PAGE_SIZE), 9, np.uint8))
        with pytest.raises(InvalidArgumentError, match="slot 0 is not being logged"):
            baseline.reset()
        log.start()
        assert baseline.reset() == NPAGES + 1
        assert 7 in log.get(RAM_SLOT).pages(), "it was put back after the log had begun"
        assert same(everything(memory), before)
        with other.epoch() as epoch:
            assert epoch.dirty[RAM_SLOT].count() == NPAGES
        assert baseline.reset() == 0


def test_after_the_machine_s_own_reset_the_baseline_is_as_good() -> None:
    with open_guest("riscv") as memory, DirtyLog(memory) as log:
        run(memory)
        with Baseline(log) as baseline:
            before, pc = everything(memory), memory.vcpus[0].cpu.pc
            for _ in range(2):
                memory.reset()
                assert memory.vcpus[0].cpu.pc != pc
                memory.write(RAM_SLOT, range(64, 80), np.full((16, PAGE_SIZE), 5, np.uint8))
                run(memory)
                assert baseline.reset() >= STORES
                assert same(everything(memory), before)
                assert halted(memory)
                assert memory.vcpus[0].cpu.pc == pc
            states = memory.vcpu_states()
            memory.reset()
            baseline.reset()
            assert memory.vcpu_states() == states


def test_the_program_in_the_documentation_runs() -> None:
    text = (Path(__file__).parent.parent / "docs" / "reset.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)  # noqa: S102 - it is ours
    assert names["pages"] >= 1


# --- interrupts


@pytest.mark.parametrize(
    "name", ["x86", "ia64", "s390", *(pytest.param(f"kvm-{log}", marks=needs_kvm) for log in ("bitmap", "manual", "ring"))]
)
def test_after_an_interrupt_at_any_point_the_next_reset_puts_everything_back(name: str) -> None:
    with open_guest(name) as memory, DirtyLog(memory) as log, Baseline(log) as baseline:
        other = log.consumer("other")
        before = everything(memory)
        copy = everything(memory)
        for step in itertools.count(0, 3):
            run(memory)
            memory.write(RAM_SLOT, [3], np.full((1, PAGE_SIZE), 1 + step % 250, np.uint8))
            take(memory, log, copy, fail=False)
            memory.write(RAM_SLOT, [5], np.full((1, PAGE_SIZE), 1 + step % 250, np.uint8))
            interrupted = interrupt(baseline.reset, step)
            take(memory, log, copy, fail=False)
            assert same(copy, everything(memory)), f"the other consumer lost a page, interrupted at point {step}"
            baseline.reset()
            assert same(everything(memory), before), f"interrupted at point {step}"
            assert memory.vcpus[0].state is VcpuState.READY
            take(memory, log, copy, fail=False)
            assert same(copy, before), f"interrupted at point {step}"
            if not interrupted:
                break
        assert step > 60, "the points were not seen"
        assert other.name == "other"


def test_a_baseline_that_is_interrupted_leaves_no_consumer_behind() -> None:
    with open_guest("x86") as memory, DirtyLog(memory) as log:
        made: list[Baseline] = []
        left = 0
        for step in itertools.count():
            if not interrupt(lambda: made.append(Baseline(log)), step):
                break
            left += len(log._consumers)
            for consumer in list(log._consumers.values()):
                consumer.close()
        assert step > 100, "the points were not seen"
        assert left <= 1, "but where it is made already, and not yet handed over"
        assert made[-1].reset() == 0


def test_readers_in_other_threads_keep_true_copies() -> None:
    with open_guest("arm64") as memory, DirtyLog(memory) as log, Baseline(log) as baseline:
        copy = everything(memory)
        done = threading.Event()

        def follow() -> None:
            while not done.is_set():
                take(memory, log, copy, fail=False)

        reader = threading.Thread(target=follow)
        reader.start()
        before = everything(memory)
        try:
            for _ in range(60):
                run(memory)
                baseline.reset()
        finally:
            done.set()
            reader.join()
        take(memory, log, copy, fail=False)
        assert same(copy, before)


# --- what is refused


@pytest.fixture
def guest() -> Iterator[tuple[Machine[Any], DirtyLog]]:
    with open_guest("x86") as memory, DirtyLog(memory) as log:
        yield memory, log


def test_a_machine_that_runs_is_not_reset(guest: tuple[Machine[Any], DirtyLog]) -> None:
    memory, log = guest
    baseline = Baseline(log)
    memory.write(RAM_SLOT, [7], np.full((1, PAGE_SIZE), 9, np.uint8))
    memory.resume()
    with pytest.raises(InvalidArgumentError, match="the machine is running; pause it first"):
        baseline.reset()
    with pytest.raises(InvalidArgumentError, match="the machine is running; pause it first"):
        Baseline(log)
    memory.pause()
    memory.vcpus[0].resume()
    with pytest.raises(InvalidArgumentError, match="vCPU 0 is running"):
        baseline.reset()
    memory.pause()
    assert baseline.reset() >= 1, "what was refused lost nothing"
    assert not memory.contents(memory.slots[RAM_SLOT]).any()


def test_a_memory_that_is_no_guest_or_is_not_logged_has_no_baseline(guest: tuple[Machine[Any], DirtyLog]) -> None:
    memory, log = guest
    table = empty((4, 4096), "uint8")
    with track(table) as buffer_log:
        assert isinstance(buffer_log, DirtyLog)
        with pytest.raises(UnsupportedError, match="only a guest can be reset"):
            Baseline(buffer_log)
    log.stop()
    with pytest.raises(InvalidArgumentError, match="slot 0 is not being logged"):
        Baseline(log)
    assert not log._consumers, "nothing is kept for what was refused"
    log.start()
    with make_guest("x86", NBYTES) as stranger, pytest.raises(InvalidArgumentError, match="a baseline of another memory"):
        stranger.reset_to(Baseline(log))
    memory.pause()


def test_slots_that_have_changed_are_refused() -> None:
    with open_guest("x86") as memory, DirtyLog(memory) as log:
        baseline = Baseline(log)
        memory.write(RAM_SLOT, [7], np.full((1, PAGE_SIZE), 9, np.uint8))
        slot = memory.slots[ROM_SLOT]
        memory.move_slot(ROM_SLOT, slot.base_gfn + 512)  # type: ignore[attr-defined]  # of both kinds of guests
        with pytest.raises(InvalidArgumentError, match="slots are not those"):
            baseline.reset()
        memory.move_slot(ROM_SLOT, slot.base_gfn - 512)  # type: ignore[attr-defined]  # the same
        assert baseline.reset() == 1
        memory.remove_slot(ROM_SLOT)  # type: ignore[attr-defined]  # the same
        with pytest.raises(InvalidArgumentError, match="slots are not those"):
            baseline.reset()


@needs_kvm
def test_a_slot_that_came_later_is_refused() -> None:
    with open_guest("kvm-bitmap") as memory, DirtyLog(memory) as log:
        assert isinstance(memory, KvmMemory)
        baseline = Baseline(log)
        memory.add_slot(5, 1 << 20, 4, SlotFlags.LOG_DIRTY_PAGES)
        with pytest.raises(InvalidArgumentError, match="slots are not those"):
            baseline.reset()
        memory.remove_slot(5)
        assert baseline.reset() >= 0


def test_a_baseline_that_is_closed_resets_nothing_and_takes_nothing(guest: tuple[Machine[Any], DirtyLog]) -> None:
    _, log = guest
    with Baseline(log) as baseline:
        assert len(log._consumers) == 1
    assert not log._consumers
    with pytest.raises(DirtyLogError, match="this baseline is closed"):
        baseline.reset()
    baseline.close()

"""A vCPU by hand: every exit has its type, answers arrive, a vCPU has one runner at a time, and errors are typed."""

from __future__ import annotations

import itertools
import time

import pytest

from dirtylog import DirtyLogError
from dirtylog.kvm.arch.x86_64_registers import Regs
from dirtylog.kvm.exits import Halted, InternalError, Interrupted, IoAccess, MmioAccess, Shutdown
from interrupts import interrupt
from kvm_bare import ENDLESS, HLT, NOWHERE, PAGE, bare_guest, bare_vcpu, read_ram, runners, write_ram
from kvm_here import needs_kvm

pytestmark = needs_kvm

VALUE = 0x1122_3344_5566_7788
BYTES = VALUE.to_bytes(8, "little")


def test_hlt_halts() -> None:
    with bare_vcpu(HLT) as vcpu:
        assert vcpu.run() == Halted()


# out 0x10, al; hlt and 16 and 32 bits of it, at port dx
@pytest.mark.parametrize(("code", "size"), [("e6 10 f4", 1), ("66 ef f4", 2), ("ef f4", 4)])
def test_an_out_says_port_and_value(code: str, size: int) -> None:
    with bare_vcpu(code, rax=VALUE, rdx=0x10) as vcpu:
        assert vcpu.run() == IoAccess(0x10, is_write=True, size=size, count=1, data=BYTES[:size])
        assert vcpu.run() == Halted()


# in al, 0x10; hlt and 16 and 32 bits of it, at port dx; the last clears the upper half of rax
@pytest.mark.parametrize(
    ("code", "size", "rax"), [("e4 10 f4", 1, (1 << 64) - 0x100), ("66 ed f4", 2, (1 << 64) - 0x10000), ("ed f4", 4, 0)]
)
def test_an_in_takes_the_answer_when_it_is_completed(code: str, size: int, rax: int) -> None:
    with bare_vcpu(code, rax=(1 << 64) - 1, rdx=0x10) as vcpu:
        access = vcpu.run()
        assert isinstance(access, IoAccess)
        assert (access.port, access.is_write, access.size, access.count) == (0x10, False, size, 1)
        before = vcpu.get(Regs).rax
        vcpu.answer(access, BYTES)
        assert vcpu.get(Regs).rax == before, "not before the next run"
        vcpu.complete()
        assert vcpu.get(Regs).rax == rax | VALUE & (1 << 8 * size) - 1
        assert vcpu.run() == Halted()


def test_a_short_answer_is_filled_up_with_zeros() -> None:
    with bare_vcpu("ed f4", rax=(1 << 64) - 1, rdx=0x10) as vcpu:  # in eax, dx; hlt
        access = vcpu.run()
        assert isinstance(access, IoAccess)
        vcpu.answer(access, b"\x01")
        assert vcpu.run() == Halted()
        assert vcpu.get(Regs).rax == 1


def test_a_string_of_outs_arrives_whole_and_in_order() -> None:
    with bare_guest("f3 6e f4", {"rsi": PAGE, "rcx": 5, "rdx": 0x20}) as memory:  # rep outsb; hlt
        write_ram(memory, PAGE, b"hello")
        vcpu, data = memory.cpus[0].vcpu, b""
        while isinstance(access := vcpu.run(), IoAccess):
            assert (access.port, access.is_write, access.size, len(access.data)) == (0x20, True, 1, access.count)
            data += access.data
        assert (data, access) == (b"hello", Halted())


def test_a_string_of_ins_is_answered_whole_and_in_order() -> None:
    with bare_guest("f3 6c f4", {"rdi": PAGE, "rcx": 5, "rdx": 0x20}) as memory:  # rep insb; hlt
        vcpu, rest = memory.cpus[0].vcpu, b"hello"
        while isinstance(access := vcpu.run(), IoAccess):
            vcpu.answer(access, rest[: access.count])
            rest = rest[access.count :]
        assert (rest, access) == (b"", Halted())
        assert read_ram(memory, PAGE, 6) == b"hello\0"


# mov [rdi], al; hlt and so on
@pytest.mark.parametrize(("code", "size"), [("88 07 f4", 1), ("66 89 07 f4", 2), ("89 07 f4", 4), ("48 89 07 f4", 8)])
def test_a_store_where_no_slot_is_says_address_and_value(code: str, size: int) -> None:
    with bare_vcpu(code, rax=VALUE, rdi=NOWHERE) as vcpu:
        assert vcpu.run() == MmioAccess(NOWHERE, is_write=True, size=size, data=BYTES[:size])
        assert vcpu.run() == Halted()


# mov al, [rdi]; hlt and so on
@pytest.mark.parametrize(("code", "size"), [("8a 07 f4", 1), ("66 8b 07 f4", 2), ("8b 07 f4", 4), ("48 8b 07 f4", 8)])
def test_a_load_where_no_slot_is_takes_the_answer(code: str, size: int) -> None:
    with bare_vcpu(code, rdi=NOWHERE) as vcpu:
        access = vcpu.run()
        assert isinstance(access, MmioAccess)
        assert (access.address, access.is_write, access.size) == (NOWHERE, False, size)
        vcpu.answer(access, BYTES)
        assert vcpu.run() == Halted()
        assert vcpu.get(Regs).rax == VALUE & (1 << 8 * size) - 1


def test_a_store_to_a_read_only_slot_is_an_mmio_exit_and_changes_nothing() -> None:
    with bare_guest("48 89 07 f4", {"rax": VALUE, "rdi": 2 << 20}) as memory:  # mov [rdi], rax; hlt
        rom, vcpu = memory.slots[1], memory.cpus[0].vcpu
        assert rom.base_gfn * PAGE == 2 << 20
        before = memory.contents(rom).copy()
        assert vcpu.run() == MmioAccess(2 << 20, is_write=True, size=8, data=BYTES)
        assert vcpu.run() == Halted()
        assert (memory.contents(rom) == before).all()


def test_a_fault_without_a_handler_is_a_shutdown() -> None:
    with bare_vcpu("0f 0b") as vcpu:  # ud2
        assert vcpu.run() == Shutdown()


def test_an_instruction_that_kvm_cannot_emulate_is_an_internal_error() -> None:
    with bare_vcpu("0f 58 07 f4", rdi=NOWHERE) as vcpu:  # addps xmm0, [rdi]
        error = vcpu.run()
        assert isinstance(error, InternalError)
        assert error.suberror == 1


def test_a_second_runner_is_refused_and_the_first_goes_on() -> None:
    with bare_vcpu(ENDLESS) as vcpu, runners(2) as threads:
        first = threads.submit(vcpu.run)
        while vcpu._runner is None:
            time.sleep(0.001)
        second = threads.submit(vcpu.run)
        with pytest.raises(DirtyLogError, match="being run by another thread") as caught:
            second.result(timeout=2)
        assert caught.value.remedy == "a vCPU has one runner at a time"
        assert not first.done()
        vcpu.kick()
        assert first.result(timeout=2) == Interrupted()


def test_a_vcpu_may_go_from_thread_to_thread() -> None:
    with bare_vcpu("e6 10 ff c0 eb fa") as vcpu:  # 1: out 0x10, al; inc eax; jmp 1b
        for number in range(30):
            with runners() as runner:
                access = runner.submit(vcpu.run).result(timeout=10)
                assert isinstance(access, IoAccess)
                assert access.data == bytes([number])
                vcpu.kick()
                assert runner.submit(vcpu.run).result(timeout=10) == Interrupted()


def test_an_interrupt_at_any_point_of_a_run_leaves_a_vcpu_that_runs() -> None:
    with bare_vcpu("e6 10 eb fc") as vcpu:  # 1: out 0x10, al; jmp 1b
        for step in itertools.count():
            interrupted = interrupt(vcpu.run, step)
            assert isinstance(vcpu.run(), IoAccess), f"interrupted at point {step}"
            if not interrupted:
                break
        assert step > 10, "the points were not seen"


def test_an_interrupt_at_any_point_of_a_run_that_is_kicked_leaves_a_vcpu_that_can_be_kicked() -> None:
    with bare_vcpu("e6 10 eb fc") as vcpu:  # 1: out 0x10, al; jmp 1b
        for step in itertools.count():
            vcpu.kick()
            interrupted = interrupt(vcpu.run, step)
            vcpu.kick()
            assert Interrupted() in (vcpu.run(), vcpu.run()), f"interrupted at point {step}"
            assert IoAccess in (type(vcpu.run()), type(vcpu.run())), f"interrupted at point {step}"
            if not interrupted:
                break
        assert step > 10, "the points were not seen"


def test_eight_vcpus_run_at_once() -> None:
    with bare_guest("48 ff 07 ff c9 75 f9 f4", *({"rdi": PAGE + 64 * index, "rcx": 2000} for index in range(8))) as memory:
        # 1: inc qword [rdi]; dec ecx; jnz 1b; hlt
        memory.resume()
        assert memory.wait(timeout=30)
        assert [int.from_bytes(read_ram(memory, PAGE + 64 * index, 8), "little") for index in range(8)] == [2000] * 8


def test_a_closed_vcpu_says_so() -> None:
    with bare_guest("e4 10") as memory:  # in al, 0x10
        vcpu = memory.cpus[0].vcpu
        access = vcpu.run()
        assert isinstance(access, IoAccess)
    for call in (vcpu.run, lambda: vcpu.get(Regs), lambda: vcpu.put(Regs()), lambda: vcpu.answer(access, b"")):
        with pytest.raises(DirtyLogError, match="closed"):
            call()
    vcpu.kick()
    vcpu.close()

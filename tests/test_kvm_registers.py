"""A vCPU's registers: what is put is what is got, and a state that is saved goes on elsewhere as if nothing had been."""

from __future__ import annotations

import pickle
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dirtylog import DirtyLogError, InvalidArgumentError, UnsupportedError
from dirtylog.guests.machine import RAM_SLOT
from dirtylog.kvm.arch import host_architecture
from dirtylog.kvm.arch import x86_64_registers as x86
from dirtylog.kvm.exits import Halted, Interrupted, IoAccess
from kvm_bare import HLT, PAGE, bare_guest, bare_vcpu, read_ram, runners, write_ram
from kvm_here import needs_kvm

if TYPE_CHECKING:
    from collections.abc import Callable

    from dirtylog.kvm.memory import KvmMemory
    from dirtylog.linux.layout import Struct

TIME_STAMP_COUNTER = 0x10
KERNEL_GS_BASE = 0xC000_0102
NO_MSR = 0x1234_5678


def change_regs(regs: x86.Regs) -> None:
    regs.r15, regs.rbp, regs.rip = 15, (1 << 64) - 2, 0x1234


def change_sregs(sregs: x86.Sregs) -> None:
    sregs.cr2, sregs.fs.base, sregs.gs.base, sregs.ldt.unusable = 0x5000, 0x7000, 0x8000, 1


def change_fpu(fpu: x86.Fpu) -> None:
    fpu.fcw = 0x37E
    fpu.xmm[:] = list(range(256))
    fpu.fpr[:10] = list(range(10))


def change_xcrs(xcrs: x86.Xcrs) -> None:
    assert xcrs.nr_xcrs == 1
    xcrs.xcrs[1] = 3  # XCR0: x87 and SSE


def change_events(events: x86.VcpuEvents) -> None:
    events.nmi_pending = events.nmi_masked = 1


def change_debugregs(debug: x86.Debugregs) -> None:
    debug.db[:] = [0x1000, 0x2000, 0x3000, 0x4000]
    debug.dr7 = 0x455


def change_nothing(_state: x86.MpState) -> None:
    """Without an interrupt controller in the kernel a vCPU is runnable and nothing else."""


@needs_kvm
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (x86.Regs, change_regs),
        (x86.Sregs, change_sregs),
        (x86.Fpu, change_fpu),
        (x86.Xcrs, change_xcrs),
        (x86.VcpuEvents, change_events),
        (x86.Debugregs, change_debugregs),
        (x86.MpState, change_nothing),
    ],
)
def test_registers_that_are_put_are_got(kind: type[Struct], change: Callable[[Struct], None]) -> None:
    with bare_vcpu(HLT) as vcpu:
        before = vcpu.get(kind)
        vcpu.put(before)
        assert bytes(vcpu.get(kind)) == bytes(before)
        changed = kind.from_buffer_copy(before)
        change(changed)
        vcpu.put(changed)
        assert bytes(vcpu.get(kind)) == bytes(changed)
        vcpu.put(before)
        assert bytes(vcpu.get(kind)) == bytes(before)


@needs_kvm
def test_registers_that_the_kernel_refuses_are_einval() -> None:
    with bare_vcpu(HLT) as vcpu, pytest.raises(InvalidArgumentError, match="cannot set MpState of vCPU 0") as caught:
        vcpu.put(x86.MpState(mp_state=77))
    assert isinstance(caught.value.__cause__, OSError)


@needs_kvm
def test_the_xsave_area_that_is_set_is_got_and_holds_sse() -> None:
    with bare_guest(HLT) as memory:
        vcpu = memory.cpus[0].vcpu
        area = bytearray(x86.get_xsave(memory.system, vcpu))
        assert len(area) >= x86.XSAVE_BYTES
        area[160:176] = bytes(range(16))  # xmm0
        area[512] |= 2  # XSTATE_BV: SSE is in use
        x86.set_xsave(vcpu, bytes(area))
        assert x86.get_xsave(memory.system, vcpu)[160:176] == bytes(range(16))
        assert bytes(vcpu.get(x86.Fpu).xmm[:16]) == bytes(range(16))
        with pytest.raises(InvalidArgumentError, match="an XSAVE area of 5 bytes"):
            x86.set_xsave(vcpu, b"short")


@needs_kvm
def test_msrs_that_are_put_are_got_and_one_that_is_not_there_is_left_out() -> None:
    with bare_guest(HLT) as memory:
        vcpu = memory.cpus[0].vcpu
        assert KERNEL_GS_BASE in x86.msr_numbers(memory.system)
        x86.put_msrs(vcpu, {KERNEL_GS_BASE: 0x7777_0000})
        assert x86.get_msrs(vcpu, [NO_MSR, KERNEL_GS_BASE, NO_MSR + 1]) == {KERNEL_GS_BASE: 0x7777_0000}
        assert x86.get_msrs(vcpu, []) == {}
        values = x86.get_msrs(vcpu, x86.msr_numbers(memory.system))
        x86.put_msrs(vcpu, values)
        with pytest.raises(DirtyLogError, match="vCPU 0 refuses 0x1 for MSR 0x12345678"):
            x86.put_msrs(vcpu, {KERNEL_GS_BASE: 0, NO_MSR: 1})
        assert x86.get_msrs(vcpu, [KERNEL_GS_BASE]) == {KERNEL_GS_BASE: 0}


def contents(memory: KvmMemory) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return memory.contents(memory.slots[RAM_SLOT])


def same_state(first: object, second: object) -> bool:
    assert isinstance(first, x86.X86State)
    assert isinstance(second, x86.X86State)
    for state in (first, second):
        state.msrs.pop(TIME_STAMP_COUNTER, None)
    return first == second


# 1: imul rax, rax, 0x5d; add rax, 7; mov [rdi], rax; add rdi, 8; cmp ecx, 200; jne 3f; movups xmm1, [rdi-16]; MIDDLE
# 3: dec ecx; jnz 1b; movups [rdi], xmm1; hlt
UNTIL_HERE = "48 6bc05d 4883c007 488907 4883c708 81f9c8000000"
STOPS_AT_IO = f"{UNTIL_HERE} 7506 0f104ff0 e410 ffc9 75df 0f110f f4"  # MIDDLE: in al, 0x10
WAITS = f"{UNTIL_HERE} 7509 0f104ff0 803e00 74fb ffc9 75dc 0f110f f4"  # MIDDLE: 2: cmp byte [rsi], 0; je 2b
REGISTERS = {"rcx": 400, "rax": 1, "rdi": PAGE, "rsi": 0}


def half_way_at_io(memory: KvmMemory) -> None:
    """Run until the guest waits for an answer, and give it."""
    access = memory.cpus[0].vcpu.run()
    assert isinstance(access, IoAccess)
    memory.cpus[0].vcpu.answer(access, b"\x2a")


def half_way_kicked(memory: KvmMemory) -> None:
    """Run until the guest turns on the spot, and kick it."""
    vcpu = memory.cpus[0].vcpu
    with runners() as runner:
        running = runner.submit(vcpu.run)
        while not any(read_ram(memory, PAGE + 8 * 200, 8)):
            time.sleep(0.001)
        vcpu.kick()
        assert running.result(timeout=10) == Interrupted()


@needs_kvm
@pytest.mark.parametrize(
    ("code", "run_half_way"), [(STOPS_AT_IO, half_way_at_io), (WAITS, half_way_kicked)], ids=["at I/O", "kicked"]
)
def test_a_vcpu_goes_on_in_another_machine_as_if_nothing_had_been(code: str, run_half_way: Callable[[KvmMemory], None]) -> None:
    with bare_guest(code, REGISTERS) as first, bare_guest(code, REGISTERS) as second:
        run_half_way(first)
        saved = first.architecture.save(first.system, first.cpus[0].vcpu)
        state = pickle.loads(pickle.dumps(saved))  # noqa: S301 - made two calls ago
        assert state == saved
        contents(second)[:] = contents(first)
        assert 0 < x86.Regs.from_buffer_copy(state.regs).rcx <= 200
        second.architecture.restore(second.cpus[0].vcpu, state)
        assert same_state(second.architecture.save(second.system, second.cpus[0].vcpu), saved)
        ends = []
        for memory in (first, second):
            write_ram(memory, 0, b"\x01")
            assert memory.cpus[0].vcpu.run() == Halted()
            ends.append(memory.architecture.save(memory.system, memory.cpus[0].vcpu))
        assert np.array_equal(contents(first), contents(second))
        assert same_state(*ends)
        assert read_ram(second, PAGE + 8 * 400, 16) == read_ram(second, PAGE + 8 * 199, 16), "xmm1 went along"
        assert all(read_ram(second, PAGE + 8 * 399, 8))


@needs_kvm
def test_to_restore_what_is_no_state_is_refused() -> None:
    with bare_guest(HLT) as memory, pytest.raises(InvalidArgumentError, match="no state of type bytes"):
        memory.architecture.restore(memory.cpus[0].vcpu, b"state")


@needs_kvm
def test_sse_moves_work_in_the_guest_and_are_seen_in_the_fpu() -> None:
    # movups xmm0, [rsi]; movaps xmm9, xmm0; movups [rdi], xmm9; hlt
    with bare_guest("0f1006 440f28c8 440f110f f4", {"rsi": PAGE + 4, "rdi": 2 * PAGE + 8}) as memory:
        data = bytes(range(1, 17))
        write_ram(memory, PAGE + 4, data)
        vcpu = memory.cpus[0].vcpu
        assert vcpu.run() == Halted()
        assert read_ram(memory, 2 * PAGE + 8, 16) == data
        assert bytes(vcpu.get(x86.Fpu).xmm[9 * 16 : 10 * 16]) == data


@needs_kvm
def test_every_vcpu_s_apic_id_is_its_number() -> None:
    # mov eax, 1; cpuid; mov [rdi], ebx; xor eax, eax; cpuid; mov [rdi+4], eax; mov eax, 0xb; xor ecx, ecx; cpuid;
    # mov [rdi+8], edx; hlt
    code = "b801000000 0fa2 891f 31c0 0fa2 894704 b80b000000 31c9 0fa2 895708 f4"
    with bare_guest(code, *({"rdi": PAGE + 16 * index} for index in range(8))) as memory:
        memory.resume()
        assert memory.wait(timeout=30)
        for index in range(8):
            ebx, leaves, edx = (int.from_bytes(read_ram(memory, PAGE + 16 * index + 4 * word, 4), "little") for word in range(3))
            assert ebx >> 24 == index
            assert leaves < 0xB or edx == index


def test_a_host_that_has_no_guests_here_is_told_what_has() -> None:
    with pytest.raises(UnsupportedError, match="no KVM guests on vax yet; it does on x86_64") as caught:
        host_architecture("vax")
    assert caught.value.remedy == "use an emulated guest, such as emu:arm64"

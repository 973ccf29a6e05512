"""Devices of this process: what guests write to them arrives, what they answer is read, and what nothing answers is a fault."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from dirtylog import DirtyLog, GuestFaultError, InvalidArgumentError
from dirtylog.guests.machine import RAM_SLOT
from dirtylog.guests.vcpu import VcpuState
from dirtylog.kvm.arch.x86_64_registers import Regs
from dirtylog.kvm.bus import Bus, BusAccess, Doorbell
from dirtylog.kvm.exits import IoAccess, MmioAccess
from kvm_bare import ENDLESS, HLT, NOWHERE, PAGE, bare_guest, read_ram, write_ram
from kvm_here import needs_kvm

if TYPE_CHECKING:
    from dirtylog.kvm.memory import KvmMemory

RINGS_PORT = "ef ff c0 ff c9 75 f9 f4"
"""1: out dx, eax; inc eax; dec ecx; jnz 1b; hlt"""
RINGS_MMIO = "48 89 07 48 ff c0 ff c9 75 f6 f4"
"""1: mov [rdi], rax; inc rax; dec ecx; jnz 1b; hlt"""
SOON = 10.0


def rings(bell: Doorbell, number: int) -> list[tuple[int, int]]:
    """Return the rings of a doorbell that has been rung, and show that they are so many."""
    heard = [bell.wait(timeout=0) for _ in range(number)]
    assert bell.wait(timeout=0) is None
    return [ring for ring in heard if ring is not None]


def run(memory: KvmMemory) -> None:
    memory.resume()
    assert memory.wait(timeout=SOON)
    memory.pause()


@needs_kvm
@pytest.mark.parametrize("code", [RINGS_PORT, RINGS_MMIO])
def test_a_doorbell_hears_every_vcpu_in_order(code: str) -> None:
    first = [0, 1000, 0x8000_0000]
    with bare_guest(code, *({"rax": value, "rcx": 50, "rdx": 0x510, "rdi": NOWHERE + 8} for value in first)) as memory:
        bell = Doorbell()
        memory.bus.attach_port(0x510, bell)
        memory.bus.attach_mmio(NOWHERE, 16, bell)
        run(memory)
        heard = rings(bell, 150)
        for index, value in enumerate(first):
            assert [number for vcpu, number in heard if vcpu == index] == list(range(value, value + 50))


@needs_kvm
def test_a_ring_can_be_waited_for_while_the_guest_runs() -> None:
    with bare_guest("ef ebfe", {"rax": 7, "rdx": 0x510}) as memory:  # out dx, eax; jmp $
        bell = Doorbell()
        memory.bus.attach_port(0x510, bell)
        memory.resume()
        assert bell.wait(timeout=SOON) == (0, 7)
        assert not memory.wait(timeout=0.01)


@needs_kvm
def test_what_a_handler_answers_is_what_the_guest_reads() -> None:
    seen: list[BusAccess] = []

    def port(access: BusAccess) -> bytes:
        seen.append(access)
        return b"\x5a"

    def mmio(access: BusAccess) -> bytes:
        seen.append(access)
        return b"\1\2\3\4\5\6\7\x08 and more than was asked for"

    # in al, 0x20; mov [rsi], al; mov rax, [rdi+8]; mov [rsi+8], rax; hlt
    with bare_guest("e420 8806 488b4708 48894608 f4", {"rdi": NOWHERE, "rsi": PAGE}) as memory:
        memory.bus.attach_port(0x20, port)
        memory.bus.attach_mmio(NOWHERE, PAGE, mmio)
        run(memory)
        assert read_ram(memory, PAGE, 16) == b"\x5a" + bytes(7) + bytes([1, 2, 3, 4, 5, 6, 7, 8])
    assert seen == [
        BusAccess(0, 0, is_write=False, nbytes=1, data=b""),
        BusAccess(0, 8, is_write=False, nbytes=8, data=b""),
    ]


@needs_kvm
def test_a_doorbell_reads_as_zero() -> None:
    with bare_guest("ed f4", {"rax": 0x1234, "rdx": 0x510}) as memory:  # in eax, dx; hlt
        bell = Doorbell()
        memory.bus.attach_port(0x510, bell)
        run(memory)
        assert memory.cpus[0].vcpu.get(Regs).rax == 0
        assert rings(bell, 0) == []


@needs_kvm
def test_a_string_of_ins_is_answered_item_by_item() -> None:
    items = iter(b"hello")
    with bare_guest("f3 6c f4", {"rdi": PAGE, "rcx": 5, "rdx": 0x20}) as memory:  # rep insb; hlt
        memory.bus.attach_port(0x20, lambda _: bytes([next(items)]))
        run(memory)
        assert read_ram(memory, PAGE, 5) == b"hello"


@needs_kvm
def test_a_string_of_outs_rings_item_by_item() -> None:
    with bare_guest("f3 6f f4", {"rsi": PAGE, "rcx": 3, "rdx": 0x20}) as memory:  # rep outsd; hlt
        write_ram(memory, PAGE, b"".join(value.to_bytes(4, "little") for value in (5, 6, 7)))
        bell = Doorbell()
        memory.bus.attach_port(0x20, bell)
        run(memory)
        assert rings(bell, 3) == [(0, 5), (0, 6), (0, 7)]


def test_an_exit_of_several_items_is_that_many_accesses() -> None:
    """What hardware's KVM makes of rep outsd; some hosts make one exit an item."""
    bus, bell = Bus(), Doorbell()
    bus.attach_port(0x20, bell)
    data = b"".join(value.to_bytes(4, "little") for value in (5, 6, 7))
    bus.access(1, IoAccess(0x20, is_write=True, size=4, count=3, data=data))
    assert rings(bell, 3) == [(1, 5), (1, 6), (1, 7)]


class WiringError(Exception):
    """A handler's own."""


@needs_kvm
def test_a_handler_s_error_ends_its_vcpu_and_no_other() -> None:
    error = WiringError("the wire is cut")

    def cut(_access: BusAccess) -> bytes:
        raise error

    # test esi, esi; jz 1f; hlt; 1: out 0x10, al; hlt
    with bare_guest("85f6 7401 f4 e610 f4", {"rsi": 1}, {"rsi": 0}) as memory:
        memory.bus.attach_port(0x10, cut)
        memory.resume()
        with pytest.raises(WiringError) as caught:
            memory.wait(timeout=SOON)
        assert caught.value is error
        assert [vcpu.state for vcpu in memory.vcpus] == [VcpuState.HALTED, VcpuState.FAULTED]
        with pytest.raises(WiringError):
            memory.check()
        memory.resume()
        memory.pause()
        memory.reset()
        memory.check()


# mov [rdi], rax, where KVM has gone past the instruction before it asks; mov rax, [rdi], where it has not
@needs_kvm
@pytest.mark.parametrize(("code", "what"), [("488907 f4", "a write to"), ("488b07 f4", "a read from")])
def test_memory_that_nothing_answers_is_a_fault_with_pc_and_address(code: str, what: str) -> None:
    with bare_guest(code, {"rdi": NOWHERE}) as memory:
        entry = memory.cpus[0].pc
        memory.bus.attach_mmio(NOWHERE - 8, 8, Doorbell())
        memory.bus.attach_mmio(NOWHERE + 4, 8, Doorbell())
        memory.resume()
        with pytest.raises(GuestFaultError, match=f"{what} guest address {NOWHERE:#x}") as caught:
            memory.wait(timeout=SOON)
        error = caught.value
        assert (error.address, error.architecture) == (NOWHERE, "x86")
        assert error.pc in (entry, entry + 3)
        assert f"pc {error.pc:#x}" in str(error)
        assert memory.vcpus[0].state is VcpuState.FAULTED


@needs_kvm
@pytest.mark.parametrize(("code", "what"), [("e610 f4", "a write to"), ("e410 f4", "a read from")])
def test_a_port_that_nothing_answers_is_a_fault_with_pc_and_no_address(code: str, what: str) -> None:
    with bare_guest(code) as memory:
        entry = memory.cpus[0].pc
        memory.resume()
        with pytest.raises(GuestFaultError, match=f"{what} I/O port 0x10") as caught:
            memory.wait(timeout=SOON)
        assert caught.value.address is None
        assert caught.value.pc in (entry, entry + 2)


@needs_kvm
def test_a_store_to_a_read_only_slot_is_a_fault_unless_a_device_lies_there_too() -> None:
    with bare_guest("488907 f4", {"rdi": 2 << 20, "rax": 5}) as memory:  # mov [rdi], rax; hlt
        memory.resume()
        with pytest.raises(GuestFaultError, match="no slot permits, and nothing answers, a write to guest address 0x200000"):
            memory.wait(timeout=SOON)
        memory.reset()
        bell = Doorbell()
        memory.bus.attach_mmio(2 << 20, 8, bell)
        run(memory)
        assert rings(bell, 1) == [(0, 5)]


@needs_kvm
def test_a_reset_after_a_fault_begins_at_the_beginning_also_amid_an_access_in_pieces() -> None:
    with bare_guest("0f1007 f4", {"rdi": NOWHERE}) as memory:  # movups xmm0, [rdi]; hlt
        for _ in range(4):
            memory.resume()
            with pytest.raises(GuestFaultError):
                memory.wait(timeout=SOON)
            memory.reset()


@needs_kvm
@pytest.mark.parametrize(
    ("code", "words"),
    [("0f0b", "a triple fault"), ("0f5807", "an instruction that KVM cannot emulate")],  # ud2; addps xmm0, [rdi]
)
def test_a_guest_that_cannot_go_on_is_a_fault_that_says_why(code: str, words: str) -> None:
    with bare_guest(code, {"rdi": NOWHERE}) as memory:
        memory.resume()
        with pytest.raises(GuestFaultError, match=f"vCPU 0 of the x86 guest, at pc 0x[0-9a-f]+: {words}") as caught:
            memory.wait(timeout=SOON)
        assert caught.value.address is None


@needs_kvm
def test_a_triple_fault_is_kept_and_the_others_run_until_they_are_stopped() -> None:
    # test esi, esi; jz 1f; jmp $; 1: ud2
    with bare_guest("85f6 7402 ebfe 0f0b", {"rsi": 1}, {"rsi": 0}, {"rsi": 2}) as memory:
        memory.resume()
        assert memory.vcpus[1].wait(timeout=SOON)
        deadline = time.monotonic() + SOON
        while not (memory.vcpus[0].in_guest and memory.vcpus[2].in_guest):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        memory.pause()
        assert [vcpu.state for vcpu in memory.vcpus] == [VcpuState.READY, VcpuState.FAULTED, VcpuState.READY]
        with pytest.raises(GuestFaultError, match="vCPU 1 of the x86 guest"):
            memory.check()
        memory.resume()


@needs_kvm
def test_a_pause_amid_an_access_leaves_nothing_to_be_done_to_memory() -> None:
    """Else memory would change when the state is saved, after the last get of a migration."""
    asked, answer = threading.Event(), threading.Event()

    def slow(access: BusAccess) -> bytes:
        asked.set()
        assert answer.wait(timeout=SOON)
        return b"\x5a" * access.nbytes

    # insb; jmp $
    with bare_guest("6c ebfe", {"rdi": PAGE, "rdx": 0x20}) as memory, DirtyLog(memory) as log, ThreadPoolExecutor(1) as pauser:
        memory.bus.attach_port(0x20, slow)
        memory.resume()
        assert asked.wait(timeout=SOON)
        pausing = pauser.submit(memory.pause)
        time.sleep(0.01)
        answer.set()
        pausing.result(timeout=SOON)
        before = read_ram(memory, PAGE, 1)
        memory.architecture.save(memory.system, memory.cpus[0].vcpu)
        assert read_ram(memory, PAGE, 1) == before
        assert before == b"\x5a"
        assert 1 in log.get(RAM_SLOT)


@needs_kvm
def test_exits_are_counted() -> None:
    with bare_guest(RINGS_PORT, {"rcx": 20, "rdx": 0x510}) as memory:
        memory.bus.attach_port(0x510, Doorbell())
        run(memory)
        assert memory.stats.exits == 21


@needs_kvm
@pytest.mark.parametrize("code", [ENDLESS, HLT])
def test_a_guest_needs_no_device(code: str) -> None:
    with bare_guest(code) as memory:
        memory.resume()
        memory.pause()
        memory.check()


def test_the_bus_hands_an_access_to_the_range_that_holds_all_of_it() -> None:
    bus = Bus()
    seen: list[BusAccess] = []
    bus.attach_mmio(0x1000, 8, seen.append)
    bus.attach_mmio(0x1008, 1, seen.append)
    assert bus.access(2, MmioAccess(0x1004, is_write=True, size=4, data=b"\0\1\0\0")) == b""
    assert bus.access(2, MmioAccess(0x1008, is_write=False, size=1, data=b"")) == b"\0", "of the read's width"
    assert [(access.offset, access.nbytes, access.value) for access in seen] == [(4, 4, 256), (0, 1, 0)]
    for address, size in ((0xFFF, 2), (0x1006, 4), (0x1009, 1), (0, 8)):
        assert bus.access(2, MmioAccess(address, is_write=False, size=size, data=b"")) is None
    assert bus.access(0, IoAccess(0x1000, is_write=False, size=1, count=1, data=b"")) is None


def test_a_device_that_is_misplaced_is_refused() -> None:
    bus, bell = Bus(), Doorbell()
    bus.attach_port(0xFFFF, bell)
    bus.attach_mmio(0x1000, 0x10, bell)
    bus.attach_mmio(0x1010, 0x10, bell)
    for port, words in ((-1, "ports are 0 to 0xffff"), (1 << 16, "ports are 0 to 0xffff"), (0xFFFF, "has a handler already")):
        with pytest.raises(InvalidArgumentError, match=words):
            bus.attach_port(port, bell)
    for address, nbytes, words in ((-8, 16, "an MMIO range"), (0, 0, "an MMIO range"), (0x101F, 1, "overlaps the one at 0x1010")):
        with pytest.raises(InvalidArgumentError, match=words):
            bus.attach_mmio(address, nbytes, bell)

"""The state of vCPUs as bytes: a guest that is loaded elsewhere goes on as if nothing had been, or the bytes are refused."""

from __future__ import annotations

import hashlib
import random
import struct
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dirtylog import CorruptDataError, DirtyLogError, GuestFaultError, Image, InvalidArgumentError, UnsupportedError
from dirtylog.emulated.arch import PORTS
from dirtylog.emulated.cpu_trace import TraceCpu, pattern_after, trace_of
from dirtylog.emulated.cpu_unicorn import UnicornCpu
from dirtylog.emulated.guest import make_guest
from dirtylog.emulated.registers import REGISTER_FILES
from dirtylog.guests.machine import RAM_SLOT
from dirtylog.guests.programs import Pattern
from dirtylog.guests.state import SavedVcpu
from dirtylog.guests.vcpu import Vcpu, VcpuState
from dirtylog.kvm.ports import KvmPort
from interrupts import interrupt
from kvm_here import needs_kvm
from sources import open_source, sources
from store_guests import BufferGuest, ProcessGuest
from test_fuzz_bounds import MIB, bounded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dirtylog.guests.cpu import CpuExit
    from dirtylog.guests.machine import Machine
    from dirtylog.port import Port

NBYTES = 1 << 20
UNICORN = [name for name, port in PORTS.items() if port.isa != "trace"]


def is_guest(port: type[Port]) -> bool:
    return port in PORTS.values() or issubclass(port, KvmPort)


def two_loops(count: int) -> list[Pattern]:
    """Two store loops that do not meet, each a pseudo-random walk."""
    walk = {"mul": 0x5D588B65 & 0x3FFF_FFFF, "add": 0x269EC3, "mask": 63, "step": 3}
    return [Pattern(base=start, value=value, count=count, **walk) for start, value in ((0x40000, 1), (0x80000, 1 << 20))]


def contents(memory: Machine[Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return memory.contents(memory.slots[RAM_SLOT])


def open_guest(name: str, **options: Any) -> Machine[Any]:
    memory = open_source(name, NBYTES, **options)
    assert not isinstance(memory, (BufferGuest, ProcessGuest))
    return memory


@contextmanager
def half_way(name: str) -> Iterator[tuple[Machine[Any], list[Pattern]]]:
    """Give a paused guest in which every vCPU has stored something and none has halted, and its loops."""
    for count in (10_000 << shift for shift in range(0, 20, 2)):
        loops = two_loops(count)
        with open_guest(name, loops=loops, vcpus=2) as memory:
            if stops_half_way(memory, lambda memory: all(contents(memory)[page].any() for page in (0x40, 0x80))):
                yield memory, loops
                return
    raise AssertionError("the guest is always done before it can be paused")


def stops_half_way(memory: Machine[Any], begun: Callable[[Machine[Any]], bool]) -> bool:
    memory.resume()
    while not begun(memory):
        memory.check()
        time.sleep(0)
    memory.pause()
    return all(vcpu.state is VcpuState.READY for vcpu in memory.vcpus)


def run_to(memory: Machine[Any], pc: int) -> None:
    """Run until the vCPU is where it turns on the spot."""
    deadline = time.monotonic() + 60
    while memory.vcpus[0].cpu.pc != pc and time.monotonic() < deadline:
        memory.resume()
        time.sleep(0.001)
        memory.pause()
    assert memory.vcpus[0].cpu.pc == pc


def run_to_the_end(memory: Machine[Any]) -> None:
    memory.resume()
    assert memory.wait(timeout=120)
    memory.pause()


@pytest.mark.parametrize("name", sources(is_guest))
def test_a_guest_goes_on_in_another_machine_with_the_stores_that_it_would_have_made(name: str) -> None:
    with half_way(name) as (first, loops), open_guest(name, loops=loops, vcpus=2) as second:
        states = first.vcpu_states()
        assert len(states) == 2
        contents(second)[:] = contents(first)
        second.load_vcpu_states(states)
        assert [vcpu.cpu.pc for vcpu in second.vcpus] == [vcpu.cpu.pc for vcpu in first.vcpus]
        halfway = contents(first).copy()
        run_to_the_end(first)
        run_to_the_end(second)
        assert not np.array_equal(halfway, contents(first)), "there was something left to be stored"
        assert np.array_equal(contents(second), contents(first))


@pytest.mark.parametrize("name", sources(is_guest))
def test_what_has_halted_or_faulted_is_so_again_in_another_machine(name: str) -> None:
    halts, faults = Pattern(base=0x40000, count=5), Pattern(base=0x4000_0000, count=5)
    with (
        open_guest(name, loops=[halts, faults], vcpus=2) as first,
        open_guest(name, loops=[Pattern(base=0)] * 2, vcpus=2) as second,
    ):
        first.resume()
        for vcpu in first.vcpus:
            assert vcpu.wait(60)
        first.pause()
        second.load_vcpu_states(first.vcpu_states())
        contents(second)[:] = contents(first)
        second.resume()
        assert [vcpu.state for vcpu in second.vcpus] == [VcpuState.HALTED, VcpuState.FAULTED]
        with pytest.raises(GuestFaultError) as fault:
            second.wait(60)
        original = first.vcpus[1].error
        assert isinstance(original, GuestFaultError)
        assert (fault.value.pc, fault.value.address, str(fault.value)) == (original.pc, original.address, str(original))
        assert fault.value.architecture == original.architecture
        assert np.array_equal(contents(second), contents(first)), "nothing has run"
        second.pause()
        assert second.vcpu_states() == first.vcpu_states() or name.startswith("kvm-"), "KVM's time-stamp counter goes on"
        second.reset()
        assert [vcpu.state for vcpu in second.vcpus] == [VcpuState.READY] * 2


ELSEWHERE = """
import hashlib, pathlib, sys
sys.path.insert(0, sys.argv[1])
from test_vcpu_states import contents, open_guest, run_to_the_end
folder = pathlib.Path(sys.argv[2])
with open_guest(sys.argv[3], vcpus=2) as memory:
    contents(memory).reshape(-1).data[:] = (folder / "memory").read_bytes()
    memory.load_vcpu_states([(folder / f"vcpu{index}").read_bytes() for index in range(2)])
    run_to_the_end(memory)
    print(hashlib.sha256(contents(memory)).hexdigest())
"""


@pytest.mark.parametrize("name", ["arm64", "ia64", pytest.param("kvm-bitmap", marks=needs_kvm)])
def test_a_guest_goes_on_in_another_process(name: str, tmp_path: Path) -> None:
    with half_way(name) as (memory, _):
        (tmp_path / "memory").write_bytes(contents(memory).tobytes())
        for index, state in enumerate(memory.vcpu_states()):
            (tmp_path / f"vcpu{index}").write_bytes(state)
        here = str(Path(__file__).parent)
        child = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, here, str(tmp_path), name], capture_output=True, text=True, timeout=120, check=False
        )
        assert child.returncode == 0, child.stderr
        run_to_the_end(memory)
        assert child.stdout.strip() == hashlib.sha256(contents(memory).tobytes()).hexdigest()


# mov edi, 0x80000; mov rbx, ADDEND; mov edx, COUNT; movq xmm1, rbx;
# 1: add rax, rbx; mov [rdi], rax; adc rcx, 0; paddq xmm0, xmm1; movups [rdi+16], xmm0; mov [rdi+8], rcx; dec rdx; jnz 1b; hlt
ADDEND = 0x9E37_79B9_7F4A_7C15
CARRIES = "bf00000800 48bb{addend} ba{count} 66480f6ecb 4801d8 488907 4883d100 660fd4c1 0f114710 48894f08 48ffca 75e5 f4"


def test_carry_flag_and_vector_registers_go_along() -> None:
    for count in (2_000 << shift for shift in range(0, 20, 2)):
        code = CARRIES.format(addend=ADDEND.to_bytes(8, "little").hex(), count=count.to_bytes(4, "little").hex())
        image = Image.raw(bytes.fromhex(code), load=0x1000)
        with make_guest("x86", NBYTES, image=image) as first, make_guest("x86", NBYTES, image=image) as second:
            if not stops_half_way(first, lambda memory: contents(memory)[0x80].any()):
                continue
            contents(second)[:] = contents(first)
            second.load_vcpu_states(first.vcpu_states())
            for memory in (first, second):
                run_to_the_end(memory)
            rax, rcx, low, _ = struct.unpack_from("<4Q", contents(second)[0x80])
            assert (rcx << 64) + rax == count * ADDEND
            assert low == rax
            assert np.array_equal(contents(first), contents(second))
            return
    raise AssertionError("the guest is always done before it can be paused")


# What a value that is drawn at random does not suit: what says how the CPU works, and what keeps some bits only.
SYSTEM = {
    "x86": "SYSENTER_CS CR DR EFER PAT GDTR IDTR CS DS ES SS FS GS LDTR TR RFLAGS FPTAG",
    "arm": "CPSR FPSCR",
    "arm64": "PSTATE FPCR FPSR CPACR",
    "mips": "CP0 FCSR",
    "ppc": "MSR FPSCR XER",
    "riscv": "MTVEC STVEC MIE MIP MEDELEG MIDELEG MSTATUS SATP PRIV FCSR",
    "s390x": "PSWM CR",
}


@pytest.mark.parametrize("name", UNICORN)
def test_every_register_that_is_saved_is_loaded(name: str) -> None:
    with make_guest(name, NBYTES) as first, make_guest(name, NBYTES) as second:
        cpu = first.vcpus[0].cpu
        assert isinstance(cpu, UnicornCpu)
        fresh = cpu.registers()
        system = tuple(SYSTEM[cpu._isa.constants].split())
        registers = REGISTER_FILES[cpu._isa.constants].registers
        draw = random.Random(7)
        bits = 32 if name in ("ppc-pv", "mips") else 128
        wanted = {
            register.name: ":".join(
                f"{draw.getrandbits(min(register.bits, bits if register.name[0] not in 'FD' else 64)):x}" for _ in field
            )
            for register in registers
            if not register.name.startswith(system)
            for field in (fresh[register.name].split(":"),)
        }
        wanted = {
            text: value if not text.startswith("FP") or ":" not in value else f"{draw.getrandbits(64):x}:{draw.getrandbits(16):x}"
            for text, value in wanted.items()
        }
        cpu.load_registers(fresh | wanted | {"pc": "1234"})
        saved = cpu.registers()
        assert {text: saved[text] for text in wanted} == wanted
        assert len(wanted) > 30
        assert saved["pc"] == "1234"
        second.load_vcpu_states(first.vcpu_states())
        other = second.vcpus[0].cpu
        assert isinstance(other, UnicornCpu)
        assert other.registers() == saved


@pytest.mark.parametrize("name", ["ppc-hv", "ppc-pv"])
def test_powerpc_s_carry_which_unicorn_does_not_give_goes_along(name: str) -> None:
    # li 5, 5; addic 4, 5, -1 (which carries); b .; and from 0x100c on: addze 6, 7 (register 7, which is 0, and the carry); b .
    image = Image.raw(bytes.fromhex("38a00005 3085ffff 48000000 7cc70194 48000000"), load=0x1000)
    with make_guest(name, NBYTES, image=image) as first, make_guest(name, NBYTES, image=image) as second:
        run_to(first, 0x1008)
        cpu, other = (memory.vcpus[0].cpu for memory in (first, second))
        assert isinstance(cpu, UnicornCpu)
        assert isinstance(other, UnicornCpu)
        saved = cpu.registers()
        assert (saved["pc"], saved["4"]) == ("1008", "4")
        second.load_vcpu_states(first.vcpu_states())
        assert other.registers() == saved
        other.load_registers(saved | {"pc": "100c"})
        run_to(second, 0x1010)
        assert other.registers() == saved | {"6": "1", "XER": "0", "pc": "1010"}
        # To move it takes instructions of a page that no guest may use.
        assert second.port.translate(0, other._registers.moves_address >> 12, False) is None


def test_riscv_registers_are_saved_in_user_mode_and_with_the_floating_point_unit_off() -> None:
    with make_guest("riscv", NBYTES) as first, make_guest("riscv", NBYTES) as second:
        cpu, other = (memory.vcpus[0].cpu for memory in (first, second))
        assert isinstance(cpu, UnicornCpu)
        assert isinstance(other, UnicornCpu)
        wanted = cpu.registers() | {"PRIV": "0", "MTVEC": "1234", "MSCRATCH": "77", "FCSR": "65", "MSTATUS": "0"}
        cpu.load_registers(wanted)
        assert cpu.registers() == wanted
        assert cpu.registers() == wanted, "and to save them changes nothing"
        other.load_registers(wanted)
        assert other.registers() == wanted


def test_code_that_comes_with_a_load_is_run_and_not_what_was_there_before() -> None:
    # mov eax, 1; jmp $. The other one: mov eax, 2; hlt, at the same place.
    with (
        make_guest("x86", NBYTES, image=Image.raw(bytes.fromhex("b801000000 ebfe"))) as first,
        make_guest("x86", NBYTES, image=Image.raw(bytes.fromhex("b802000000 f4"))) as second,
    ):
        states = second.vcpu_states()
        run_to(first, 5)
        contents(first)[:] = contents(second)
        first.load_vcpu_states(states)
        run_to_the_end(first)
        cpu = first.vcpus[0].cpu
        assert isinstance(cpu, UnicornCpu)
        assert cpu.registers()["RAX"] == "2"


def test_a_pattern_some_stores_later_is_what_the_trace_goes_on_with() -> None:
    for mask in (0, 63, 0x3FFF_FFFF, 0b1011):
        pattern = Pattern(base=1 << 20, page=5, mul=0x5D588B65, add=0x269EC3, mask=mask, value=(1 << 64) - 40, step=7, count=300)
        trace = list(trace_of(pattern))
        for steps in (0, 1, 2, 3, 64, 299, 300):
            assert list(trace_of(pattern_after(pattern, steps))) == trace[steps:]
    endless = pattern_after(Pattern(base=0, mul=5, add=3, mask=255), 10**15)
    assert endless.count is None


# --- what is refused


@pytest.mark.parametrize("name", sources(is_guest))
def test_a_machine_that_runs_gives_no_states_and_takes_none(name: str) -> None:
    with open_guest(name, loops=[Pattern(base=0x40000)]) as memory:
        states = memory.vcpu_states()
        memory.resume()
        with pytest.raises(InvalidArgumentError, match="running; pause it first"):
            memory.vcpu_states()
        with pytest.raises(InvalidArgumentError, match="running; pause it first"):
            memory.load_vcpu_states(states)
        with pytest.raises(InvalidArgumentError, match="vCPU 0 is running; pause the machine first"):
            memory.vcpus[0].save()
        memory.pause()
        memory.load_vcpu_states(states)


def test_after_the_end_there_are_no_states() -> None:
    memory = make_guest("x86", NBYTES)
    memory.close()
    with pytest.raises(DirtyLogError, match="vCPU 0 is closed"):
        memory.vcpu_states()


@pytest.mark.parametrize("name", sources(is_guest))
def test_the_state_of_another_kind_of_vcpu_is_refused(name: str) -> None:
    other = "arm64" if name != "arm64" else "x86"
    with open_guest(name) as memory, make_guest(other, NBYTES) as stranger:
        states = memory.vcpu_states()
        with pytest.raises(InvalidArgumentError, match=rf"state of a Unicorn {other} vCPU, and vCPU 0 is a .* vCPU"):
            memory.load_vcpu_states(stranger.vcpu_states())
        with pytest.raises(InvalidArgumentError, match="2 states for 1 vCPUs"):
            memory.load_vcpu_states(states * 2)


@pytest.mark.parametrize("name", sources(is_guest))
def test_registers_that_lack_or_are_too_many_or_too_long_are_refused_and_nothing_is_set(name: str) -> None:
    with half_way(name) as (memory, _):
        states = memory.vcpu_states()
        memory.reset()
        fresh = memory.vcpu_states()
        saved = SavedVcpu.from_bytes(states[1])
        first = next(iter(saved.registers))
        damaged: list[dict[str, str]] = [
            {text: value for text, value in saved.registers.items() if text != first},
            saved.registers | {"more": "1"},
            saved.registers | {first: "1" + "0" * 1000},
            saved.registers | {first: "-1"},
            saved.registers | {first: "water"},
        ]
        for registers in damaged:
            bad = SavedVcpu(saved.cpu, saved.state, saved.fault, registers).to_bytes()
            with pytest.raises(InvalidArgumentError, match="the state of a "):
                memory.load_vcpu_states([states[0], bad])
            now = memory.vcpu_states()
            if not name.startswith("kvm-"):
                assert now == fresh
            else:
                assert [pc_of(state) for state in now] == [pc_of(state) for state in fresh] != [pc_of(state) for state in states]


def pc_of(state: bytes) -> str:
    return SavedVcpu.from_bytes(state).registers["regs"][-32:]


def test_bytes_that_do_not_verify_are_refused() -> None:
    with make_guest("mips", NBYTES) as memory:
        state = memory.vcpu_states()[0]
        for place in range(len(state)):
            broken = bytearray(state)
            broken[place] ^= 1 << place % 8
            with pytest.raises((CorruptDataError, UnsupportedError)) as error:
                memory.load_vcpu_states([bytes(broken)])
            assert isinstance(error.value, UnsupportedError) == (place in (14, 15)), "only a format of the future is not corrupt"
        for length in range(len(state)):
            with pytest.raises(CorruptDataError):
                memory.load_vcpu_states([state[:length]])
        memory.load_vcpu_states([state])


ODD = [
    b"[]",
    b"{}",
    b"7",
    b'{"cpu":"Unicorn mips","state":"ready","fault":null,"registers":[]}',
    b'{"cpu":"Unicorn mips","state":"asleep","fault":null,"registers":{}}',
    b'{"cpu":"Unicorn mips","state":"faulted","fault":null,"registers":{}}',
    b'{"cpu":"Unicorn mips","state":"faulted","fault":{},"registers":{}}',
    b'{"cpu":"Unicorn mips","state":"faulted","fault":{"message":"","pc":"x","address":1,"architecture":""},"registers":{}}',
    b'{"cpu":7,"state":"ready","fault":null,"registers":{}}',
    b'{"cpu":"Unicorn mips","state":["ready"],"fault":null,"registers":{"pc":7}}',
    b'{"cpu":"Unicorn mips","state":"ready","fault":null,"registers":{"pc":7}}',
    b"[" * 100_000,
    b"\xff",
    b"7" * (1 << 21),
]


@pytest.mark.parametrize("body", ODD, ids=[str(number) for number in range(len(ODD))])
def test_what_verifies_and_is_no_state_all_the_same_is_refused(body: bytes) -> None:
    data = b"dirtylog vCPU\n" + struct.pack("<HI", 1, zlib.crc32(body)) + body
    with bounded(MIB * 8), pytest.raises(CorruptDataError):
        SavedVcpu.from_bytes(data)


def test_a_load_that_is_interrupted_sets_all_or_nothing() -> None:
    name = "x86"
    with half_way(name) as (memory, _):
        states = memory.vcpu_states()
        memory.reset()
        fresh = memory.vcpu_states()
        for step in range(0, 10_000, 7):
            if not interrupt(lambda: memory.load_vcpu_states(states), step):
                break
            now = memory.vcpu_states()
            assert now in (fresh, states), f"interrupted at point {step}"
            memory.load_vcpu_states(fresh)
        assert step > 100, "the points were not seen"
        assert memory.vcpu_states() == states


class NoRegisters:
    """A CPU of somebody else's."""

    pc = 0

    def run(self) -> CpuExit:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def flush_tlb(self) -> None:
        raise NotImplementedError


def test_a_cpu_whose_registers_cannot_be_had_is_unsupported() -> None:
    with pytest.raises(UnsupportedError, match="NoRegisters cannot do it"):
        Vcpu(0, NoRegisters, lambda _: None).save()
    with make_guest("ia64", NBYTES) as memory:
        cpu = TraceCpu(0, "ia64", [(0, 1)], memory.port.translate, memory.host_memory)
        with pytest.raises(UnsupportedError, match="a trace of one's own"):
            cpu.registers()

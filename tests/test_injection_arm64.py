"""System calls in a thread of arm64: its registers and its frame, in an emulated thread, with a sigreturn written a second time.

:class:`Thread` is the kernel's part: what a debugger reads and sets, and what a system call and rt_sigreturn do, each as
arch/arm64/kernel/signal.c, ptrace.c and entry-common.c have it. The instructions between are run by Unicorn.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import struct
import subprocess
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pytest

from conftest import find_tool
from dirtylog import UnsupportedError
from dirtylog.linux.arch import host_architecture
from dirtylog.linux.arch.architecture import Gadgets
from dirtylog.linux.arch.arm64 import Arm64, SveRegs, ThreadRegs, UserRegs
from dirtylog.linux.call_window import _place, enter_call
from dirtylog.linux.ptrace import ALL_SIGNALS
from dirtylog.linux.ptrace_abi import Event, Request, Stop, SystemCall

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dirtylog.linux.arch.architecture import Frame
    from dirtylog.linux.layout import Struct
    from dirtylog.linux.ptrace import Tracee

# struct rt_sigframe, its records, and registers of a debugger. The kernel's headers are compiled to check them, where they are.
OFFSETS = {
    "offsetof(struct frame, uc.uc_stack.ss_flags)": 152,
    "offsetof(struct frame, uc.uc_sigmask)": 168,
    "offsetof(struct frame, uc.uc_mcontext.regs)": 312,
    "offsetof(struct frame, uc.uc_mcontext.sp)": 560,
    "offsetof(struct frame, uc.uc_mcontext.pc)": 568,
    "offsetof(struct frame, uc.uc_mcontext.pstate)": 576,
    "offsetof(struct frame, uc.uc_mcontext.__reserved)": 592,
    "sizeof(struct frame)": 4688,
    "sizeof(struct fpsimd_context)": 528,
    "offsetof(struct fpsimd_context, fpsr)": 8,
    "offsetof(struct fpsimd_context, vregs)": 16,
    "sizeof(struct sve_context)": 16,
    "offsetof(struct sve_context, vl)": 8,
    "sizeof(struct extra_context)": 32,
    "offsetof(struct extra_context, datap)": 8,
    "offsetof(struct extra_context, size)": 16,
    "SVE_SIG_CONTEXT_SIZE(1)": 562,
    "SVE_SIG_CONTEXT_SIZE(16)": 8752,
    "sizeof(struct user_pt_regs)": 272,
    "offsetof(struct user_pt_regs, pstate)": 264,
    "sizeof(struct user_fpsimd_state)": 528,
    "offsetof(struct user_fpsimd_state, fpsr)": 512,
    "sizeof(struct user_sve_header)": 16,
    "offsetof(struct user_sve_header, vl)": 8,
    "offsetof(struct user_sve_header, flags)": 12,
    "SVE_PT_SVE_OFFSET": 16,
    "SVE_PT_SVE_FPSR_OFFSET(1)": 576,
    "SVE_PT_SIZE(16, SVE_PT_REGS_SVE)": 8768,
    "FPSIMD_MAGIC": 0x46508001,
    "SVE_MAGIC": 0x53564501,
    "EXTRA_MAGIC": 0x45585401,
    "__NR_userfaultfd": 282,
    "__NR_close": 57,
    "__NR_rt_sigreturn": 139,
}
FPSIMD, SVE, EXTRA, POE = 0x46508001, 0x53564501, 0x45585401, 0x504F4530
PRSTATUS, PRFPREG, ARM_SVE, ARM_SSVE, ARM_POE, ARM_GCS = 1, 2, 0x405, 0x40B, 0x40F, 0x410
USERFAULTFD, CLOSE, SIGRETURN = 282, 57, 139
NZCV, BTYPE = 0xF << 28, 3 << 10
PROGRAM, LIBRARY, VDSO, STACK = 0x40_0000, 0x7F00_0000_0000, 0x7FFF_0000_0000, 0x7FFF_8000_0000
SP = STACK + 0xC000
GADGETS = Gadgets(LIBRARY + 0x2C8, VDSO + 0x808)
MASK = 0x4001
NEW_FD = 7


class State(NamedTuple):
    """All that a thread has."""

    general: bytes
    simd: bytes
    sve: bytes | None
    """32 registers Z, 16 P, FFR; None if they are not live: then all of them beyond SIMD's bits is zero."""
    overlays: int | None
    mask: int


class BadFrameError(Exception):
    """What SIGSEGV is to the thread."""


class Thread:
    """A thread of arm64 that is stopped, as its debugger and its kernel see it."""

    tid = pid = 1
    slept_in: SystemCall | None = None

    def __init__(self, *, vl: int = 0, live: bool = False, overlays: int | None = None, pc: int = PROGRAM + 0x10) -> None:
        self.unicorn = pytest.importorskip("unicorn", reason="Unicorn is not installed")
        self.const = self.unicorn.arm64_const
        self.uc = self.unicorn.Uc(self.unicorn.UC_ARCH_ARM64, self.unicorn.UC_MODE_ARM)
        for page in (PROGRAM, LIBRARY, VDSO, *range(STACK, STACK + 0x10000, 0x1000)):
            self.uc.mem_map(page, 0x1000)
        self.uc.mem_write(GADGETS.syscall, Arm64.syscall_code)
        self.uc.mem_write(GADGETS.sigreturn, Arm64.sigreturn_code)
        self.uc.hook_add(self.unicorn.UC_HOOK_INTR, self._called)
        self.vl, self.overlays, self.mask = vl, overlays, MASK
        self.other_bits = 1 << 12 | 2 << 10  # of PSTATE: SSBS, and that a branch has just been taken
        self.sve = bytes(i * 11 % 251 for i in range(32 * vl + 17 * vl // 8)) if live else None
        self.numbers: list[int] = []
        for number in range(31):
            self._write(f"X{number}", 0xDEAD_0000_0000_0000 + number)
        for number in range(32):
            self._write(f"Q{number}", int.from_bytes(bytes(number * 16 + i & 0xFF for i in range(16)), "little"))
        if self.sve is not None:
            self._simd_of_sve()
        for name, value in (("SP", SP), ("PC", pc), ("NZCV", 0xA << 28), ("FPCR", 1 << 24), ("FPSR", 0x1B)):
            self._write(name, value)

    def _read(self, name: str) -> int:
        return int(self.uc.reg_read(getattr(self.const, f"UC_ARM64_REG_{name}")))

    def _write(self, name: str, value: int) -> None:
        self.uc.reg_write(getattr(self.const, f"UC_ARM64_REG_{name}"), value)

    def _memory(self, address: int, nbytes: int) -> bytes:
        return bytes(self.uc.mem_read(address, nbytes))

    def _word(self, address: int, nbytes: int = 8) -> int:
        return int.from_bytes(self._memory(address, nbytes), "little")

    def state(self) -> State:
        return State(
            bytes(self.registers(UserRegs, PRSTATUS)), self.raw_registers(PRFPREG, 528), self.sve, self.overlays, self.mask
        )

    # --- what a debugger does

    def registers(self, kind: type[Struct], note: int) -> Struct:
        assert (kind, note) == (UserRegs, PRSTATUS)
        x = (ctypes.c_uint64 * 31)(*(self._read(f"X{number}") for number in range(31)))
        return UserRegs(x=x, sp=self._read("SP"), pc=self._read("PC"), pstate=self._read("NZCV") | self.other_bits)

    def raw_registers(self, note: int, nbytes: int) -> bytes:
        simd = b"".join(self._read(f"Q{number}").to_bytes(16, "little") for number in range(32))
        simd += struct.pack("<II8x", self._read("FPSR"), self._read("FPCR"))
        regsets = {PRFPREG: simd}
        if self.vl and self.sve is None:
            regsets[ARM_SVE] = struct.pack("<IIHHHH", 16 + len(simd), 8768, self.vl, 256, 0, 0) + simd
        elif self.sve is not None:
            padded = self.sve.ljust(-(-len(self.sve) // 16) * 16, b"\0") + simd[512:528]
            regsets[ARM_SVE] = struct.pack("<IIHHHH", 16 + len(padded), 8768, self.vl, 256, 1, 0) + padded
        if self.overlays is not None:
            regsets[ARM_POE] = self.overlays.to_bytes(8, "little")
        return regsets.get(note, b"")[:nbytes]

    def set_registers(self, value: Struct, note: int) -> None:
        if note == ARM_SVE:
            assert isinstance(value, SveRegs)
            assert (value.vl, value.flags) == (self.vl, 1)
            self.sve = bytes(value.data)[: 32 * self.vl + 17 * self.vl // 8]
            self._simd_of_sve()
            return
        assert isinstance(value, UserRegs)
        assert note == PRSTATUS
        self._set_general(list(value.x), value.sp, value.pc, value.pstate)

    # --- what the kernel does

    def _set_general(self, x: list[int], sp: int, pc: int, pstate: int) -> None:
        for number in range(31):
            self._write(f"X{number}", x[number])
        for name, value in (("SP", sp), ("PC", pc), ("NZCV", pstate & NZCV)):
            self._write(name, value)
        self.other_bits = pstate & ~NZCV

    def _simd_of_sve(self) -> None:
        assert self.sve is not None
        for number in range(32):
            self._write(f"Q{number}", int.from_bytes(self.sve[number * self.vl : number * self.vl + 16], "little"))

    def _called(self, uc: Any, _number: int, _data: object) -> None:
        uc.emu_stop()

    def run_to_a_call(self) -> int:
        """Run up to a system call and through it; return its number."""
        assert not self.other_bits & BTYPE, "SIGILL: a jump to what is no landing pad"
        self.uc.emu_start(self._read("PC"), 0, count=8)
        number = self._read("X8")
        self.numbers.append(number)
        self.sve = None  # fpsimd_syscall_enter
        if number == SIGRETURN:
            self._sigreturn()
        else:
            self._write("X0", {USERFAULTFD: NEW_FD, CLOSE: 0}[number])
        return number

    def _sigreturn(self) -> None:
        frame = self._read("SP")
        if frame % 16:
            raise BadFrameError("sp")
        records = self._records(frame + OFFSETS["offsetof(struct frame, uc.uc_mcontext.__reserved)"])
        mcontext = frame + OFFSETS["offsetof(struct frame, uc.uc_mcontext.regs)"]
        words = struct.unpack("<34Q", self._memory(mcontext, 34 * 8))
        if words[33] & 0x3DF:  # not EL0, 32 bits, or exceptions masked: valid_native_regs
            raise BadFrameError("pstate")
        self.mask = self._word(frame + OFFSETS["offsetof(struct frame, uc.uc_sigmask)"])
        self._set_general(list(words[:31]), *words[31:])
        if FPSIMD not in records or len(records[FPSIMD]) != 528:
            raise BadFrameError("fpsimd_context")
        if SVE in records:
            self._restore_sve(records[SVE])
        _, _, fpsr, fpcr, simd = struct.unpack("<IIII512s", records[FPSIMD])
        for number in range(32):
            self._write(f"Q{number}", int.from_bytes(simd[number * 16 : number * 16 + 16], "little"))
        self._write("FPSR", fpsr)
        self._write("FPCR", fpcr)
        if self.overlays is not None:
            # Linux 6.12 takes it from an uninitialised variable if there is no record.
            self.overlays = struct.unpack("<8xQ", records[POE])[0] if POE in records else 0x5555
        if self._word(frame + OFFSETS["offsetof(struct frame, uc.uc_stack.ss_flags)"], 4) in (0, 1, 2):
            raise BadFrameError("it would change the alternate stack")

    def _restore_sve(self, record: bytes) -> None:
        vl, flags = struct.unpack("<8xHH4x", record[:16])
        if vl != self.vl or flags or len(record) < 16 + 32 * vl + 17 * vl // 8:
            raise BadFrameError("sve_context")
        self.sve = record[16 : 16 + 32 * vl + 17 * vl // 8]

    def _records(self, base: int) -> dict[int, bytes]:
        """Read the records as parse_user_sigframe does."""
        found: Counter[int] = Counter()
        records: dict[int, bytes] = {}
        offset, limit = 0, 4096
        while True:
            if limit - offset < 8 or offset % 16:
                raise BadFrameError("no end")
            magic, size = struct.unpack("<II", self._memory(base + offset, 8))
            if limit - offset < size or (magic == 0 and size) or (magic and size < 8):
                raise BadFrameError("size")
            if magic == 0:
                return records
            found[magic] += 1
            if found[magic] > 1 or magic not in (FPSIMD, EXTRA, *([SVE] if self.vl else []), *([POE] if self.overlays else [])):
                raise BadFrameError("magic")
            if magic == EXTRA:
                start, nbytes = struct.unpack("<8xQI12x", self._memory(base + offset, 32))
                behind = base + offset + size + 16
                if size < 32 or start != behind or start % 16 or nbytes % 16 or self._word(behind - 16):
                    raise BadFrameError("extra_context")
                base, offset, limit = start, 0, nbytes
                continue
            records[magic] = self._memory(base + offset, size)
            offset += size


def lay_frame(thread: Thread, shift: int = 0) -> tuple[ThreadRegs, Frame]:
    """Do as CallWindow does, up to the first change of a register: save, and write the frame."""
    saved = Arm64().save(cast("Tracee", thread))
    frame = Arm64().frame(cast("Tracee", thread), saved, thread.mask, GADGETS)
    frame = frame._replace(address=frame.address + shift)
    thread.uc.mem_write(frame.address, frame.data)
    return saved, frame


def call(thread: Thread, saved: ThreadRegs, frame: Frame, number: int, argument: int) -> None:
    Arm64().restore(cast("Tracee", thread), Arm64().call(saved, GADGETS, frame, number, argument))


KINDS: dict[str, dict[str, Any]] = {
    "SIMD": {},
    "permission overlays": {"overlays": 0x7654_3210},
    "SVE not in use": {"vl": 32},
    **{f"SVE of {vl} bytes": {"vl": vl, "live": True} for vl in (16, 32, 64, 112, 128, 256)},
    "long SVE and overlays": {"vl": 256, "live": True, "overlays": 7},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_thread_that_is_left_alone_in_a_call_restores_itself(kind: str) -> None:
    thread = Thread(**KINDS[kind])
    before = thread.state()
    saved, frame = lay_frame(thread)
    call(thread, saved, frame, USERFAULTFD, 0x80801)
    thread.mask = ALL_SIGNALS
    assert thread._read("X0") == 0x80801
    assert thread.run_to_a_call() == USERFAULTFD
    assert Arm64().result(Arm64().save(cast("Tracee", thread))) == NEW_FD
    assert thread.run_to_a_call() == SIGRETURN
    assert thread.state() == before


@pytest.mark.parametrize("kind", KINDS)
def test_after_the_calls_the_registers_are_put_back(kind: str) -> None:
    thread = Thread(**KINDS[kind])
    before = thread.state()
    saved, frame = lay_frame(thread)
    for number, argument in ((CLOSE, -1), (USERFAULTFD, 1), (CLOSE, NEW_FD)):
        call(thread, saved, frame, number, argument)
        assert thread._read("X0") == argument % (1 << 64)
        assert thread.run_to_a_call() == number
    assert thread.sve is None
    Arm64().restore(cast("Tracee", thread), saved)
    assert thread.state() == before


@pytest.mark.parametrize("kind", ["SIMD", "SVE of 256 bytes"])
@pytest.mark.parametrize("below", [0, 1, 8, 15])
def test_the_frame_ends_at_the_stack_pointer(kind: str, below: int) -> None:
    thread = Thread(**KINDS[kind])
    thread._write("SP", SP - below)
    _, frame = lay_frame(thread)
    assert frame.address % 16 == 0
    assert 0 <= SP - below - (frame.address + len(frame.data)) < 16


RECORDS = OFFSETS["offsetof(struct frame, uc.uc_mcontext.__reserved)"]


@pytest.mark.parametrize("kind", ["permission overlays", "SVE of 64 bytes", "SVE of 256 bytes"])
@pytest.mark.parametrize(
    ("offset", "byte", "shift"),
    [
        (RECORDS, 0, 0),
        (RECORDS + 4, 8, 0),
        (RECORDS + 528, 2, 0),
        (RECORDS + 532, 1, 0),
        (OFFSETS["offsetof(struct frame, uc.uc_stack.ss_flags)"], 0, 0),
        (OFFSETS["offsetof(struct frame, uc.uc_mcontext.pstate)"], 0x10, 0),
        (0, 0, -8),
    ],
)
def test_a_frame_that_is_not_right_is_noticed(kind: str, offset: int, byte: int, shift: int) -> None:
    thread = Thread(**KINDS[kind])
    saved, frame = lay_frame(thread, shift)
    thread.uc.mem_write(frame.address + offset, bytes([byte]))
    call(thread, saved, frame, CLOSE, -1)
    thread.run_to_a_call()
    with pytest.raises(BadFrameError):
        thread.run_to_a_call()


def test_a_call_is_not_a_jump_and_changes_no_more_than_it_must() -> None:
    saved = Arm64().save(cast("Tracee", Thread()))
    calling = Arm64().call(saved, GADGETS, None, CLOSE, 5)
    assert saved.general.pstate & BTYPE
    assert calling.general.pstate == saved.general.pstate & ~BTYPE
    assert (calling.general.sp, calling.general.pc) == (SP, GADGETS.syscall)
    changed = [n for n in range(31) if calling.general.x[n] != saved.general.x[n]]
    assert [(n, calling.general.x[n]) for n in changed] == [(0, 5), (8, CLOSE), (30, GADGETS.sigreturn)]


@pytest.mark.parametrize(
    ("note", "regset", "reason"),
    [
        (ARM_GCS, struct.pack("<QQQ", 1, 0, 0x7000), "guarded control stack"),
        (ARM_SSVE, struct.pack("<IIHHHH", 600, 8768, 64, 64, 1, 0), "streaming mode"),
    ],
)
def test_what_a_call_would_harm_is_refused(note: int, regset: bytes, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    thread = Thread()
    assert Arm64().refusal(Arm64().save(cast("Tracee", thread))) is None
    given = thread.raw_registers
    monkeypatch.setattr(thread, "raw_registers", lambda asked, nbytes: regset[:nbytes] if asked == note else given(asked, nbytes))
    assert reason in str(Arm64().refusal(Arm64().save(cast("Tracee", thread))))


def test_32_bit_code_is_refused() -> None:
    assert Arm64().refusal(ThreadRegs(general=UserRegs(sp=SP, pstate=0x10))) == "it runs 32-bit code"
    # r0 to r12, sp, lr, pc, cpsr and orig_r0, of four bytes each, is what a debugger of 64 bits is given.
    registers = UserRegs.from_buffer_copy(struct.pack("<18I", *range(1, 17), 0x10, 1).ljust(272, b"\0"))
    assert Arm64().refusal(ThreadRegs(general=registers)) == "it runs 32-bit code"


def test_a_thread_in_the_very_call_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="the system call that would be used"):
        lay_frame(Thread(pc=GADGETS.syscall))


def test_a_thread_without_floating_point_state_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    thread = Thread()
    monkeypatch.setattr(thread, "raw_registers", lambda _note, _nbytes: b"")
    with pytest.raises(UnsupportedError, match="floating point state"):
        lay_frame(thread)


SVC = 0xD400_0001
SLEEP, RESTART, EPOLL, READ = 101, 128, 22, 63
HERE = PROGRAM + 0x10


class Debugged:
    """A thread that stops as it is told, and what is asked of it meanwhile. ``numbers`` are x8 at each look at its registers."""

    tid = pid = os.getpid()

    def __init__(self, *stops: Stop, numbers: tuple[int, ...] = (), slept_in: SystemCall | None = None) -> None:
        self.stops, self.numbers, self.slept_in = list(stops), list(numbers), slept_in
        self.asked: list[object] = []

    def wait(self) -> Stop:
        return self.stops.pop(0)

    def resume(self, request: Request = Request.CONT, sig: int = 0) -> None:
        self.asked.append((request.name, sig))

    def interrupt(self) -> None:
        self.asked.append("interrupt")

    def set_signal_mask(self, mask: int) -> None:
        self.asked.append(("mask", mask))

    def let_run(self) -> None:
        self.asked.append("runs")

    def raw_registers(self, _note: int, _nbytes: int) -> bytes:
        return b""

    def registers(self, _kind: type[Struct], _note: int) -> Struct:
        return registers_in(self.numbers.pop(0)).general


def registers_in(number: int, result: int = 5, pc: int = HERE) -> ThreadRegs:
    x = (ctypes.c_uint64 * 31)(*range(31))
    x[0], x[8] = result % (1 << 64), number
    return ThreadRegs(general=UserRegs(x=x, sp=SP, pc=pc))


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[int]:
    """Descriptor of a file that has an ``svc`` where the thread is."""
    path = tmp_path / "memory"
    with path.open("wb") as file:
        file.seek(HERE)
        file.write(SVC.to_bytes(4, "little"))
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


ENTERED, STOPPED, SIGNALLED = Stop(Event.SYSCALL, 0x85), Stop(Event.TRAP, 5), Stop(Event.SIGNAL, signal.SIGUSR1)


@pytest.mark.parametrize("number", [SLEEP, RESTART])
def test_a_sleep_is_put_back_as_the_kernel_goes_on_with_it(number: int, memory: int) -> None:
    thread = Debugged(ENTERED, STOPPED, numbers=(number,))
    settled = Arm64().settle(cast("Tracee", thread), registers_in(SLEEP), memory)
    assert settled.general.x[8] == number
    assert thread.asked == [("SYSCALL", 0), "interrupt", ("CONT", 0)]


def test_a_signal_before_the_sleep_goes_on_is_let_through(memory: int) -> None:
    thread = Debugged(SIGNALLED, STOPPED, numbers=(READ,))
    Arm64().settle(cast("Tracee", thread), registers_in(SLEEP), memory)
    assert thread.asked == [("SYSCALL", 0), "interrupt", ("CONT", signal.SIGUSR1)]


@pytest.mark.parametrize("registers", [registers_in(READ), registers_in(SLEEP, pc=HERE + 4), registers_in(SLEEP, pc=1 << 40)])
def test_other_threads_stand_where_they_are(registers: ThreadRegs, memory: int) -> None:
    thread = Debugged()
    assert Arm64().settle(cast("Tracee", thread), registers, memory) is registers
    assert not thread.asked


def test_a_thread_is_released_into_its_call(memory: int) -> None:
    thread = Debugged(ENTERED)
    assert Arm64().before_call(registers_in(READ), memory)
    enter_call(cast("Tracee", thread), MASK)
    assert thread.asked == [("SYSCALL", 0), ("mask", MASK), "runs"]


def test_a_signal_that_comes_before_the_call_is_there_in_the_call() -> None:
    thread = Debugged(SIGNALLED, ENTERED)
    enter_call(cast("Tracee", thread), MASK)
    requeued = [("mask", ALL_SIGNALS), ("SYSCALL", signal.SIGUSR1)]
    assert thread.asked == [("SYSCALL", 0), *requeued, ("mask", MASK), "runs"]


def test_a_thread_of_a_process_that_is_stopped_stays_before_its_call() -> None:
    thread = Debugged(Stop(Event.SIGNAL, signal.SIGSTOP), Stop(Event.GROUP, signal.SIGSTOP))
    enter_call(cast("Tracee", thread), MASK)
    assert thread.asked[-2:] == [("SYSCALL", signal.SIGSTOP), ("mask", MASK)]


def test_a_thread_in_no_call_is_released_as_it_is(memory: int) -> None:
    assert not Arm64().before_call(registers_in(READ, pc=HERE + 4), memory)


def test_a_call_that_ended_with_the_stop_is_made_again_with_its_first_argument() -> None:
    slept_in = SystemCall(EPOLL, (3, 1, 2, 3, 4, 5), SP, HERE + 4)
    thread = Debugged(slept_in=slept_in)
    ended = registers_in(EPOLL, -errno.EINTR, HERE + 4)
    thread.registers = lambda _kind, _note: ended.general  # type: ignore[method-assign]
    saved = Arm64().save(cast("Tracee", thread))
    assert Arm64().interrupted(saved) == (EPOLL, -errno.EINTR)
    Arm64().again(saved)
    assert (saved.general.x[0], saved.general.pc, saved.general.x[8]) == (3, HERE, EPOLL)
    others = (None, slept_in._replace(number=21), slept_in._replace(program_counter=HERE), slept_in._replace(stack_pointer=SP - 16))
    for thread.slept_in in (*others, slept_in._replace(arguments=(3, 1, 2, 3, 4, 6))):
        assert Arm64().interrupted(Arm64().save(cast("Tracee", thread)))[0] == -1


def test_code_across_two_instructions_is_none() -> None:
    assert _place(b"\0\0\1\0\0\xd4\0\0\1\0\0\xd4", b"\1\0\0\xd4", 4) == 8
    assert _place(b"\0\0\1\0\0\xd4", b"\1\0\0\xd4", 4) == -1
    assert _place(b"\0\0\1\0\0\xd4", b"\1\0\0\xd4", 1) == 2


def test_other_machines_are_refused() -> None:
    assert isinstance(host_architecture("aarch64"), Arm64)
    with pytest.raises(
        UnsupportedError, match=r"no system call can be injected on riscv64; known: x86_64, aarch64; let the program"
    ):
        host_architecture("riscv64")


def test_the_offsets_are_those_of_the_kernels_headers(tmp_path: Path) -> None:
    compiler, objcopy = shutil.which("aarch64-linux-gnu-gcc"), find_tool("aarch64", "objcopy")
    if compiler is None or objcopy is None or not Path("/usr/aarch64-linux-gnu/include/asm/sigcontext.h").exists():
        pytest.skip("no C compiler for arm64, or no headers of its kernel")
    source, compiled, values = tmp_path / "offsets.c", tmp_path / "offsets.o", tmp_path / "offsets.bin"
    includes = "".join(
        f"#include <{one}.h>\n"
        for one in ("stddef", "asm/siginfo", "asm/signal", "asm/sigcontext", "asm/ucontext", "asm/ptrace", "asm/unistd")
    )
    frame = "struct frame { siginfo_t info; struct ucontext uc; };\n"
    source.write_text(f"{includes}{frame}unsigned long values[] = {{ {', '.join(OFFSETS)} }};\n")
    subprocess.run([compiler, "-c", "-o", str(compiled), str(source)], check=True)
    subprocess.run([objcopy, "-O", "binary", "-j", ".data", str(compiled), str(values)], check=True)
    assert struct.unpack(f"<{len(OFFSETS)}Q", values.read_bytes()) == tuple(OFFSETS.values())


def test_the_code_that_is_looked_for_is_what_it_is_taken_for(tmp_path: Path) -> None:
    assembler, objcopy = find_tool("aarch64", "as"), find_tool("aarch64", "objcopy")
    if assembler is None or objcopy is None:
        pytest.skip("binutils for aarch64 are not installed")
    source, assembled, code = tmp_path / "code.s", tmp_path / "code.o", tmp_path / "code.bin"
    source.write_text("svc #0\nret\nmov x8, #139\nsvc #0\n")
    subprocess.run([assembler, "-o", str(assembled), str(source)], check=True)
    subprocess.run([objcopy, "-O", "binary", "-j", ".text", str(assembled), str(code)], check=True)
    assert code.read_bytes() == Arm64.syscall_code + Arm64.sigreturn_code

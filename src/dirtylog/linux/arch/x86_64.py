"""System calls in another process on x86_64.

The frame is what the kernel itself lays on the stack for a signal handler: struct rt_sigframe (arch/x86/include/asm/sigframe.h),
with struct sigcontext_64 and the extended state (arch/x86/include/uapi/asm/sigcontext.h).
"""

from __future__ import annotations

import errno
import struct as packing
from typing import TYPE_CHECKING, ClassVar

from dirtylog.errors import UnsupportedError
from dirtylog.linux.arch.architecture import (
    ERESTART_RESTARTBLOCK,
    ERESTARTNOHAND,
    ERESTARTNOINTR,
    ERESTARTSYS,
    Architecture,
    Frame,
    Gadgets,
)
from dirtylog.linux.layout import U64, Struct, struct

if TYPE_CHECKING:
    from dirtylog.linux.ptrace import Tracee

_NT_PRSTATUS = 1
_NT_X86_XSTATE = 0x202
_MAX_XSTATE = 1 << 15
_RED_ZONE = 128
_USER_CS = 0x33
_SYSCALL_BYTES = 2

_FP_XSTATE_MAGIC1 = 0x46505853
_FP_XSTATE_MAGIC2 = 0x46505845
_SW_RESERVED = 464
_XSTATE_BV = 512
_MIN_XSTATE = 576
_XTILEDATA = 1 << 18
_XTILEDATA_OFFSET = 2816
_UC_FLAGS = 1 | 2 | 4  # UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS
_NO_ALTSTACK = 7  # neither SS_ONSTACK nor SS_DISABLE: the kernel refuses it, and leaves the alternate stack as it is
_SIGINFO_BYTES = 128
_SIGFRAME = packing.Struct("<Q QQ QIIQ 8Q 10Q 4H 4Q Q 64x Q")


@struct(216)
class UserRegs(Struct):
    """user_regs_struct."""

    r15: U64
    r14: U64
    r13: U64
    r12: U64
    rbp: U64
    rbx: U64
    r11: U64
    r10: U64
    r9: U64
    r8: U64
    rax: U64
    rcx: U64
    rdx: U64
    rsi: U64
    rdi: U64
    orig_rax: U64
    rip: U64
    cs: U64
    eflags: U64
    rsp: U64
    ss: U64
    fs_base: U64
    gs_base: U64
    ds: U64
    es: U64
    fs: U64
    gs: U64


class X86_64(Architecture[UserRegs]):  # noqa: N801 - the architecture's name
    """x86_64."""

    elf_machine = 62
    syscall_instruction = bytes.fromhex("0f 05")
    syscall_code = bytes.fromhex("0f 05 c3")
    sigreturn_code = bytes.fromhex("48 c7 c0 0f 00 00 00 0f 05")
    userfaultfd = 323
    close = 3
    tgkill = 234
    # read, poll, select, pause, nanosleep, wait4, rt_sigsuspend, futex, clock_nanosleep, waitid, pselect6, ppoll
    restartable: ClassVar[frozenset[int]] = frozenset({0, 7, 23, 34, 35, 61, 130, 202, 230, 247, 270, 271})
    # With a timeout: read, write, readv, writev, accept, sendto, recvfrom, sendmsg, recvmsg, accept4, recvmmsg, sendmmsg; and ever:
    # semop, rt_sigtimedwait, io_getevents, semtimedop, epoll_wait, epoll_pwait, io_pgetevents, io_uring_enter, epoll_pwait2
    interruptible: ClassVar[frozenset[int]] = frozenset(
        {0, 1, 19, 20, 43, 44, 45, 46, 47, 288, 299, 307, 65, 128, 208, 220, 232, 281, 333, 426, 441}
    )

    def save(self, tracee: Tracee) -> UserRegs:
        """Return the general registers."""
        return tracee.registers(UserRegs, _NT_PRSTATUS)

    def restore(self, tracee: Tracee, registers: UserRegs) -> None:
        """Set them."""
        tracee.set_registers(registers, _NT_PRSTATUS)

    def refusal(self, registers: UserRegs) -> str | None:
        """Return why nothing can be run: only 64-bit code can."""
        return None if registers.cs == _USER_CS else "it runs 32-bit code"

    def program_counter(self, registers: UserRegs) -> int:
        """Return rip."""
        return registers.rip

    def stack_pointer(self, registers: UserRegs) -> int:
        """Return rsp."""
        return registers.rsp

    def interrupted(self, registers: UserRegs) -> tuple[int, int]:
        """Return the system call's number, which the kernel keeps beside the registers, and its result."""
        return _signed(registers.orig_rax), _signed(registers.rax)

    def again(self, registers: UserRegs) -> None:
        """Go back to the instruction."""
        registers.rax, registers.orig_rax = registers.orig_rax, _unsigned(-1)
        registers.rip -= _SYSCALL_BYTES

    def frame(self, tracee: Tracee, registers: UserRegs, mask: int, gadgets: Gadgets) -> Frame:
        """Lay it below the red zone.

        A system call that waits to be restarted is made again. Of a sleep the kernel forgets how long it was: that ends with EINTR.
        """
        after = UserRegs.from_buffer_copy(registers)
        number, result = self.interrupted(registers)
        if number >= 0 and -result in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND):
            self.again(after)
        elif number >= 0 and -result == ERESTART_RESTARTBLOCK:
            after.rax = _unsigned(-errno.EINTR)
        extended = _extended_state(tracee.raw_registers(_NT_X86_XSTATE, _MAX_XSTATE), tracee.pid)
        state = (registers.rsp - _RED_ZONE - len(extended)) // 64 * 64
        # As at the entry of a function, which is where a handler would begin.
        address = (state - _SIGFRAME.size - _SIGINFO_BYTES) // 16 * 16 - 8
        general = (after.r8, after.r9, after.r10, after.r11, after.r12, after.r13, after.r14, after.r15, after.rdi, after.rsi)
        special = (after.rbp, after.rbx, after.rdx, after.rax, after.rcx, after.rsp, after.rip, after.eflags)
        data = _SIGFRAME.pack(
            gadgets.sigreturn,
            *(_UC_FLAGS, 0, 0, _NO_ALTSTACK, 0, 0),
            *general,
            *special,
            *(after.cs, 0, 0, after.ss),
            *(0, 0, 0, 0),
            state,
            mask,
        )
        return Frame(address, data.ljust(state - address, b"\0") + extended)

    def call(self, registers: UserRegs, gadgets: Gadgets, frame: Frame | None, number: int, argument: int) -> UserRegs:
        """Point rip at the gadget, and rsp at the frame: its return takes the address of sigreturn from there."""
        calling = UserRegs.from_buffer_copy(registers)
        calling.rip, calling.rax, calling.rdi = gadgets.syscall, number, argument
        calling.orig_rax = _unsigned(-1)
        if frame is not None:
            calling.rsp = frame.address
        return calling

    def result(self, registers: UserRegs) -> int:
        """Return rax."""
        return _signed(registers.rax)


def _extended_state(xstate: bytes, pid: int) -> bytes:
    """Return the floating point state as a signal frame has it: with the software's bytes, and a magic word behind.

    The state must not be longer than what the task may use (fpstate->user_size), or the kernel restores the oldest part of it only.
    A debugger is given AMX's tiles too, the last and by far the largest part, which a task may use once it has asked to.
    """
    if len(xstate) < _MIN_XSTATE:
        raise UnsupportedError(f"the floating point state of process {pid} cannot be had", pid=pid, remedy="use dirtylog.agent")
    features = int.from_bytes(xstate[_XSTATE_BV : _XSTATE_BV + 8], "little")
    nbytes = len(xstate) if features & _XTILEDATA else min(len(xstate), _XTILEDATA_OFFSET)
    enabled = int.from_bytes(xstate[_SW_RESERVED : _SW_RESERVED + 8], "little")
    software = packing.pack("<IIQI", _FP_XSTATE_MAGIC1, nbytes + 4, enabled, nbytes)
    head = xstate[:_SW_RESERVED] + software.ljust(512 - _SW_RESERVED, b"\0")
    return head + xstate[512:nbytes] + packing.pack("<I", _FP_XSTATE_MAGIC2)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _unsigned(value: int) -> int:
    return value % (1 << 64)

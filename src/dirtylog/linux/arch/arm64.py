"""System calls in another process on arm64.

The frame is what the kernel itself lays on the stack for a signal handler: struct rt_sigframe, with the records of what there is
besides the general registers (arch/arm64/kernel/signal.c, and struct sigcontext in arch/arm64/include/uapi/asm/sigcontext.h).

What differs from x86_64, from the same file and from arch/arm64/kernel/{ptrace,syscall,entry-common}.c:

* A system call returns to the link register: sigreturn's address stands there, not on the stack. There is no red zone.
* The C library has system calls that return at once, such as getpid, but no return from a signal handler: that is in the vdso.
* A thread that is stopped in a system call has been set back to its instruction *before* the debugger sees it: do_signal puts the
  first argument back into x0, goes back to the ``svc``, and calls it no system call any more. So the registers are all that it
  takes to make the call again, and nothing in them tells that it was interrupted.
* What do_signal knows besides is lost when the thread leaves it for our call, so it is found out, and made up for:
  - A call that the stop has ended with EINTR (epoll_pwait) has lost its first argument: it is the one with which the thread was
    seen asleep before the stop.
  - Whether a sleep with a time limit is continued the kernel says when the thread goes on: then it enters restart_syscall. So it
    goes on as far as that, and is stopped again.
  - A signal that comes meanwhile may have to end the call that was interrupted. So at the end the thread goes on into that call,
    with the signals blocked that come on the way, and finds them there.
* A system call discards SVE's registers beyond the 128 bits that are SIMD's. They are live in a thread that has used them since
  its last system call, as the C library's memcpy does: then they are put back with the general registers, and have a record.
* A system call leaves ZA, ZT0, TPIDR2 and FPMR as they are, and so does a frame without a record of them.
* Of POR_EL0 there must be a record where the machine has it: without one, Linux 6.12 sets it to what its stack held.
* A jump to an instruction that is no landing pad ends a program (BTI) if PSTATE says that it was a jump: BTYPE is cleared.

It has been run on Linux 6.12 in QEMU's emulation of a machine with SVE, pointer authentication, BTI and MTE, and of one without;
on no real machine. SME, permission overlays and guarded control stacks have been seen by its tests' model only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct as packing
from typing import TYPE_CHECKING, Annotated, ClassVar

from dirtylog.errors import UnsupportedError
from dirtylog.linux.arch.architecture import Architecture, Frame, Gadgets
from dirtylog.linux.layout import U16, U32, U64, Struct, offset_of, struct
from dirtylog.linux.ptrace_abi import INTERRUPTED, Event, Request

if TYPE_CHECKING:
    from dirtylog.linux.ptrace import Tracee
    from dirtylog.linux.ptrace_abi import SystemCall

# include/uapi/linux/elf.h
_NT_PRSTATUS = 1
_NT_PRFPREG = 2
_NT_ARM_SVE = 0x405
_NT_ARM_SSVE = 0x40B
_NT_ARM_POE = 0x40F
_NT_ARM_GCS = 0x410

# arch/arm64/include/uapi/asm/ptrace.h
_PSR_MODE32 = 1 << 4
_PSR_BTYPE = 3 << 10
_SVE_PT_REGS_SVE = 1
_FPSIMD_STATE = 528

# arch/arm64/include/uapi/asm/sigcontext.h
_FPSIMD_MAGIC = 0x46508001
_SVE_MAGIC = 0x53564501
_POE_MAGIC = 0x504F4530
_EXTRA_MAGIC = 0x45585401
_RESERVED = 4096
_EXTRA_BYTES = 32
_END = bytes(16)

_SIGFRAME = packing.Struct("<128x QQ QI4xQ Q120x 8x Q31QQQQ 8x")
"""siginfo; uc_flags, uc_link; uc_stack; uc_sigmask; fault_address, x0 to x30, sp, pc, pstate. Then come the records."""
_NO_ALTSTACK = 7  # neither SS_ONSTACK nor SS_DISABLE: the kernel refuses it, and leaves the alternate stack as it is
_SHADOW_STACK_ENABLE = 1  # include/uapi/linux/prctl.h
_NUMBER = 8
_LINK = 30
_SVC, _SVC_MASK, _SVC_BYTES = 0xD4000001, 0xFFE0001F, 4
# futex, nanosleep, clock_nanosleep: which restart_syscall continues
_CONTINUED = frozenset({98, 101, 115})


@struct(272)
class UserRegs(Struct):
    """user_pt_regs."""

    x: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 31]
    sp: U64
    pc: U64
    pstate: U64


@struct(8768)
class SveRegs(Struct):
    """user_sve_header, and room for the longest vectors."""

    size: U32
    max_size: U32
    vl: U16
    max_vl: U16
    flags: U16
    reserved: U16
    data: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 8752]

    @property
    def live(self) -> bool:
        """Whether ``data`` are SVE's registers, and not only those of SIMD."""
        return bool(self.flags & _SVE_PT_REGS_SVE)


@struct(9064)
class ThreadRegs(Struct):
    """The registers that a system call changes, and what must not be, lest there be none."""

    general: UserRegs
    sve: SveRegs
    streaming: U32
    guarded: U32
    number: U64
    """Of the system call in which the thread slept and that has ended, or -1; ``first`` was its first argument."""
    first: U64


class Arm64(Architecture[ThreadRegs]):
    """arm64, programs of 64 bits."""

    elf_machine = 183
    # svc #0; ret. Four bytes alone are found across two instructions, too; the vdso has both where a program has not.
    syscall_instruction = syscall_code = bytes.fromhex("01 00 00 d4 c0 03 5f d6")
    sigreturn_code = bytes.fromhex("68 11 80 d2 01 00 00 d4")  # mov x8, #139; svc #0
    userfaultfd = 282
    close = 57
    tgkill = 131
    # read, pselect6, ppoll, waitid, futex, nanosleep, clock_nanosleep, rt_sigsuspend, wait4
    restartable: ClassVar[frozenset[int]] = frozenset({63, 72, 73, 95, 98, 101, 115, 133, 260})
    # With a timeout: read, write, readv, writev, accept, sendto, recvfrom, sendmsg, recvmsg, accept4, recvmmsg, sendmmsg; and ever:
    # semop, rt_sigtimedwait, io_getevents, semtimedop, epoll_pwait, io_pgetevents, io_uring_enter, epoll_pwait2
    interruptible: ClassVar[frozenset[int]] = frozenset(
        {63, 64, 65, 66, 202, 206, 207, 211, 212, 242, 243, 269, 193, 137, 4, 192, 22, 292, 426, 441}
    )
    alignment = 4

    def save(self, tracee: Tracee) -> ThreadRegs:
        """Return the general registers, and SVE's."""
        general = tracee.registers(UserRegs, _NT_PRSTATUS)
        number, first = _ended_call(general, tracee.slept_in)
        return ThreadRegs(
            general=general,
            number=number,
            first=first,
            sve=_vectors(tracee.raw_registers(_NT_ARM_SVE, ctypes.sizeof(SveRegs))),
            streaming=_vectors(tracee.raw_registers(_NT_ARM_SSVE, offset_of(SveRegs, "data"))).live,
            guarded=int.from_bytes(tracee.raw_registers(_NT_ARM_GCS, 24)[:8], "little") & _SHADOW_STACK_ENABLE,
        )

    def restore(self, tracee: Tracee, registers: ThreadRegs) -> None:
        """Set them, the general ones last: until then the thread can restore itself."""
        if registers.sve.live:
            tracee.set_registers(registers.sve, _NT_ARM_SVE)
        tracee.set_registers(registers.general, _NT_PRSTATUS)

    def refusal(self, registers: ThreadRegs) -> str | None:
        """Return why nothing can be run.

        Of a 32-bit thread a debugger is given its own registers, which are too few to reach the stack pointer.
        """
        if registers.general.pstate & _PSR_MODE32 or not registers.general.sp:
            return "it runs 32-bit code"
        if registers.guarded:
            return "it has a guarded control stack: the return into a signal frame would end it"
        if registers.streaming:
            return "it is in streaming mode (SME), which a system call ends"
        return None

    def program_counter(self, registers: ThreadRegs) -> int:
        """Return pc."""
        return registers.general.pc

    def stack_pointer(self, registers: ThreadRegs) -> int:
        """Return sp."""
        return registers.general.sp

    def interrupted(self, registers: ThreadRegs) -> tuple[int, int]:
        """Return the system call in which it was seen asleep, if it has just returned from it."""
        return ctypes.c_int64(registers.number).value, self.result(registers)

    def again(self, registers: ThreadRegs) -> None:
        """Go back to the instruction, with the argument that the result has replaced."""
        registers.general.x[0] = registers.first
        registers.general.pc -= _SVC_BYTES

    def settle(self, tracee: Tracee, registers: ThreadRegs, memory: int) -> ThreadRegs:
        """Find out whether a sleep is continued: if so, the registers to put back are those of restart_syscall."""
        if registers.general.x[_NUMBER] not in _CONTINUED or not self.before_call(registers, memory):
            return registers
        tracee.resume(Request.SYSCALL)
        stop = tracee.wait()
        while stop.event not in INTERRUPTED:
            tracee.interrupt()
            tracee.resume(sig=stop.signal if stop.event is Event.SIGNAL else 0)
            stop = tracee.wait()
        return self.save(tracee)

    def before_call(self, registers: ThreadRegs, memory: int) -> bool:
        """Return whether it stands at an ``svc``: before the kernel has let it stop, it has set it back there to restart a call."""
        instruction = b""
        with contextlib.suppress(OSError):
            instruction = os.pread(memory, _SVC_BYTES, registers.general.pc)
        return int.from_bytes(instruction, "little") & _SVC_MASK == _SVC

    def frame(self, tracee: Tracee, registers: ThreadRegs, mask: int, gadgets: Gadgets) -> Frame:
        """Lay it right below the stack pointer, as far as sigreturn reads: up to the null record behind the last one.

        If a sleep with a time limit was interrupted at the very instruction that the gadget is, the kernel would take our call for
        its continuation (do_signal): there is none in such a place in a C library, nor in the vdso.
        """
        general = registers.general
        if general.pc == gadgets.syscall:
            raise UnsupportedError(
                f"thread {tracee.tid} of process {tracee.pid} is in the system call that would be used",
                pid=tracee.pid,
                remedy="try again",
            )
        records = _simd(tracee) + _permissions(tracee)
        vectors = _record(registers.sve) if registers.sve.live else b""
        in_place = len(records + vectors + _END) <= _RESERVED
        nbytes = _SIGFRAME.size + len(records + vectors + _END) + (0 if in_place else _EXTRA_BYTES + len(_END))
        address = (general.sp - nbytes) // 16 * 16
        if not in_place:
            extra = address + _SIGFRAME.size + len(records) + _EXTRA_BYTES + len(_END)
            records += packing.pack("<IIQI12x", _EXTRA_MAGIC, _EXTRA_BYTES, extra, len(vectors + _END)) + _END
        stack = (0, _NO_ALTSTACK, 0)
        data = _SIGFRAME.pack(0, 0, *stack, mask, 0, *general.x, general.sp, general.pc, general.pstate)
        return Frame(address, data + records + vectors + _END)

    def call(self, registers: ThreadRegs, gadgets: Gadgets, frame: Frame | None, number: int, argument: int) -> ThreadRegs:
        """Point pc at the gadget, sp at the frame, and the link register, to which the gadget returns, at sigreturn."""
        calling = ThreadRegs(general=registers.general, number=-1)
        general = calling.general
        general.pc = gadgets.syscall
        general.x[_NUMBER], general.x[0], general.x[_LINK] = number, argument % (1 << 64), gadgets.sigreturn
        general.pstate &= ~_PSR_BTYPE
        if frame is not None:
            general.sp = frame.address
        return calling

    def result(self, registers: ThreadRegs) -> int:
        """Return x0."""
        return ctypes.c_int64(registers.general.x[0]).value


def _ended_call(general: UserRegs, call: SystemCall | None) -> tuple[int, int]:
    """Return the number and the first argument of the system call from which a thread has just returned with EINTR, or -1 and 0."""
    if call is None or ctypes.c_int64(general.x[0]).value != -errno.EINTR:
        return -1, 0
    here = (general.x[_NUMBER], *general.x[1:6], general.sp, general.pc)
    same = here == (call.number, *call.arguments[1:], call.stack_pointer, call.program_counter)
    return (call.number, call.arguments[0]) if same else (-1, 0)


def _vectors(regset: bytes) -> SveRegs:
    """Return what a debugger is told of vectors; nothing is, where there are none."""
    return SveRegs.from_buffer_copy(regset.ljust(ctypes.sizeof(SveRegs), b"\0"))


def _simd(tracee: Tracee) -> bytes:
    """Return a fpsimd_context. It has the two status registers first, a debugger's user_fpsimd_state last."""
    state = tracee.raw_registers(_NT_PRFPREG, _FPSIMD_STATE)
    if len(state) != _FPSIMD_STATE:
        raise UnsupportedError(
            f"the floating point state of process {tracee.pid} cannot be had", pid=tracee.pid, remedy="use dirtylog.agent"
        )
    return packing.pack("<II", _FPSIMD_MAGIC, _FPSIMD_STATE) + state[512:520] + state[:512]


def _permissions(tracee: Tracee) -> bytes:
    """Return a poe_context, where the machine has permission overlays."""
    overlays = tracee.raw_registers(_NT_ARM_POE, 8)
    return packing.pack("<II", _POE_MAGIC, 16) + overlays if overlays else b""


def _record(sve: SveRegs) -> bytes:
    """Return a sve_context: 32 registers Z, 16 registers P of an eighth the length, and FFR, as a debugger is given them."""
    registers = bytes(sve.data[: 32 * sve.vl + 17 * sve.vl // 8])
    nbytes = (16 + len(registers) + 15) // 16 * 16
    return (packing.pack("<IIH6x", _SVE_MAGIC, nbytes, sve.vl) + registers).ljust(nbytes, b"\0")

"""A window in a thread of another process in which it makes system calls for us, and by which it may be harmed by nothing.

Neither by an error here, nor by this process's sudden death.

**The argument for safety.** Before one register of the stopped thread is changed, a whole signal frame lies on its stack, below the
red zone: its registers, its signal mask, its floating point state, as the kernel would lay it there for a signal handler. Then the
thread is sent to a system call instruction in its own C library with the stack pointer at that frame, where the address of the
library's sigreturn stands. From now on, whatever becomes of us, the thread makes that one call, returns into sigreturn, and is
where it was; for when a tracer dies the kernel lets its tracees run. What is left then is a descriptor that watches nothing.

As long as we live the thread never gets to the frame: after the call it is stopped again *inside the kernel's signal delivery*, and
there its own registers are put back, so that the kernel restarts a system call that we interrupted in its usual way.

Meanwhile all signals are blocked in that thread: the mask is changed after the frame lies there, which has the old one, and
restored before the registers. Other threads run on: the process as a whole is never stopped.
"""

from __future__ import annotations

import errno
import os
import signal
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

from dirtylog.errors import AccessDeniedError, DirtyLogError, TargetGoneError, UnsupportedError
from dirtylog.linux.arch.architecture import Frame, Gadgets, R
from dirtylog.linux.mappings import Mapping, read_mappings
from dirtylog.linux.preflight import check_has_memory, read_status, status_lines
from dirtylog.linux.ptrace import ALL_SIGNALS, ATTACH_REMEDY
from dirtylog.linux.ptrace_abi import INTERRUPTED, Event, Request, RseqConfiguration, SyscallUserDispatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dirtylog.linux.arch.architecture import Architecture
    from dirtylog.linux.ptrace import Tracee

_SIGNALS = 64
# What pread takes, with room for the section: behind it are the kernel's addresses.
_LARGEST_OFFSET = (1 << 63) - 1 - 32
_MASKS = ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt")
_IGNORED_BY_DEFAULT = sum(1 << sig - 1 for sig in (signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH))


class Code(NamedTuple):
    """What an injection needs of the target: where it has the code, and its mappings."""

    gadgets: Gadgets
    mappings: list[Mapping]


class TryAnotherError(UnsupportedError):
    """This thread cannot take a system call just now; another may, or this one a little later."""


@contextmanager
def open_memory(pid: int) -> Iterator[int]:
    """Give a descriptor of /proc/PID/mem for reading and writing. What fails meanwhile as a :class:`OSError` is an access to it."""
    try:
        memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise TargetGoneError(f"there is no process {pid}", pid=pid) from error
    except OSError as error:
        raise AccessDeniedError(f"may not attach to process {pid}", errno=error.errno, pid=pid, remedy=ATTACH_REMEDY) from error
    try:
        yield memory
    except OSError as error:
        raise DirtyLogError(
            f"cannot read or write memory of process {pid}", errno=error.errno, pid=pid, reason=str(error), remedy="try again"
        ) from error
    finally:
        os.close(memory)


def find_code(pid: int, architecture: Architecture[Any], memory: int, *, begun: bool = True) -> Code:
    """Return where the target has the code that is needed: in its C library, or in itself if it is linked statically.

    Of a program that has not ``begun`` a system call is enough, which the vdso has, too.
    """
    found: dict[bytes, int] = {}
    mappings = read_mappings(pid)
    texts = [one for one in mappings if one.permissions == "r-xp"]
    for mapping in sorted(texts, key=lambda one: "libc" not in one.name):
        text = os.pread(memory, mapping.end - mapping.start, mapping.start)
        for code in (architecture.syscall_code, architecture.sigreturn_code):
            offset = _place(text, code, architecture.alignment)
            if offset >= 0:
                found.setdefault(code, mapping.start + offset)
        if not begun and (offset := _place(text, architecture.syscall_instruction, architecture.alignment)) >= 0:
            return Code(Gadgets(mapping.start + offset, 0), mappings)
        if len(found) == len(Gadgets._fields):
            return Code(Gadgets(found[architecture.syscall_code], found[architecture.sigreturn_code]), mappings)
    check_has_memory(pid, read_status(pid))
    raise UnsupportedError(
        f"process {pid} has no C library that is known here",
        pid=pid,
        reason="no system call, or no return from a signal handler, was found in it",
        remedy="let it run dirtylog.agent, or use port compare",
    )


def _place(text: bytes, code: bytes, alignment: int) -> int:
    """Return the offset of code, or -1. Bytes like it may lie across two instructions."""
    offset = text.find(code)
    while offset >= 0 and offset % alignment:
        offset = text.find(code, offset + 1)
    return offset


class CallWindow(Generic[R]):
    """A stopped thread, made ready for system calls on entry, and put back on exit as it was.

    ``memory`` is a descriptor of its memory, opened after it was stopped. ``self_restoring`` is False only for a program that has
    not begun, and that ends with us.
    """

    def __init__(
        self, tracee: Tracee, architecture: Architecture[R], code: Code, memory: int, *, self_restoring: bool = True
    ) -> None:
        self.tracee = tracee
        self.architecture = architecture
        self.code = code
        self.memory = memory
        self.left: int | None = None
        """A descriptor that has been made in the target and is not closed there yet."""
        self._self_restoring = self_restoring
        self._saved: R = architecture.settle(tracee, architecture.save(tracee), memory)
        self._mask = tracee.signal_mask()
        self._frame: Frame | None = None
        self._ended: R | None = None
        """The registers of a call that the stop has ended, and that is made again."""
        self._below = b""

    def __enter__(self) -> CallWindow[R]:
        tracee, architecture = self.tracee, self.architecture
        self._check()
        self._ended = make_again(tracee, architecture, self._saved)
        if self._self_restoring:
            frame = architecture.frame(tracee, self._saved, self._mask, self.code.gadgets)
            self._check_stack(frame)
            self._below = os.pread(self.memory, len(frame.data), frame.address)
            os.pwrite(self.memory, frame.data, frame.address)
            self._frame = frame
        # If we die right here, it closes nothing, and goes on.
        architecture.restore(tracee, architecture.call(self._saved, self.code.gadgets, self._frame, architecture.close, -1))
        tracee.set_signal_mask(ALL_SIGNALS)
        return self

    def call(self, number: int, argument: int) -> int:
        """Make a system call in the thread, and return its result."""
        tracee, architecture = self.tracee, self.architecture
        architecture.restore(tracee, architecture.call(self._saved, self.code.gadgets, self._frame, number, argument))
        tracee.wait_for(Event.SYSCALL, request=Request.SYSCALL)
        tracee.wait_for(Event.SYSCALL, request=Request.SYSCALL)
        return architecture.result(architecture.save(tracee))

    def __exit__(self, *_: object) -> None:
        tracee = self.tracee
        tracee.interrupt()
        stopped = tracee.wait_for(*INTERRUPTED, request=Request.CONT) is Event.GROUP
        tracee.set_signal_mask(self._mask)
        self.architecture.restore(tracee, self._saved)
        if self._frame is not None:
            os.pwrite(self.memory, self._below, self._frame.address)
        if stopped:
            return
        if self._ended is not None:
            enter_call(tracee, self._mask, partial(self.architecture.restore, tracee, self._ended))
        elif self.architecture.before_call(self._saved, self.memory):
            enter_call(tracee, self._mask)

    def _check(self) -> None:
        if self._self_restoring:
            self._check_code()
        tracee, counter = self.tracee, self.architecture.program_counter(self._saved)
        refusal = self.architecture.refusal(self._saved)
        if refusal is not None:
            raise TryAnotherError(f"thread {tracee.tid}: {refusal}")
        dispatch = tracee.configuration(Request.GET_SYSCALL_USER_DISPATCH_CONFIG, SyscallUserDispatch)
        if dispatch is not None and dispatch.mode:
            raise TryAnotherError(f"thread {tracee.tid} handles system calls itself (syscall user dispatch)")
        rseq = tracee.configuration(Request.GET_RSEQ_CONFIGURATION, RseqConfiguration)
        if rseq is not None and rseq.rseq_abi_pointer and _in_critical_section(self.memory, rseq.rseq_abi_pointer, counter):
            raise TryAnotherError(f"thread {tracee.tid} is in a restartable sequence")

    def _check_code(self) -> None:
        """See that what was found is still there: before the thread was stopped, it may have executed another program."""
        places = zip(self.code.gadgets, (self.architecture.syscall_code, self.architecture.sigreturn_code), strict=True)
        if any(os.pread(self.memory, len(code), address) != code for address, code in places):
            raise TryAnotherError(f"process {self.tracee.pid} executes another program")

    def _check_stack(self, frame: Frame) -> None:
        top = self.architecture.stack_pointer(self._saved)
        # As they were a moment ago: to read them anew would lengthen the stop, and is done where a stack has grown meanwhile.
        if not _has_room(self.code.mappings, frame.address, top) and not _has_room(
            read_mappings(self.tracee.pid), frame.address, top
        ):
            raise TryAnotherError(f"thread {self.tracee.tid} has no room on its stack for a signal frame")


def _has_room(mappings: list[Mapping], bottom: int, top: int) -> bool:
    return any(one.start <= bottom and top <= one.end and one.permissions[1] == "w" for one in mappings)


def make_again(tracee: Tracee, architecture: Architecture[R], registers: R) -> R | None:
    """Change registers so that a system call is made again, if a stop has ended it, and no signal has; return what they were."""
    number, result = architecture.interrupted(registers)
    if number not in architecture.interruptible or result != -errno.EINTR or has_signal(tracee):
        return None
    ended = type(registers).from_buffer_copy(registers)
    architecture.again(registers)
    return ended


def enter_call(tracee: Tracee, mask: int, end: Callable[[], None] | None = None) -> None:
    """Have a thread that stands before a system call enter it, and let it run there, with this signal mask.

    A signal that came just before would not end the call, which may have no other end. So the call is not made: ``end`` puts the
    registers back with which it has ended. Without one the signal is blocked until the call is entered: the kernel queues it again
    (ptrace_signal in kernel/signal.c). To be let go in the call, instead of to run, would end it, too. Where the whole process is
    being stopped, the thread stays before the call.
    """
    tracee.resume(Request.SYSCALL)
    while (stop := tracee.wait()).event is not Event.SYSCALL:
        if stop.event is Event.GROUP:
            tracee.set_signal_mask(mask)
            return
        sig = stop.signal if stop.event is Event.SIGNAL else 0
        if sig and not _is_ignored(sig, _signals(tracee)):
            if end is not None:
                end()
                tracee.let_run(sig)
                return
            tracee.set_signal_mask(ALL_SIGNALS)
        tracee.resume(Request.SYSCALL, sig)
    tracee.set_signal_mask(mask)
    tracee.let_run()


def has_signal(tracee: Tracee) -> bool:
    """Return whether a signal waits that the thread does not block: then it was this that interrupted it."""
    masks = _signals(tracee)
    waiting = (masks["SigPnd"] | masks["ShdPnd"]) & ~masks["SigBlk"]
    return any(waiting >> sig - 1 & 1 and not _is_ignored(sig, masks) for sig in range(1, _SIGNALS + 1))


def _signals(tracee: Tracee) -> dict[str, int]:
    """Return the sets of signals that the kernel shows of a thread, one bit each."""
    lines = status_lines(Path(f"/proc/{tracee.pid}/task/{tracee.tid}/status"))
    return {key: int(value, 16) for key, _, value in (line.partition(":\t") for line in lines) if key in _MASKS}


def _is_ignored(sig: int, masks: dict[str, int]) -> bool:
    """Return whether nothing comes of a signal, not even an end of the system call: only a tracer is told of it."""
    return bool((masks["SigIgn"] | (_IGNORED_BY_DEFAULT & ~masks["SigCgt"])) >> sig - 1 & 1)


def _in_critical_section(memory: int, rseq: int, counter: int) -> bool:
    """Return whether a thread is in a restartable sequence (struct rseq_cs), which another program counter would end."""
    section = int.from_bytes(os.pread(memory, 8, rseq + 8), "little")
    if not 0 < section <= _LARGEST_OFFSET:
        return False
    start, length = (int.from_bytes(os.pread(memory, 8, section + offset), "little") for offset in (8, 16))
    return 0 <= counter - start < length

"""One system call in another process, which may be harmed by nothing: not by an error here, nor by this process's sudden death.

All that has to run in the target is ``userfaultfd(2)``, for a userfaultfd belongs to the address space of who creates it, and
``close(2)``; both take integers only. The rest is done from outside, on a copy of the descriptor.

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

import ctypes
import errno
import os
import signal
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, TypeVar

from dirtylog.errors import AccessDeniedError, DirtyLogError, TargetGoneError, UnsupportedError
from dirtylog.linux import abi
from dirtylog.linux.arch import host_architecture
from dirtylog.linux.arch.architecture import Architecture, Frame, Gadgets, R
from dirtylog.linux.mappings import Mapping, read_mappings
from dirtylog.linux.preflight import check_process, threads_by_preference
from dirtylog.linux.ptrace import ALL_SIGNALS, ATTACH_REMEDY, Event, Option, Request, RseqConfiguration, SyscallUserDispatch, Tracee
from dirtylog.linux.signals import block_signals
from dirtylog.linux.userfaultfd import FLAGS, Userfaultfd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

_ATTEMPTS = 8
_MASKS = ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt")
_IGNORED_BY_DEFAULT = sum(1 << sig - 1 for sig in (signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH))
_libc = ctypes.CDLL(None, use_errno=True)


class Code(NamedTuple):
    """What an injection needs of the target: a descriptor of its memory, where it has the code, and its mappings."""

    memory: int
    gadgets: Gadgets
    mappings: list[Mapping]


class _TryAnotherError(Exception):
    """This thread cannot take a system call just now; another may, or this one a little later."""


def inject_userfaultfd(pid: int) -> Userfaultfd:
    """Return a userfaultfd of another process, enabled. One of its threads is stopped for about a millisecond.

    Raises :class:`TargetGoneError`, :class:`AccessDeniedError`, and :class:`UnsupportedError` with the reason why this process
    cannot be attached to without harm.
    """
    architecture = host_architecture()
    uffd = in_a_thread_of_its_own(lambda: _inject(pid, architecture))
    try:
        uffd.enable()
    except BaseException:
        uffd.close()
        raise
    return uffd


def in_a_thread_of_its_own(call: Callable[[], T]) -> T:
    """Call in a thread in which no signal is handled, and wait for it, come what may.

    A tracee belongs to the thread that seized it: when the thread ends it is let go, whatever went wrong before. A Ctrl-C is
    handled by the main thread, which waits here: so it comes after the call.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        block_signals()
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - it is raised again, in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, name="dirtylog-ptrace")
    thread.start()
    interrupt: BaseException | None = None
    while thread.is_alive():
        try:
            thread.join()
        except BaseException as error:  # noqa: BLE001 - raised below: what the call has done must not be left alone
            interrupt = error
    if interrupt is not None:
        for result in results:
            if isinstance(result, Userfaultfd):
                result.close()
        raise interrupt
    if errors:
        raise errors[0]
    return results[0]


def _inject(pid: int, architecture: Architecture[Any]) -> Userfaultfd:
    status = check_process(pid, architecture)
    options = Option.TRACESYSGOOD | (Option.SUSPEND_SECCOMP if status.seccomp else Option.NONE)
    reason = ""
    with open_memory(pid) as memory:
        code = find_code(pid, architecture, memory)
        for _ in range(_ATTEMPTS):
            for tid in threads_by_preference(pid, architecture):
                window: CallWindow[Any] | None = None
                try:
                    with _seized(pid, tid, options, has_filter=status.seccomp) as tracee:
                        window = CallWindow(tracee, architecture, code)
                        return take_userfaultfd(window)
                except _TryAnotherError as error:
                    reason = str(error)
                except BaseException:
                    if window is not None and window.left is not None:
                        _close_left(window, options, has_filter=status.seccomp)
                    raise
    raise UnsupportedError(f"no thread of process {pid} can take a system call", pid=pid, reason=reason, remedy="try again")


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
            return Code(memory, Gadgets(mapping.start + offset, 0), mappings)
        if len(found) == len(Gadgets._fields):
            return Code(memory, Gadgets(found[architecture.syscall_code], found[architecture.sigreturn_code]), mappings)
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


@contextmanager
def open_memory(pid: int) -> Iterator[int]:
    """Give a descriptor of /proc/PID/mem for reading and writing."""
    try:
        memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise TargetGoneError(f"there is no process {pid}", pid=pid) from error
    except OSError as error:
        raise AccessDeniedError(f"may not attach to process {pid}", errno=error.errno, pid=pid, remedy=ATTACH_REMEDY) from error
    try:
        yield memory
    finally:
        os.close(memory)


@contextmanager
def _seized(pid: int, tid: int, options: Option, *, has_filter: bool) -> Iterator[Tracee]:
    try:
        tracee = Tracee(pid, tid, options)
    except TargetGoneError as error:
        raise _TryAnotherError(f"thread {tid} has ended") from error
    except DirtyLogError as error:
        if has_filter:
            raise UnsupportedError(
                f"process {pid} filters its system calls (seccomp)",
                pid=pid,
                reason=f"userfaultfd might end it, and the filter cannot be suspended: {error.reason}",
                remedy="be root with CAP_SYS_ADMIN, or let the program run dirtylog.agent",
            ) from error
        raise
    tracee.stop()
    try:
        yield tracee
    finally:
        tracee.detach()


class CallWindow(Generic[R]):
    """A stopped thread, made ready for system calls on entry, and put back on exit as it was.

    ``self_restoring`` is False only for a program that has not begun, and that ends with us.
    """

    def __init__(self, tracee: Tracee, architecture: Architecture[R], code: Code, *, self_restoring: bool = True) -> None:
        self.tracee = tracee
        self.architecture = architecture
        self.code = code
        self.left: int | None = None
        """A descriptor that has been made in the target and is not closed there yet."""
        self._self_restoring = self_restoring
        self._saved: R = architecture.settle(tracee, architecture.save(tracee), code.memory)
        self._mask = tracee.signal_mask()
        self._frame: Frame | None = None
        self._below = b""

    def __enter__(self) -> CallWindow[R]:
        tracee, architecture = self.tracee, self.architecture
        self._check()
        number, result = architecture.interrupted(self._saved)
        if number in architecture.interruptible and result == -errno.EINTR and not has_signal(tracee):
            architecture.again(self._saved)
        if self._self_restoring:
            frame = architecture.frame(tracee, self._saved, self._mask, self.code.gadgets)
            self._check_stack(frame)
            self._below = os.pread(self.code.memory, len(frame.data), frame.address)
            os.pwrite(self.code.memory, frame.data, frame.address)
            self._frame = frame
        # If we die right here, it closes nothing, and goes on.
        architecture.restore(tracee, architecture.call(self._saved, self.code.gadgets, self._frame, architecture.close, -1))
        tracee.set_signal_mask(ALL_SIGNALS)
        return self

    def call(self, number: int, argument: int) -> int:
        """Make a system call in the thread, and return its result."""
        tracee, architecture = self.tracee, self.architecture
        architecture.restore(tracee, architecture.call(self._saved, self.code.gadgets, self._frame, number, argument))
        tracee.wait_for(Event.SYSCALL, Request.SYSCALL)
        tracee.wait_for(Event.SYSCALL, Request.SYSCALL)
        return architecture.result(architecture.save(tracee))

    def __exit__(self, *_: object) -> None:
        tracee = self.tracee
        tracee.interrupt()
        tracee.wait_for(Event.TRAP, Request.CONT)
        tracee.set_signal_mask(self._mask)
        self.architecture.restore(tracee, self._saved)
        if self._frame is not None:
            os.pwrite(self.code.memory, self._below, self._frame.address)
        self.architecture.release(tracee, self._saved, self.code.memory, self._mask)

    def _check(self) -> None:
        tracee, counter = self.tracee, self.architecture.program_counter(self._saved)
        refusal = self.architecture.refusal(self._saved)
        if refusal is not None:
            raise _TryAnotherError(f"thread {tracee.tid}: {refusal}")
        dispatch = tracee.configuration(Request.GET_SYSCALL_USER_DISPATCH_CONFIG, SyscallUserDispatch)
        if dispatch is not None and dispatch.mode:
            raise _TryAnotherError(f"thread {tracee.tid} handles system calls itself (syscall user dispatch)")
        rseq = tracee.configuration(Request.GET_RSEQ_CONFIGURATION, RseqConfiguration)
        if rseq is not None and rseq.rseq_abi_pointer and _in_critical_section(self.code.memory, rseq.rseq_abi_pointer, counter):
            raise _TryAnotherError(f"thread {tracee.tid} is in a restartable sequence")

    def _check_stack(self, frame: Frame) -> None:
        top = self.architecture.stack_pointer(self._saved)
        # As they were a moment ago: to read them anew would lengthen the stop, and is done where a stack has grown meanwhile.
        if not _has_room(self.code.mappings, frame.address, top) and not _has_room(
            read_mappings(self.tracee.pid), frame.address, top
        ):
            raise _TryAnotherError(f"thread {self.tracee.tid} has no room on its stack for a signal frame")


def _has_room(mappings: list[Mapping], bottom: int, top: int) -> bool:
    return any(one.start <= bottom and top <= one.end and one.permissions[1] == "w" for one in mappings)


def take_userfaultfd(window: CallWindow[Any]) -> Userfaultfd:
    """Make a userfaultfd in the thread of ``window``, take a copy of it, and close the original.

    It must be closed there before anything is registered: else the registration would outlive us.
    """
    pid, architecture = window.tracee.pid, window.architecture
    uffd: Userfaultfd | None = None
    try:
        with window:
            fd = window.call(architecture.userfaultfd, FLAGS)
            if fd < 0:
                _raise_refused(pid, -fd)
            window.left = fd
            uffd = Userfaultfd(_copy_of(pid, fd))
            closed = window.call(architecture.close, fd)
            if closed < 0:
                _raise_refused(pid, -closed)
            window.left = None
    except BaseException:
        if uffd is not None:
            uffd.close()
        raise
    return uffd


def _close_left(window: CallWindow[Any], options: Option, *, has_filter: bool) -> None:
    """Close what a failure has left in the target, by a second call; if that fails too, it is a descriptor that watches nothing."""
    pid, architecture = window.tracee.pid, window.architecture
    with suppress(DirtyLogError, OSError, _TryAnotherError):
        for tid in threads_by_preference(pid, architecture)[:1]:
            with _seized(pid, tid, options, has_filter=has_filter) as tracee:
                again = CallWindow(tracee, architecture, window.code)
                with again:
                    again.call(architecture.close, window.left or -1)


def _raise_refused(pid: int, code: int) -> NoReturn:
    name = errno.errorcode.get(code, str(code))
    remedies = {
        errno.EMFILE: "it has as many open files as it may: raise its RLIMIT_NOFILE (prlimit --nofile)",
        errno.EPERM: "a security module refuses it: allow userfaultfd for this program, or use port compare",
        errno.ENOSYS: "the kernel has none: use Linux 6.7 or later, or port compare",
    }
    kind = AccessDeniedError if code == errno.EPERM else UnsupportedError
    raise kind(f"process {pid} can have no userfaultfd", errno=code, pid=pid, reason=name, remedy=remedies.get(code))


def _copy_of(pid: int, fd: int) -> int:
    """Return a copy of another process's descriptor (pidfd_getfd, Linux 5.6)."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise TargetGoneError(f"process {pid} is gone", pid=pid) from error
    try:
        # Safe: integers only.
        copy = int(_libc.syscall(abi.PIDFD_GETFD, pidfd, fd, 0))
        if copy < 0:
            code = ctypes.get_errno()
            raise AccessDeniedError(
                f"cannot take a descriptor of process {pid}",
                errno=code,
                pid=pid,
                reason=f"pidfd_getfd says {errno.errorcode.get(code)}",
                remedy=ATTACH_REMEDY,
            )
        return copy
    finally:
        os.close(pidfd)


def has_signal(tracee: Tracee) -> bool:
    """Return whether a signal waits that the thread does not block: then it was this that interrupted it."""
    lines = Path(f"/proc/{tracee.pid}/task/{tracee.tid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    masks = {key: int(value, 16) for key, _, value in (line.partition(":\t") for line in lines) if key in _MASKS}
    ignored = masks["SigIgn"] | (_IGNORED_BY_DEFAULT & ~masks["SigCgt"])
    return bool((masks["SigPnd"] | masks["ShdPnd"]) & ~masks["SigBlk"] & ~ignored)


def _in_critical_section(memory: int, rseq: int, counter: int) -> bool:
    """Return whether a thread is in a restartable sequence (struct rseq_cs), which another program counter would end."""
    section = int.from_bytes(os.pread(memory, 8, rseq + 8), "little")
    if not section:
        return False
    start, length = (int.from_bytes(os.pread(memory, 8, section + offset), "little") for offset in (8, 16))
    return 0 <= counter - start < length

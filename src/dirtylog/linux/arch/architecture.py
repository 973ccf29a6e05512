"""What an instruction set must say of itself, so that a system call can be made in another process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Generic, NamedTuple, TypeVar

from dirtylog.linux.layout import Struct

if TYPE_CHECKING:
    from dirtylog.linux.ptrace import Tracee

R = TypeVar("R", bound=Struct)

ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516
"""What a system call that a stop interrupted has for its result, until the kernel restarts it. Source: include/linux/errno.h."""


class Gadgets(NamedTuple):
    """Addresses of code that the target has anyway: a system call that returns, and the return from a signal handler."""

    syscall: int
    sigreturn: int


class Frame(NamedTuple):
    """A signal frame: what lies at ``address`` on the stack, so that the return from a signal handler restores the thread."""

    address: int
    data: bytes


class Architecture(ABC, Generic[R]):
    """One instruction set; ``R`` are its general registers."""

    elf_machine: ClassVar[int]
    syscall_instruction: ClassVar[bytes]
    syscall_code: ClassVar[bytes]
    """A system call, followed by a return from the function."""
    sigreturn_code: ClassVar[bytes]
    """What the C library has a signal handler return to."""
    alignment: ClassVar[int] = 1
    """Of an instruction, in bytes."""
    userfaultfd: ClassVar[int]
    close: ClassVar[int]
    tgkill: ClassVar[int]
    restartable: ClassVar[frozenset[int]]
    """System calls that sleep, and go on after a stop as if nothing had been."""
    interruptible: ClassVar[frozenset[int]]
    """System calls that end with EINTR after any stop, and that may be made again."""

    @abstractmethod
    def save(self, tracee: Tracee) -> R:
        """Return the general registers."""

    @abstractmethod
    def restore(self, tracee: Tracee, registers: R) -> None:
        """Set them."""

    @abstractmethod
    def refusal(self, registers: R) -> str | None:
        """Return why nothing can be run with these registers, or None."""

    @abstractmethod
    def program_counter(self, registers: R) -> int:
        """Return the address of the next instruction."""

    @abstractmethod
    def stack_pointer(self, registers: R) -> int:
        """Return the stack pointer."""

    @abstractmethod
    def interrupted(self, registers: R) -> tuple[int, int]:
        """Return the number of the system call that the thread is in, or -1, and its result."""

    @abstractmethod
    def again(self, registers: R) -> None:
        """Change registers after a system call so that it is made again."""

    def settle(self, tracee: Tracee, registers: R, memory: int) -> R:  # noqa: ARG002 - for those whose registers tell less
        """Return registers of a thread that has just been stopped, with which it can be put back without a loss.

        Where they do not tell all, the thread may have to run a little, and be stopped again. ``memory`` is a descriptor of its
        process's memory.
        """
        return registers

    def before_call(self, registers: R, memory: int) -> bool:  # noqa: ARG002 - for those whose kernel does not restart the call itself
        """Return whether a thread with these registers makes a system call next, whose like was interrupted."""
        return False

    @abstractmethod
    def frame(self, tracee: Tracee, registers: R, mask: int, gadgets: Gadgets) -> Frame:
        """Return a frame whose sigreturn gives the thread these registers, this signal mask, and its floating point state."""

    @abstractmethod
    def call(self, registers: R, gadgets: Gadgets, frame: Frame | None, number: int, argument: int) -> R:
        """Return registers that make a system call, and after it go on into the frame."""

    @abstractmethod
    def result(self, registers: R) -> int:
        """Return the result of a system call."""

"""ptrace(2) in names: requests, options, and how a stop shows.

Source: Linux include/uapi/linux/ptrace.h, include/linux/sched/jobctl.h, and ptrace(2).
"""

from __future__ import annotations

import enum
import os
import signal
from typing import NamedTuple

from dirtylog.linux.layout import U32, U64, Struct, struct

WALL = 0x40000000
WAIT = WALL | 0x20000000
"""__WALL and __WNOTHREAD, of wait: threads that are no children, but only this thread's: no other's stops are taken away."""
PEEK = WAIT | os.WEXITED | os.WSTOPPED | os.WNOWAIT
"""Of waitid: what a tracee has come to, without taking it.

A stop that has been taken has no signal any more (wait_task_stopped in kernel/exit.c): were we to die then, it would be lost.
"""
STOPPED = (4, 5)
"""CLD_TRAPPED and CLD_STOPPED: what si_code is of a stop."""
_EVENT_STOP = 128
_SYSCALL_SIGNAL = signal.SIGTRAP | 0x80


class Request(enum.IntEnum):
    """PTRACE_*."""

    CONT = 7
    DETACH = 17
    SYSCALL = 24
    SETOPTIONS = 0x4200
    GETSIGINFO = 0x4202
    GETREGSET = 0x4204
    SETREGSET = 0x4205
    SEIZE = 0x4206
    INTERRUPT = 0x4207
    LISTEN = 0x4208
    GETSIGMASK = 0x420A
    SETSIGMASK = 0x420B
    GET_RSEQ_CONFIGURATION = 0x420F
    GET_SYSCALL_USER_DISPATCH_CONFIG = 0x4211


class Option(enum.IntFlag):
    """PTRACE_O_*."""

    NONE = 0
    TRACESYSGOOD = 1
    TRACEEXEC = 1 << 4
    TRACEEXIT = 1 << 6
    EXITKILL = 1 << 20
    SUSPEND_SECCOMP = 1 << 21


class Event(enum.IntEnum):
    """Why a tracee stopped."""

    SIGNAL = 0
    EXEC = 4
    EXIT = 6
    TRAP = _EVENT_STOP
    """After PTRACE_INTERRUPT."""
    GROUP = _EVENT_STOP + 1
    """A job-control stop of the whole process."""
    SYSCALL = _EVENT_STOP + 2


INTERRUPTED = (Event.TRAP, Event.GROUP)
"""How an interruption shows, the latter where the whole process is stopped; both in the midst of the delivery of signals."""


class Stop(NamedTuple):
    """A stop: why, and with which signal."""

    event: Event
    signal: int


class SystemCall(NamedTuple):
    """A system call in which a thread sleeps: what /proc/PID/task/TID/syscall says."""

    number: int
    arguments: tuple[int, ...]
    stack_pointer: int
    program_counter: int


@struct(24)
class RseqConfiguration(Struct):
    """ptrace_rseq_configuration."""

    rseq_abi_pointer: U64
    rseq_abi_size: U32
    signature: U32
    flags: U32
    pad: U32


@struct(32)
class SyscallUserDispatch(Struct):
    """ptrace_sud_config."""

    mode: U64
    selector: U64
    offset: U64
    len: U64


def stop_of(status: int) -> Stop:
    """Return what the si_status of waitid says of a tracee that has stopped."""
    sig, event = status & 0xFF, status >> 8
    if event == _EVENT_STOP:
        return Stop(Event.TRAP if sig == signal.SIGTRAP else Event.GROUP, sig)
    if sig == _SYSCALL_SIGNAL:
        return Stop(Event.SYSCALL, sig)
    return Stop(Event(event), sig) if event in (Event.EXEC, Event.EXIT) else Stop(Event.SIGNAL, sig)

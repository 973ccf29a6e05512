"""Why a vCPU left the guest: what KVM_RUN came back with, one frozen type a reason."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from dirtylog.kvm import abi
from dirtylog.kvm.abi import ExitReason
from dirtylog.linux.layout import offset_of

if TYPE_CHECKING:
    import mmap

    from dirtylog.linux.layout import Struct

_EXIT_OFFSET = ctypes.sizeof(abi.RunHeader)


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A kick or a signal; the guest goes on at the next run."""


@dataclass(frozen=True, slots=True)
class Halted:
    """The guest executed its halt instruction, and no interrupt controller in the kernel waits for it."""


@dataclass(frozen=True, slots=True)
class IoAccess:
    """An instruction of x86 that reads or writes an I/O port: ``count`` items of ``size`` bytes.

    Of an out, ``data`` is what the guest wrote. An in is answered with :meth:`KvmVcpu.answer` before the next run.
    """

    port: int
    is_write: bool
    size: int
    count: int
    data: bytes


@dataclass(frozen=True, slots=True)
class MmioAccess:
    """An access to a guest-physical address that no slot answers (or a write to a read-only slot).

    Of a write, ``data`` is what the guest wrote. A read is answered with :meth:`KvmVcpu.answer` before the next run.
    """

    address: int
    is_write: bool
    size: int
    data: bytes


@dataclass(frozen=True, slots=True)
class DirtyRingFull:
    """The vCPU's dirty ring has reached its soft limit: it will not run before entries are harvested and reset."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """The guest faulted while it handled a fault that it got while it handled a fault."""


@dataclass(frozen=True, slots=True)
class FailEntry:
    """The hardware refused the state that the vCPU was given."""

    reason: int
    cpu: int


@dataclass(frozen=True, slots=True)
class InternalError:
    """KVM could not go on, most often at an instruction that it had to emulate and cannot (suberror 1)."""

    suberror: int
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SystemEvent:
    """The guest asked for a shutdown (1), a reset (2), or reported a crash (3)."""

    event: int
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OtherExit:
    """A reason that dirtylog has no type for."""

    reason: int


Exit = Interrupted | Halted | IoAccess | MmioAccess | DirtyRingFull | Shutdown | FailEntry | InternalError | SystemEvent | OtherExit

_PLAIN: dict[int, Exit] = {
    ExitReason.HLT: Halted(),
    ExitReason.INTR: Interrupted(),
    ExitReason.DIRTY_RING_FULL: DirtyRingFull(),
    ExitReason.SHUTDOWN: Shutdown(),
}

_S = TypeVar("_S", bound="Struct")


def decode_exit(run: mmap.mmap, reason: int) -> Exit:
    """Return what a run page says of the exit that just happened."""
    plain = _PLAIN.get(reason)
    if plain is not None:
        return plain
    if reason == ExitReason.IO:
        io = _payload(run, abi.RunIo)
        nbytes = io.size * io.count
        return IoAccess(io.port, bool(io.direction), io.size, io.count, run[io.data_offset : io.data_offset + nbytes])
    if reason == ExitReason.MMIO:
        mmio = _payload(run, abi.RunMmio)
        return MmioAccess(mmio.phys_addr, bool(mmio.is_write), mmio.len, bytes(mmio.data[: mmio.len]))
    if reason == ExitReason.FAIL_ENTRY:
        entry = _payload(run, abi.RunFailEntry)
        return FailEntry(entry.hardware_entry_failure_reason, entry.cpu)
    if reason in (ExitReason.INTERNAL_ERROR, ExitReason.SYSTEM_EVENT):
        internal = _payload(run, abi.RunInternalError)
        data = tuple(internal.data[: min(internal.ndata, len(internal.data))])
        return (
            InternalError(internal.suberror, data) if reason == ExitReason.INTERNAL_ERROR else SystemEvent(internal.suberror, data)
        )
    return OtherExit(reason)


def answer_exit(run: mmap.mmap, access: IoAccess | MmioAccess, data: bytes) -> None:
    """Put the answer to a read where the next KVM_RUN takes it from; shorter than asked, the rest is zeros."""
    if isinstance(access, IoAccess):
        offset, nbytes = _payload(run, abi.RunIo).data_offset, access.size * access.count
    else:
        offset, nbytes = _EXIT_OFFSET + offset_of(abi.RunMmio, "data"), access.size
    run[offset : offset + nbytes] = data[:nbytes].ljust(nbytes, b"\0")


def _payload(run: mmap.mmap, kind: type[_S]) -> _S:
    # A copy: a view would keep the run page from being unmapped.
    return kind.from_buffer_copy(run, _EXIT_OFFSET)

"""A KVM vCPU as what a vCPU thread runs, and what becomes of its exits."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

from dirtylog.errors import GuestFaultError
from dirtylog.guests.cpu import CpuExit
from dirtylog.kvm.exits import (
    DirtyRingFull,
    Exit,
    FailEntry,
    Halted,
    InternalError,
    Interrupted,
    IoAccess,
    MmioAccess,
    Shutdown,
    SystemEvent,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from dirtylog.guests.cpu import Service
    from dirtylog.kvm.arch.architecture import Architecture, ReadyState
    from dirtylog.kvm.bus import Bus
    from dirtylog.kvm.statistics import KvmStatistics
    from dirtylog.kvm.system import KvmSystem
    from dirtylog.kvm.vcpu import KvmVcpu

_CANNOT_EMULATE = 1
_COMPLETE = (Interrupted, Halted, DirtyRingFull)
"""Exits after which the registers are as the guest left them."""


class KvmCpu:
    """A :class:`~dirtylog.guests.cpu.Cpu` over a :class:`KvmVcpu`.

    ``ring_full`` makes room in the dirty ring. ``exits`` counts how often the guest was left for this process.
    """

    def __init__(
        self, system: KvmSystem, vcpu: KvmVcpu, architecture: Architecture, bus: Bus, ring_full: Callable[[int], None]
    ) -> None:
        self.vcpu = vcpu
        self.exits = 0
        self.statistics: KvmStatistics | None = None
        """What the kernel counts of it; None where it does not."""
        self.initial: object = None
        """The state that a reset sets it to."""
        self._system = system
        self._architecture = architecture
        self._bus = bus
        self._ring_full = ring_full
        # Whether the last exit may have left an access to be completed by the next run.
        self._left_access = True

    @property
    def pc(self) -> int:
        """Address of the next instruction; not while it runs."""
        return self._architecture.pc(self.vcpu)

    def run(self) -> CpuExit | Service:
        """Run the guest until it halts, is stopped, or waits for a service: room in its ring, or a device."""
        reason = self.vcpu.run()
        self.exits += 1
        self._left_access = not isinstance(reason, _COMPLETE)
        match reason:
            case Interrupted():
                return CpuExit.STOPPED
            case Halted():
                return CpuExit.HALTED
            case DirtyRingFull():
                return partial(self._ring_full, self.vcpu.index)
            case IoAccess() | MmioAccess():
                return partial(self._serve, reason)
        raise self._fault(reason)

    def stop(self) -> None:
        """Make :meth:`run` return at once. A call that comes before it is not lost."""
        self.vcpu.kick()

    def flush_tlb(self) -> None:
        """Do nothing: the kernel flushes before its calls return. To have left the guest is what empties hardware buffers."""

    # --- state

    @property
    def kind(self) -> str:
        """Whose registers these are."""
        return f"KVM {self._architecture.isa}"

    def registers(self) -> dict[str, str]:
        """Return every register that the kernel has."""
        return self._architecture.registers_of(self._architecture.save(self._system, self.vcpu))

    def load_registers(self, registers: Mapping[str, str]) -> None:
        """Set every register."""
        self._architecture.restore(self.vcpu, self._architecture.state_of(self.kind, registers))

    def snapshot(self) -> ReadyState:
        """Return the whole state, made ready."""
        return self._architecture.make_ready(self.vcpu, self._architecture.save(self._system, self.vcpu))

    def put_back(self, snapshot: object) -> None:
        """Set the whole state to that of a snapshot of this vCPU."""
        if self._left_access:
            # Else the next run would complete it, into registers that know nothing of it.
            self.vcpu.complete()
            self._left_access = False
        cast("ReadyState", snapshot).restore()

    def forget_code(self, gfns: NDArray[np.int64]) -> None:
        """Do nothing: processors see changed code themselves."""

    def _serve(self, access: IoAccess | MmioAccess) -> None:
        """Have devices answer an access to its last piece, and complete it: then nothing is left to be done to guest memory."""
        piece: Exit = access
        while isinstance(piece, (IoAccess, MmioAccess)):
            answer = self._bus.access(self.vcpu.index, piece)
            if answer is None:
                raise self._fault(piece)
            if not piece.is_write:
                self.vcpu.answer(piece, answer)
            # No guest code runs: whoever wanted to stop the vCPU finds it outside the guest.
            self.vcpu.kick()
            piece = self.vcpu.run()
        if piece != Interrupted():
            raise self._fault(piece)
        self._left_access = False

    def _fault(self, reason: Exit) -> GuestFaultError:
        pc = self.pc
        what = f"vCPU {self.vcpu.index} of the {self._architecture.isa} guest, at pc {pc:#x}: {_words(reason)}"
        address = reason.address if isinstance(reason, MmioAccess) else None
        return GuestFaultError(what, pc=pc, address=address, architecture=self._architecture.isa)


def _words(reason: Exit) -> str:
    """Say why a guest cannot go on."""
    words = f"KVM left the guest for a reason that dirtylog does not serve: {reason}"
    match reason:
        case IoAccess():
            words = f"nothing answers {_verb(reason)} I/O port {reason.port:#x}"
        case MmioAccess():
            words = f"no slot permits, and nothing answers, {_verb(reason)} guest address {reason.address:#x}"
        case Shutdown():
            words = "a triple fault: the guest faulted and has no handler that works"
        case FailEntry():
            words = f"the hardware refuses the state that it was given (reason {reason.reason:#x}, CPU {reason.cpu})"
        case InternalError(suberror=suberror, data=data):
            why = "an instruction that KVM cannot emulate" if suberror == _CANNOT_EMULATE else "KVM cannot go on"
            words = f"{why} (internal error {suberror}, data {[f'{word:#x}' for word in data]})"
        case SystemEvent():
            words = f"the guest asks for system event {reason.event}"
    return words


def _verb(access: IoAccess | MmioAccess) -> str:
    return "a write to" if access.is_write else "a read from"

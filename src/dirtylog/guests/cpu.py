"""What a vCPU thread runs: a CPU, whether KVM's, Unicorn's or the trace CPU."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Protocol


class CpuExit(enum.Enum):
    """Why a CPU left the guest."""

    STOPPED = "stopped"
    HALTED = "halted"


Service = Callable[[], None]
"""What a guest waits for: its vCPU's thread calls it outside the guest, and goes on."""


class Cpu(Protocol):
    """A guest CPU."""

    def run(self) -> CpuExit | Service:
        """Run guest code until it halts, needs a service, or :meth:`stop` is called.

        GuestFaultError if it makes an access that it may not.
        """

    def stop(self) -> None:
        """Make :meth:`run` return soon. From any thread. A call that comes just before run may have no effect: repeat it."""

    def flush_tlb(self) -> None:
        """Drop every translation that this CPU caches itself. Only on the CPU's own thread, outside :meth:`run`."""

    @property
    def pc(self) -> int:
        """Address of the next instruction."""

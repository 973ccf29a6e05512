"""What a vCPU thread runs: a CPU, one of Unicorn's or the trace CPU."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dirtylog.emulated.port import Translation


class CpuExit(enum.Enum):
    """Why a CPU left the guest."""

    STOPPED = "stopped"
    HALTED = "halted"


class Cpu(Protocol):
    """A guest CPU with a TLB of its own."""

    def run(self) -> CpuExit:
        """Run guest code until it halts, or :meth:`stop` is called; GuestFaultError if it makes an access that it may not."""

    def stop(self) -> None:
        """Make :meth:`run` return soon. From any thread. A call that comes just before run may have no effect: repeat it."""

    def flush_tlb(self) -> None:
        """Drop every cached translation. Only on the CPU's own thread, outside :meth:`run`."""

    @property
    def pc(self) -> int:
        """Address of the next instruction."""


class Translate(Protocol):
    """How a CPU asks for a translation: its vCPU's number, the guest frame number, and whether the access is a store."""

    def __call__(self, vcpu: int, gfn: int, write: bool, /) -> Translation | None: ...  # noqa: FBT001, D102 - the hot path takes no keywords

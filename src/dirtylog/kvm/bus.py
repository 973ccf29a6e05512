"""What answers a guest's accesses outside memory: I/O ports and MMIO ranges, and a doorbell for the simplest signal."""

from __future__ import annotations

import queue
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dirtylog.errors import InvalidArgumentError
from dirtylog.kvm.exits import IoAccess, MmioAccess

if TYPE_CHECKING:
    from collections.abc import Callable

_IO_PORTS = 1 << 16


@dataclass(frozen=True, slots=True)
class BusAccess:
    """One access of a guest: by which vCPU, ``offset`` bytes into the range, a write of ``data`` or a read of ``nbytes``."""

    vcpu: int
    offset: int
    is_write: bool
    nbytes: int
    data: bytes

    @property
    def value(self) -> int:
        """What was written, as a little-endian number."""
        return int.from_bytes(self.data, "little")


class Bus:
    """The devices of a machine. Attach them before the guest runs; an access that nothing answers is a guest fault.

    A handler is called on the thread of the vCPU, which waits outside the guest. It returns the answer to a read; an exception
    ends the vCPU with that error. It may get the log, but not pause the machine, for a pause waits for it.
    """

    def __init__(self) -> None:
        self._ports: dict[int, Callable[[BusAccess], bytes | None]] = {}
        self._ranges: list[tuple[int, int, Callable[[BusAccess], bytes | None]]] = []

    def attach_port(self, port: int, handler: Callable[[BusAccess], bytes | None]) -> None:
        """Answer an I/O port (x86's in and out); ``offset`` is 0."""
        if not 0 <= port < _IO_PORTS:
            raise InvalidArgumentError(f"I/O port {port:#x}: ports are 0 to {_IO_PORTS - 1:#x}")
        if port in self._ports:
            raise InvalidArgumentError(f"I/O port {port:#x} has a handler already")
        self._ports[port] = handler

    def attach_mmio(self, address: int, nbytes: int, handler: Callable[[BusAccess], bytes | None]) -> None:
        """Answer guest-physical addresses that lie in no slot."""
        if address < 0 or nbytes < 1:
            raise InvalidArgumentError(f"an MMIO range of {nbytes} bytes at {address:#x}: it must have bytes and an address")
        for start, length, _ in self._ranges:
            if address < start + length and start < address + nbytes:
                raise InvalidArgumentError(f"the MMIO range at {address:#x} overlaps the one at {start:#x}")
        self._ranges.append((address, nbytes, handler))

    def access(self, vcpu: int, exit_: IoAccess | MmioAccess) -> bytes | None:
        """Hand an access to its handler, item by item; return the answer to a read, or None if nothing answers this address."""
        if isinstance(exit_, IoAccess):
            handler, offset, count = self._ports.get(exit_.port), 0, exit_.count
        else:
            handler, offset, count = None, 0, 1
            for start, length, one in self._ranges:
                if start <= exit_.address and exit_.address + exit_.size <= start + length:
                    handler, offset = one, exit_.address - start
        if handler is None:
            return None
        answers = []
        for item in range(count):
            data = exit_.data[item * exit_.size : (item + 1) * exit_.size] if exit_.is_write else b""
            answer = handler(BusAccess(vcpu, offset, exit_.is_write, exit_.size, data)) or b""
            answers.append(answer[: exit_.size].ljust(exit_.size, b"\0"))
        return b"" if exit_.is_write else b"".join(answers)


class Doorbell:
    """A handler that keeps what guests write to it, for this process to wait for; it reads as zero."""

    def __init__(self) -> None:
        self._rung: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()

    def __call__(self, access: BusAccess) -> None:
        """Keep a write; called by the bus."""
        if access.is_write:
            self._rung.put((access.vcpu, access.value))

    def wait(self, timeout: float | None = None) -> tuple[int, int] | None:
        """Return the next (vCPU, value) that a guest wrote, or None after ``timeout`` seconds without one."""
        try:
            return self._rung.get(timeout=timeout)
        except queue.Empty:
            return None

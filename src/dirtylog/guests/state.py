"""The state of a vCPU as bytes, for checkpoints: what can be loaded again in another process, or refused.

A magic string, the format's version (16 bits, little-endian), a CRC-32 of the rest, and a JSON object::

    {"cpu": "Unicorn arm64", "state": "ready", "fault": null, "registers": {"X0": "2a", ...}}

``cpu`` says whose registers these are, and each register is a hexadecimal string.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from dirtylog.errors import CorruptDataError, DirtyLogError, GuestFaultError, InvalidArgumentError, UnsupportedError
from dirtylog.guests.cpu import Cpu

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

VERSION = 1
MAX_BYTES = 1 << 20
"""The longest state that is read: the largest known has some 20 KiB."""
_MAGIC = b"dirtylog vCPU\n"
_HEADER = struct.Struct("<HI")
_STATES = ("ready", "halted", "faulted")


@runtime_checkable
class StatefulCpu(Cpu, Protocol):
    """A CPU whose registers can be had and set. Only while it does not run."""

    @property
    def kind(self) -> str:
        """Whose registers these are: only a CPU of the same kind takes them."""

    def registers(self) -> dict[str, str]:
        """Return every register by its name, in hexadecimal."""

    def load_registers(self, registers: Mapping[str, str]) -> None:
        """Set every register. :class:`InvalidArgumentError` for other names or sizes than :meth:`registers` gives."""

    def snapshot(self) -> object:
        """Return the whole state for :meth:`put_back`, on this CPU and in this process: as fast as can be."""

    def put_back(self, snapshot: object) -> None:
        """Set the whole state to that of a snapshot."""

    def forget_code(self, gfns: NDArray[np.int64]) -> None:
        """Drop what was made of the code in these guest frames, whose contents have changed without the guest."""


@dataclass(frozen=True, slots=True)
class SavedVcpu:
    """The state of one vCPU. ``state`` is "ready", "halted" or "faulted", ``fault`` the error of one that faulted."""

    cpu: str
    state: str
    fault: BaseException | None
    registers: dict[str, str]

    def to_bytes(self) -> bytes:
        """Return it as bytes."""
        about = {"cpu": self.cpu, "state": self.state, "fault": _describe(self.fault), "registers": self.registers}
        body = json.dumps(about, separators=(",", ":")).encode("ascii")
        return _MAGIC + _HEADER.pack(VERSION, zlib.crc32(body)) + body

    @classmethod
    def from_bytes(cls, data: bytes) -> SavedVcpu:
        """Return what :meth:`to_bytes` made bytes of.

        :class:`CorruptDataError` if the bytes are not whole, :class:`UnsupportedError` for a format newer than this one.
        """
        start = len(_MAGIC) + _HEADER.size
        if not data.startswith(_MAGIC) or not start <= len(data) <= MAX_BYTES:
            raise CorruptDataError(f"{len(data)} bytes that are no state of a vCPU")
        version, checksum = _HEADER.unpack_from(data, len(_MAGIC))
        if version != VERSION:
            raise UnsupportedError(
                f"a vCPU's state in format {version}: this dirtylog reads format {VERSION}",
                remedy="load it with the dirtylog that saved it, or a newer one",
            )
        body = bytes(data[start:])
        if zlib.crc32(body) != checksum:
            raise CorruptDataError("a vCPU's state that does not verify: its checksum is another")
        try:
            about = json.loads(body)
            state = cls(about["cpu"], about["state"], _fault(about["fault"]), about["registers"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptDataError("a vCPU's state that cannot be read", reason=repr(error)) from error
        state.check()
        return state

    def check(self) -> None:
        """Raise :class:`CorruptDataError` for values that no vCPU has."""
        names = self.registers.items() if isinstance(self.registers, dict) else ((None, None),)
        good = isinstance(self.cpu, str) and self.state in _STATES and (self.state == "faulted") == (self.fault is not None)
        if not good or not all(isinstance(text, str) for register in names for text in register):
            raise CorruptDataError("a vCPU's state that cannot be read", reason="it has values that no vCPU has")


def check_names(kind: str, registers: Mapping[str, str], names: Mapping[str, Any]) -> None:
    """Raise :class:`InvalidArgumentError` unless the registers are those that a CPU of this kind has."""
    odd = sorted(registers.keys() ^ names.keys())
    if odd:
        raise InvalidArgumentError(
            f"the state of a {kind} vCPU with other registers than such a vCPU has", reason=f"they differ in {', '.join(odd[:8])}"
        )


def number(kind: str, name: str, text: str, bits: int) -> int:
    """Return the value of a register of so many bits."""
    try:
        value = int(text, 16)
    except ValueError as error:
        raise InvalidArgumentError(f"the state of a {kind} vCPU has no number for {name}: {text[:40]!r}") from error
    if not 0 <= value < 1 << bits:
        raise InvalidArgumentError(f"the state of a {kind} vCPU has {text[:40]} for {name}, which has {bits} bits")
    return value


def _describe(fault: BaseException | None) -> dict[str, Any] | None:
    if fault is None:
        return None
    about: dict[str, Any] = {"message": str(fault)}
    if isinstance(fault, GuestFaultError):
        about |= {"pc": fault.pc, "address": fault.address, "architecture": fault.architecture}
    return about


def _fault(about: Any) -> BaseException | None:  # noqa: ANN401 - whatever JSON holds
    if about is None:
        return None
    if "pc" not in about:
        return DirtyLogError(str(about["message"]))
    address = about["address"]
    return GuestFaultError(
        str(about["message"]),
        pc=int(about["pc"]),
        address=None if address is None else int(address),
        architecture=str(about["architecture"]),
    )

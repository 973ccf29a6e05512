"""The state of an x86_64 vCPU: as named registers, for checkpoints, and made ready to be restored again and again, for resets."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from dirtylog.errors import InvalidArgumentError
from dirtylog.guests.state import number
from dirtylog.kvm.arch import x86_64_registers as x86

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dirtylog.kvm.vcpu import KvmVcpu
    from dirtylog.linux.layout import Struct

_MSR = "msr "
_XSAVE = "xsave"
_STRUCTS: dict[str, type[Struct]] = {
    "regs": x86.Regs,
    "sregs": x86.Sregs,
    "xcrs": x86.Xcrs,
    "events": x86.VcpuEvents,
    "debugregs": x86.Debugregs,
    "mp_state": x86.MpState,
}


def registers_of(state: x86.X86State) -> dict[str, str]:
    """Return a state as registers by name: the kernel's structs, the XSAVE area, and each MSR."""
    parts = {name: getattr(state, name).hex() for name in (*_STRUCTS, _XSAVE)}
    return parts | {f"{_MSR}{index:x}": f"{value:x}" for index, value in state.msrs.items()}


def state_of(kind: str, registers: Mapping[str, str]) -> x86.X86State:
    """Return the state of these registers, or raise :class:`InvalidArgumentError` for others than :func:`registers_of` gives."""
    msrs = {name.removeprefix(_MSR): value for name, value in registers.items() if name.startswith(_MSR)}
    parts = {name: value for name, value in registers.items() if not name.startswith(_MSR)}
    if parts.keys() != {*_STRUCTS, _XSAVE}:
        raise InvalidArgumentError(f"the state of a {kind} vCPU with the parts {', '.join(sorted(parts))}")
    octets = {name: _octets(kind, name, text) for name, text in parts.items()}
    for name, struct in _STRUCTS.items():
        if len(octets[name]) != ctypes.sizeof(struct):
            raise InvalidArgumentError(
                f"the state of a {kind} vCPU has {len(octets[name])} bytes of {name}, which has {ctypes.sizeof(struct)}"
            )
    if not x86.XSAVE_BYTES <= len(octets[_XSAVE]) <= x86.MOST_XSAVE_BYTES:
        raise InvalidArgumentError(f"the state of a {kind} vCPU has an XSAVE area of {len(octets[_XSAVE])} bytes")
    return x86.X86State(
        **octets,
        msrs={number(kind, "an MSR", name, 32): number(kind, f"MSR {name}", value, 64) for name, value in msrs.items()},
    )


class ReadyState:
    """A state of one vCPU whose arguments for the kernel are made beforehand.

    Nothing is compared first: to read a register costs what it costs to write it.
    """

    def __init__(self, vcpu: KvmVcpu, state: x86.X86State) -> None:
        self._vcpu = vcpu
        # In the order of x86.restore, and for its reasons.
        self._first: list[Struct] = [
            x86.Sregs.from_buffer_copy(state.sregs),
            x86.Regs.from_buffer_copy(state.regs),
            x86.Xcrs.from_buffer_copy(state.xcrs),
        ]
        self._xsave = bytearray(state.xsave.ljust(x86.MOST_XSAVE_BYTES, b"\0"))
        # What the kernel refuses to set the guest cannot set either: it stays what it is.
        self._msrs = x86.put_msrs(vcpu, state.msrs)
        self._msr_argument = x86.msr_argument(list(self._msrs.items()))
        self._last: list[Struct] = [
            x86.Debugregs.from_buffer_copy(state.debugregs),
            x86.MpState.from_buffer_copy(state.mp_state),
            x86.VcpuEvents.from_buffer_copy(state.events),
        ]

    def restore(self) -> None:
        """Set it. The vCPU must not be running, and no access may be left to be completed."""
        vcpu = self._vcpu
        for value in self._first:
            vcpu.put(value)
        vcpu.ioctl(x86.KVM_SET_XSAVE, self._xsave, f"cannot set the FPU of vCPU {vcpu.index}")
        if vcpu.ioctl(x86.KVM_SET_MSRS, self._msr_argument, f"cannot set the MSRs of vCPU {vcpu.index}") != len(self._msrs):
            x86.put_msrs(vcpu, self._msrs)
        for value in self._last:
            vcpu.put(value)


def _octets(kind: str, name: str, text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise InvalidArgumentError(f"the state of a {kind} vCPU has no bytes for {name}") from error

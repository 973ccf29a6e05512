"""What differs between the architectures that KVM runs on: one file each, chosen by the machine this runs on."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from dirtylog.errors import UnsupportedError
from dirtylog.kvm.arch.x86_64 import X86_64

if TYPE_CHECKING:
    from dirtylog.kvm.arch.architecture import Architecture

ARCHITECTURES: dict[str, type[Architecture]] = {"x86_64": X86_64}
"""By what :func:`platform.machine` says."""


def host_architecture(machine: str | None = None) -> Architecture:
    """Return what is particular to this host, or raise :class:`UnsupportedError`."""
    name = platform.machine() if machine is None else machine
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"dirtylog makes no KVM guests on {name} yet; it does on {', '.join(ARCHITECTURES)}",
            remedy="use an emulated guest, such as emu:arm64",
        )
    return ARCHITECTURES[name]()

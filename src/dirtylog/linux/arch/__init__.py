"""The instruction sets on which a system call can be made in another process."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

from dirtylog.errors import UnsupportedError
from dirtylog.linux.arch.arm64 import Arm64
from dirtylog.linux.arch.x86_64 import X86_64

if TYPE_CHECKING:
    from dirtylog.linux.arch.architecture import Architecture

ARCHITECTURES: dict[str, type[Architecture[Any]]] = {"x86_64": X86_64, "aarch64": Arm64}


def host_architecture(machine: str | None = None) -> Architecture[Any]:
    """Return this host's, or raise :class:`UnsupportedError`."""
    name = platform.machine() if machine is None else machine
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"no system call can be injected on {name}",
            reason=f"known: {', '.join(ARCHITECTURES)}",
            remedy="let the program run dirtylog.agent, or use port compare",
        )
    return ARCHITECTURES[name]()

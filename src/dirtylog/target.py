"""From a target as users write it, ``emu:arm64:hotset``, to a memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dirtylog.emulated.guest import make_guest
from dirtylog.errors import InvalidArgumentError
from dirtylog.size import parse_size

if TYPE_CHECKING:
    from dirtylog.emulated.machine import EmulatedMemory
    from dirtylog.guests.image import Image

DEFAULT_SIZE = "64MiB"
DEFAULT_PROGRAM = "sweep"


def open_target(target: str, *, size: str | int = DEFAULT_SIZE, vcpus: int = 1, image: Image | None = None) -> EmulatedMemory:
    """Open a memory whose writes can be logged; close it, or use it as a context manager.

    ``target`` is ``emu:ARCH`` or ``emu:ARCH:PROGRAM``. The guest starts paused: ``resume`` it when the log is on. ``size`` is
    its RAM in bytes or with a unit, ``vcpus`` 1 to 8, ``image`` a raw program of the user's own instead of PROGRAM.
    """
    kind, _, rest = target.partition(":")
    if kind != "emu" or not rest:
        raise InvalidArgumentError(f"unknown target {target!r}; a target is emu:ARCH or emu:ARCH:PROGRAM")
    arch, _, program = rest.partition(":")
    if program and image is not None:
        raise InvalidArgumentError(f"target {target!r} names a program, and an image is given too: leave one of them out")
    return make_guest(arch, parse_size(size), program=program or DEFAULT_PROGRAM, vcpus=vcpus, image=image)

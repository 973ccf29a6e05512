"""From a target as users write it, ``emu:arm64:hotset`` or ``kvm:sweep``, to a memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dirtylog.emulated.guest import make_guest
from dirtylog.errors import InvalidArgumentError
from dirtylog.size import parse_size

if TYPE_CHECKING:
    from dirtylog.emulated.machine import EmulatedMemory
    from dirtylog.guests.image import Image
    from dirtylog.kvm.memory import KvmMemory
    from dirtylog.kvm.options import KvmOptions

DEFAULT_SIZE = "64MiB"
DEFAULT_PROGRAM = "sweep"


def open_target(
    target: str,
    *,
    size: str | int = DEFAULT_SIZE,
    vcpus: int = 1,
    image: Image | None = None,
    kvm: KvmOptions | None = None,
) -> EmulatedMemory | KvmMemory:
    """Open a memory whose writes can be logged; close it, or use it as a context manager.

    ``target`` is ``emu:ARCH[:PROGRAM]`` or ``kvm[:PROGRAM]``. The guest starts paused: ``resume`` it when the log is on. ``size``
    is its RAM in bytes or with a unit, ``vcpus`` 1 to 8, ``image`` a program of the user's own instead of PROGRAM, ``kvm`` how a
    KVM guest is made: its log (the bitmap by default), what its RAM is made of.

    Raises :class:`InvalidArgumentError`; :class:`UnsupportedError` where this host cannot; :class:`AccessDeniedError`.
    """
    kind, _, rest = target.partition(":")
    arch, _, program = rest.partition(":") if kind == "emu" else ("", "", rest)
    if (kind == "emu" and not arch) or kind not in ("emu", "kvm"):
        raise InvalidArgumentError(f"unknown target {target!r}; a target is emu:ARCH, emu:ARCH:PROGRAM, kvm or kvm:PROGRAM")
    if program and image is not None:
        raise InvalidArgumentError(f"target {target!r} names a program, and an image is given too: leave one of them out")
    program = program or DEFAULT_PROGRAM
    nbytes = parse_size(size)
    if kind == "emu":
        if kvm is not None:
            raise InvalidArgumentError(f"target {target!r}: an emulated guest has one way to log, and takes no options of KVM's")
        return make_guest(arch, nbytes, program=program, vcpus=vcpus, image=image)
    # Imported here: it needs Linux, and emulated guests run anywhere.
    from dirtylog.kvm.guest import make_kvm_guest  # noqa: PLC0415

    return make_kvm_guest(nbytes, program=program, vcpus=vcpus, image=image, options=kvm)

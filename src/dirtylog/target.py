"""From a target as users write it, ``emu:arm64:hotset`` or ``kvm:sweep``, to a memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dirtylog.emulated.guest import make_guest
from dirtylog.errors import InvalidArgumentError, UnsupportedError
from dirtylog.options import KvmOptions
from dirtylog.size import parse_size

if TYPE_CHECKING:
    from dirtylog.emulated.machine import EmulatedMemory
    from dirtylog.guests.image import Image
    from dirtylog.kvm.memory import KvmMemory

DEFAULT_SIZE = "64MiB"
DEFAULT_PROGRAM = "sweep"


def open_target(
    target: str,
    *,
    size: str | int = DEFAULT_SIZE,
    vcpus: int = 1,
    image: Image | None = None,
    log: str | None = None,
    backing: str | None = None,
    ring_entries: int | None = None,
) -> EmulatedMemory | KvmMemory:
    """Open a memory whose writes can be logged; close it, or use it as a context manager.

    ``target`` is ``emu:ARCH[:PROGRAM]`` or ``kvm[:PROGRAM]``. The guest starts paused: ``resume`` it when the log is on. ``size``
    is its RAM in bytes or with a unit, ``vcpus`` 1 to 8, ``image`` a program of the user's own instead of PROGRAM. For KVM guests
    only: ``log`` is "bitmap" (the default), "manual" or "ring"; ``backing`` what the RAM is made of, "anonymous" (the default),
    "thp", "hugetlb" or "memfd"; ``ring_entries`` the length of each vCPU's ring, a power of two.

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
    options = KvmOptions.of(log, backing, ring_entries)
    if kind == "emu":
        if options is not None:
            raise InvalidArgumentError(f"target {target!r}: log, backing and ring entries are choices of KVM guests")
        return make_guest(arch, nbytes, program=program, vcpus=vcpus, image=image)
    try:
        from dirtylog.kvm.guest import make_kvm_guest  # noqa: PLC0415 - it needs Linux, and emulated guests run anywhere
    except ImportError as error:
        raise UnsupportedError("KVM guests run on Linux only", reason=str(error), remedy="use an emulated guest") from error
    return make_kvm_guest(nbytes, program=program, vcpus=vcpus, image=image, options=options)

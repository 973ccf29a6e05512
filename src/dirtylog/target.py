"""From a target as users write it, ``emu:arm64:hotset``, ``kvm:sweep``, ``pid:1234`` or a command, to a memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dirtylog.buffers.program import WrittenBuffer
from dirtylog.emulated.guest import make_guest
from dirtylog.errors import InvalidArgumentError, UnsupportedError
from dirtylog.options import KvmOptions, ProcessOptions
from dirtylog.size import parse_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dirtylog.emulated.machine import EmulatedMemory
    from dirtylog.guests.image import Image
    from dirtylog.kvm.memory import KvmMemory
    from dirtylog.linux.process import ProcessMemory

    AnyMemory = EmulatedMemory | KvmMemory | ProcessMemory | WrittenBuffer

DEFAULT_SIZE = "64MiB"
DEFAULT_PROGRAM = "sweep"
_PID_DIGITS = 20
_TARGETS = "emu:ARCH[:PROGRAM], kvm[:PROGRAM], buffer[:PROGRAM], pid:N, or a command as a list of words"


def open_target(  # noqa: PLR0913 - each is a word of one kind of target; all have defaults
    target: str | Sequence[str],
    *,
    size: str | int | None = None,
    vcpus: int | None = None,
    image: Image | None = None,
    log: str | None = None,
    backing: str | None = None,
    ring_entries: int | None = None,
    port: str | None = None,
    maps: Sequence[str] | None = None,
) -> AnyMemory:
    """Open a memory whose writes can be logged; close it, or use it as a context manager.

    ``target`` is ``emu:ARCH[:PROGRAM]`` or ``kvm[:PROGRAM]`` for a guest, ``pid:N`` for another process, ``buffer[:PROGRAM]`` for
    memory of this one that a thread writes, or a command as a list of words: a program that is started, and ended by ``close``. All
    but ``pid:N`` start paused: ``resume`` them when the log is on.

    For guests: ``size`` is the RAM in bytes or with a unit (64 MiB), ``vcpus`` 1 to 8 (1), ``image`` a program of the user's own
    instead of PROGRAM. For KVM guests: ``log`` is "bitmap" (the default), "manual" or "ring"; ``backing`` what the RAM is made of,
    "anonymous" (the default), "thp", "hugetlb" or "memfd"; ``ring_entries`` the length of each vCPU's ring, a power of two. For
    processes: ``port`` is "auto" (the default: the first that works), "uffd", "soft-dirty" or "compare"; ``maps`` chooses among
    their mappings: words of :data:`dirtylog.linux.mappings.KINDS`, ranges of addresses, patterns of names. For
    buffers: ``size``, whole pages (64 MiB), and ``port``: "auto", "uffd" or "compare".

    Raises :class:`InvalidArgumentError`; :class:`UnsupportedError` where this host cannot; :class:`AccessDeniedError`;
    :class:`TargetGoneError`.
    """
    if not isinstance(target, str) or target.startswith("pid:"):
        _refuse(target, "choices of guests", size=size, vcpus=vcpus, image=image)
        _refuse(target, "choices of KVM guests", log=log, backing=backing, ring_entries=ring_entries)
        return _open_process(target, ProcessOptions.of(port, maps))
    if target.partition(":")[0] == "buffer":
        _refuse(target, "choices of guests", vcpus=vcpus, image=image)
        _refuse(target, "choices of KVM guests", log=log, backing=backing, ring_entries=ring_entries)
        _refuse(target, "choices of processes", maps=maps)
        return _open_buffer(target, size, port)
    _refuse(target, "choices of processes", port=port, maps=maps)
    return open_guest(target, size=size, vcpus=vcpus, image=image, log=log, backing=backing, ring_entries=ring_entries)


def open_guest(
    target: str,
    *,
    size: str | int | None = None,
    vcpus: int | None = None,
    image: Image | None = None,
    log: str | None = None,
    backing: str | None = None,
    ring_entries: int | None = None,
) -> EmulatedMemory | KvmMemory:
    """Open a guest, as :func:`open_target` does."""
    kvm = KvmOptions.of(log, backing, ring_entries)
    kind, _, rest = target.partition(":")
    arch, _, program = rest.partition(":") if kind == "emu" else ("", "", rest)
    if (kind == "emu" and not arch) or kind not in ("emu", "kvm"):
        raise InvalidArgumentError(f"unknown target {target!r}; a target is {_TARGETS}")
    if program and image is not None:
        raise InvalidArgumentError(f"target {target!r} names a program, and an image is given too: leave one of them out")
    program, vcpus = program or DEFAULT_PROGRAM, 1 if vcpus is None else vcpus
    nbytes = parse_size(DEFAULT_SIZE if size is None else size)
    if kind == "emu":
        _refuse(target, "choices of KVM guests", log=log, backing=backing, ring_entries=ring_entries)
        return make_guest(arch, nbytes, program=program, vcpus=vcpus, image=image)
    try:
        from dirtylog.kvm.guest import make_kvm_guest  # noqa: PLC0415 - it needs Linux, and emulated guests run anywhere
    except ImportError as error:
        raise UnsupportedError("KVM guests run on Linux only", reason=str(error), remedy="use an emulated guest") from error
    return make_kvm_guest(nbytes, program=program, vcpus=vcpus, image=image, options=kvm)


def _open_buffer(target: str, size: str | int | None, port: str | None) -> WrittenBuffer:
    program = target.partition(":")[2] or DEFAULT_PROGRAM
    return WrittenBuffer(parse_size(DEFAULT_SIZE if size is None else size), program, port=port or "auto")


def _open_process(target: str | Sequence[str], options: ProcessOptions) -> ProcessMemory:
    try:
        # It needs Linux, and emulated guests run anywhere.
        from dirtylog.linux.launch import Launched  # noqa: PLC0415 - as above
        from dirtylog.linux.process import ProcessMemory  # noqa: PLC0415 - as above
    except ImportError as error:
        raise UnsupportedError(
            "processes can be logged on Linux only", reason=str(error), remedy="in a process, use dirtylog.track"
        ) from error
    if not isinstance(target, str):
        launched = Launched(target)
        try:
            return ProcessMemory(launched.pid, options, launched=launched)
        except BaseException:
            launched.close()
            raise
    number = target.removeprefix("pid:")
    if not (number.isascii() and number.isdigit() and len(number) <= _PID_DIGITS):
        raise InvalidArgumentError(f"target {target!r}: write pid: and the number of a process")
    return ProcessMemory(int(number), options)


def _refuse(target: str | Sequence[str], whose: str, **choices: object) -> None:
    """Refuse choices that another kind of target has."""
    made = [name.replace("_", " ") for name, value in choices.items() if value is not None]
    if made:
        name = target if isinstance(target, str) else " ".join(target)
        raise InvalidArgumentError(f"target {name!r}: {', '.join(made)} are {whose}", remedy="leave them out")

"""The arguments that name a target, and the memory that they open; every command that logs has them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from dirtylog.buffers.program import PROGRAMS as BUFFER_PROGRAMS
from dirtylog.cli import arguments
from dirtylog.errors import InvalidArgumentError
from dirtylog.guests.image import Image
from dirtylog.guests.programs import PROGRAMS
from dirtylog.options import MAX_ENTRIES, Backing, Log, ProcessPorts
from dirtylog.target import DEFAULT_SIZE, open_target

if TYPE_CHECKING:
    import argparse

    from dirtylog.target import AnyMemory


def add_target(parser: argparse.ArgumentParser) -> None:
    """Add TARGET and the choices that targets have."""
    parser.add_argument(
        "target",
        metavar="TARGET",
        nargs="?",
        help=f"kvm[:PROGRAM], emu:ARCH[:PROGRAM], pid:N, or buffer[:PROGRAM], which is memory of this program that a thread of it "
        f"writes; PROGRAM: {', '.join(BUFFER_PROGRAMS)} (guests: {', '.join(PROGRAMS)})",
    )
    guests = parser.add_argument_group("guests")
    guests.add_argument(
        "--size", type=arguments.size, help=f"the guest's or the buffer's memory, such as 256MiB (default: {DEFAULT_SIZE})"
    )
    guests.add_argument("--vcpus", type=arguments.count, metavar="N", help="1 to 8 (default: 1)")
    processes = parser.add_argument_group("processes, and --port for buffers")
    processes.add_argument(
        "--port",
        choices=[port.value for port in ProcessPorts],
        help="userfaultfd's write protection, soft-dirty bits (not of a buffer), a copy compared, or the first that works "
        "(default: auto)",
    )
    processes.add_argument(
        "--map",
        type=arguments.selection,
        action="append",
        metavar="MAP",
        help="only these mappings: heap, stack, anonymous, file, shared, private, writable, a range such as 0x1000-0x9000, "
        "or a pattern of names such as '*/libc.so*'; may be repeated",
    )
    kvm = parser.add_argument_group("KVM guests")
    kvm.add_argument(
        "--log",
        choices=[log.value for log in Log],
        help="the kernel's log: a bitmap that a get takes and protects (the default), one that is cleared apart, or rings",
    )
    kvm.add_argument(
        "--backing",
        choices=[backing.value for backing in Backing],
        help="what the guest's memory is made of (default: anonymous)",
    )
    kvm.add_argument(
        "--ring-entries", type=arguments.count, metavar="N", help=f"length of each vCPU's ring (default: {MAX_ENTRIES})"
    )
    image = parser.add_argument_group("a program of your own")
    image.add_argument("--image", type=Path, metavar="FILE", help="an ELF file or a raw image to run instead of PROGRAM")
    image.add_argument("--load", type=arguments.address, metavar="ADDR", help="where to load a raw image (default: 0)")
    image.add_argument(
        "--entry",
        type=arguments.address,
        metavar="ADDR",
        help="where to enter it (default: as ELF says, or where it lies)",
    )
    image.add_argument("--halt", type=arguments.address, metavar="ADDR", help="the address at which a vCPU halts")


def add_metrics(parser: argparse.ArgumentParser) -> None:
    """Add the choices of those that serve metrics."""
    parser.add_argument("--metrics", type=arguments.port, metavar="PORT", help="serve metrics for Prometheus on this TCP port")
    parser.add_argument(
        "--metrics-address", default="127.0.0.1", metavar="ADDR", help="the address to serve them on (default: %(default)s)"
    )


def name_of(args: argparse.Namespace) -> str:
    """Return the target as its user wrote it; :class:`InvalidArgumentError` unless there is just one."""
    if (args.target is None) == (args.program is None):
        raise InvalidArgumentError(
            f"{'no TARGET' if args.target is None else 'two targets'}: name kvm, emu:ARCH, buffer or pid:N, or a command after --"
        )
    return f"-- {shlex.join(args.program)}" if args.target is None else str(args.target)


def open_named(args: argparse.Namespace) -> AnyMemory:
    """Open the target that the arguments name."""
    name_of(args)
    return open_target(
        args.program or args.target,
        size=args.size,
        vcpus=args.vcpus,
        image=_image_of(args),
        log=args.log,
        backing=args.backing,
        ring_entries=args.ring_entries,
        port=args.port,
        maps=args.map,
    )


def _image_of(args: argparse.Namespace) -> Image | None:
    if args.image is not None:
        return Image.read(args.image, load=args.load, entry=args.entry, halt=args.halt)
    if (args.load, args.entry, args.halt) != (None, None, None):
        raise InvalidArgumentError("--load, --entry and --halt go with --image")
    return None

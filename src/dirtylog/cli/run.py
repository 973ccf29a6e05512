"""``dirtylog run``: log a guest or a process, round by round."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dirtylog.bitmap import DirtyBitmap
from dirtylog.cli import arguments
from dirtylog.cli.command import Command
from dirtylog.cli.exits import ExitCode, exit_code_of
from dirtylog.cli.reports import Document, Lines, Report, Text
from dirtylog.dirty_log import DirtyLog
from dirtylog.errors import DirtyLogError, InvalidArgumentError
from dirtylog.guests.image import Image
from dirtylog.guests.machine import Machine
from dirtylog.guests.programs import PROGRAMS
from dirtylog.observe.heatmap import HeatMap
from dirtylog.observe.rounds import rounds
from dirtylog.options import MAX_ENTRIES, Backing, Log, ProcessPorts
from dirtylog.target import DEFAULT_SIZE, open_target

if TYPE_CHECKING:
    import argparse

    from dirtylog.memslot import MemorySlot
    from dirtylog.observe.rounds import Round

_DEFAULT_ROUNDS = 10


class Run(Command):
    """Log a guest or process, round by round.

    TARGET is kvm[:PROGRAM], emu:ARCH[:PROGRAM], pid:N, or a program to start: dirtylog run -- COMMAND ARGS. "dirtylog check" says
    what works here. The programs of guests are sweep (page after page), random (every page once a period, in pseudo-random order),
    hotset (a few pages over and over; the last of several vCPUs sweeps the rest) and idle. A process runs on as if nothing was; of
    its mappings, one that is new is reported as a whole. In JSON, "runs" are [first frame number, number of pages]: guest-physical
    frames, or addresses of a process in pages. Exits 6 where writes may have been missed, and says which.
    """

    example: ClassVar[str] = "dirtylog run emu:arm64:hotset --vcpus 2 --rounds 5 --interval 0.1"

    @staticmethod
    def prepare(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of run."""
        parser.add_argument(
            "target",
            metavar="TARGET",
            nargs="?",
            help=f"kvm[:PROGRAM], emu:ARCH[:PROGRAM] or pid:N; PROGRAM: {', '.join(PROGRAMS)}",
        )
        parser.add_argument(
            "--rounds",
            type=arguments.count,
            metavar="N",
            help=f"how many (default: {_DEFAULT_ROUNDS}; of a COMMAND: until it ends, and after N it is ended)",
        )
        parser.add_argument(
            "--interval", type=arguments.seconds, default=0.1, metavar="SECONDS", help="length of a round (default: %(default)s)"
        )
        formats = parser.add_mutually_exclusive_group()
        formats.add_argument("--json", action="store_true", help="print one JSON document at the end")
        formats.add_argument("--jsonl", action="store_true", help="print one JSON object a round, at once")
        parser.add_argument(
            "--heatmap", type=Path, metavar="FILE", help="write a picture of pages against rounds (.png, .svg, .pdf)"
        )
        parser.add_argument("-f", "--force", action="store_true", help="replace FILE if it exists")
        guests = parser.add_argument_group("guests")
        guests.add_argument("--size", type=arguments.size, help=f"the guest's memory, such as 256MiB (default: {DEFAULT_SIZE})")
        guests.add_argument("--vcpus", type=arguments.count, metavar="N", help="1 to 8 (default: 1)")
        processes = parser.add_argument_group("processes")
        processes.add_argument(
            "--port",
            choices=[port.value for port in ProcessPorts],
            help="userfaultfd's write protection, soft-dirty bits, a copy compared, or the first that works (default: auto)",
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

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Open the target, log it, and print what was found."""
        if args.heatmap is not None:
            arguments.check_output(args.heatmap, force=args.force)
        target, name = _target_of(args)
        guest = {"size": args.size, "vcpus": args.vcpus, "image": _image_of(args)}
        kvm = {"log": args.log, "backing": args.backing, "ring_entries": args.ring_entries}
        with open_target(target, **guest, **kvm, port=args.port, maps=args.map) as memory, DirtyLog(memory) as log:
            report: Report = (Document if args.json else Lines if args.jsonl else Text)(name, memory)
            pictured = _Pictured()
            memory.resume()
            status = _log(args, log, (report, pictured) if args.heatmap is not None else (report,))
            if isinstance(memory, Machine):
                memory.pause()
            elif status is ExitCode.DONE:
                memory.end()
            if status is ExitCode.DONE and memory.incomplete:
                print(f"dirtylog: writes may have been missed: {'; '.join(memory.incomplete)}", file=sys.stderr)
                status = ExitCode.INCOMPLETE
            report.end(status)
            if args.heatmap is not None and status is not ExitCode.INTERRUPTED:
                pictured.save(args.heatmap, name)
                print(f"wrote {args.heatmap}", file=sys.stderr)
        return status


def _log(args: argparse.Namespace, log: DirtyLog, listeners: tuple[Report | _Pictured, ...]) -> ExitCode:
    """Log in rounds, and say how that ended."""
    count = args.rounds or (_DEFAULT_ROUNDS if args.program is None else None)
    try:
        for found in rounds(log, count, args.interval):
            for listener in listeners:
                listener.add(found)
            if isinstance(log.memory, Machine):
                log.memory.check()
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except DirtyLogError as error:
        print(f"dirtylog: {error}", file=sys.stderr)
        return exit_code_of(error)
    return ExitCode.DONE


def _image_of(args: argparse.Namespace) -> Image | None:
    if args.image is not None:
        return Image.read(args.image, load=args.load, entry=args.entry, halt=args.halt)
    if (args.load, args.entry, args.halt) != (None, None, None):
        raise InvalidArgumentError("--load, --entry and --halt go with --image")
    return None


def _target_of(args: argparse.Namespace) -> tuple[str | list[str], str]:
    """Return the target, and its name."""
    if (args.target is None) == (args.program is None):
        raise InvalidArgumentError(
            f"{'no TARGET' if args.target is None else 'two targets'}: name kvm, emu:ARCH or pid:N, or a command after --"
        )
    if args.program is None:
        return args.target, args.target
    return args.program, f"-- {shlex.join(args.program)}"


class _Pictured:
    """Rounds kept for a picture of the slot that was written most."""

    def __init__(self) -> None:
        self._rounds: list[Round] = []

    def add(self, found: Round) -> None:
        """Keep a round."""
        self._rounds.append(found)

    def save(self, path: Path, title: str) -> None:
        """Draw it."""
        pages: Counter[MemorySlot] = Counter()
        for found in self._rounds:
            pages.update({slot: dirty.count() for slot, dirty in found.dirty.items()})
        if not pages:
            raise InvalidArgumentError("no picture: there was no round")
        slot = pages.most_common(1)[0][0]
        picture = HeatMap(slot.npages, slot.page_size)
        for found in self._rounds:
            picture.add(found.dirty.get(slot, DirtyBitmap(slot.npages)), found.seconds)
        picture.save(path, f"{title} {slot.name or hex(slot.host_address)}" if slot.permissions else title)

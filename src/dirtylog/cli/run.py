"""``dirtylog run``: log a guest or a process, round by round."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dirtylog.bitmap import DirtyBitmap
from dirtylog.cli import arguments, targets
from dirtylog.cli.command import Command
from dirtylog.cli.exits import ExitCode
from dirtylog.cli.reports import Document, Lines, Report, Text
from dirtylog.cli.session import conclude, log_in_rounds
from dirtylog.dirty_log import DirtyLog
from dirtylog.errors import InvalidArgumentError
from dirtylog.observe.heatmap import HeatMap

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
        targets.add_target(parser)
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

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Open the target, log it, and print what was found."""
        if args.heatmap is not None:
            arguments.check_output(args.heatmap, force=args.force)
        name, count = targets.name_of(args), args.rounds or (_DEFAULT_ROUNDS if args.program is None else None)
        with targets.open_named(args) as memory, DirtyLog(memory) as log:
            report: Report = (Document if args.json else Lines if args.jsonl else Text)(name, memory)
            pictured = _Pictured()
            memory.resume()
            listeners = (report, pictured) if args.heatmap is not None else (report,)
            status = conclude(memory, log_in_rounds(log, count, args.interval, listeners))
            report.end(status)
            if args.heatmap is not None and status is not ExitCode.INTERRUPTED:
                pictured.save(args.heatmap, name)
                print(f"wrote {args.heatmap}", file=sys.stderr)
        return status


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

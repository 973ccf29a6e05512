"""``dirtylog checkpoint``: save the memory of a guest or process, at first as a whole, then what was written since."""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dirtylog.checkpoint.codecs import CHECKSUMS, COMPRESSIONS, NONE
from dirtylog.checkpoint.retention import Keep
from dirtylog.checkpoint.saver import Checkpointer
from dirtylog.cli import arguments, targets
from dirtylog.cli.command import Command
from dirtylog.cli.exits import ExitCode, exit_code_of
from dirtylog.cli.progress import Progress
from dirtylog.cli.reports import print_coverage
from dirtylog.cli.session import conclude, told_of
from dirtylog.dirty_log import DirtyLog
from dirtylog.errors import DirtyLogError
from dirtylog.guests.machine import Machine
from dirtylog.size import format_seconds, format_size

if TYPE_CHECKING:
    import argparse

    from dirtylog.target import AnyMemory

_FIRST_SECONDS = 1.0
_PRUNED_SHARE = 4


class Checkpoint(Command):
    """Save checkpoints of a guest's or a process's memory into a folder.

    The first has all memory, each other one what was written since. The target runs on meanwhile, and is paused for the last, short
    round. With --every it goes on until the target ends, after --count, or with Ctrl-C; without, one is saved: of a guest or a
    command when it has run for a second. See them with "dirtylog checkpoints".
    """

    example: ClassVar[str] = "dirtylog checkpoint emu:arm64:hotset -d hotset.ckpt --every 500ms --count 4"

    @staticmethod
    def prepare(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of checkpoint."""
        parser.add_argument("-d", "--directory", type=Path, required=True, metavar="DIR", help="the store; made if it is not there")
        parser.add_argument("--every", type=arguments.seconds, metavar="TIME", help="save one every so often, such as 1s")
        parser.add_argument("--count", type=arguments.count, metavar="N", help="how many (default: 1; with --every, without end)")
        parser.add_argument("--note", default="", help="what to remember them by")
        parser.add_argument(
            "--keep",
            type=arguments.rule,
            action="append",
            metavar="RULE",
            help="keep just these, such as 'last 10'; may be repeated",
        )
        parser.add_argument("--compression", choices=COMPRESSIONS, default=NONE, help="of pages (default: %(default)s)")
        parser.add_argument("--checksum", choices=CHECKSUMS, help="of pages, in a new store (default: xxh3)")
        targets.add_target(parser)

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Open the target, and save."""
        name = targets.name_of(args)
        keep = Keep.of(args.keep) if args.keep else None
        with targets.open_named(args) as memory:
            log = DirtyLog(memory)
            with Checkpointer(log, args.directory, compression=args.compression, checksum=args.checksum) as saver:
                print(f"{' '.join(name.split())}: port {memory.port.name} ({memory.exactness.value})", flush=True)
                memory.resume()
                status = conclude(memory, _save(args, memory, saver, keep))
        print_coverage(memory)
        return status


def _save(args: argparse.Namespace, memory: AnyMemory, saver: Checkpointer, keep: Keep | None) -> ExitCode:
    wait = args.every or (0 if args.target is not None and args.target.startswith("pid:") else _FIRST_SECONDS)
    count = args.count or (None if args.every else 1)
    gaps: dict[str, None] = {}
    try:
        for number in itertools.count(1):
            ending = memory.ending(wait)
            before = time.perf_counter()
            with Progress("checkpoint") as progress:
                saved = saver.save(args.note, progress=progress)
            seconds = time.perf_counter() - before
            gaps |= dict.fromkeys(memory.incomplete)
            print(
                f"checkpoint {saved.id}: {'all memory, ' if saved.whole else ''}{saved.npages} pages, "
                f"{format_size(saved.stored)} stored in {format_seconds(seconds)}",
                flush=True,
            )
            if isinstance(memory, Machine):
                memory.check()
            # To drop one costs more than to save one, where memory is large: so a few at once.
            if keep is not None and number % max(1, keep.last // _PRUNED_SHARE) == 0:
                saver.prune(keep)
            if ending or number == count:
                break
            wait = max(0.0, (args.every or 0) - seconds)
        if keep is not None:
            saver.prune(keep)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except DirtyLogError as error:
        print(f"dirtylog: {error}", file=sys.stderr)
        return exit_code_of(error)
    return told_of(gaps)

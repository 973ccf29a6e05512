"""The command line. The library never prints, parses arguments or exits; this package does nothing else."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from dirtylog.cli.check import Check
from dirtylog.cli.checkpoint import Checkpoint
from dirtylog.cli.copies import Pull, Push
from dirtylog.cli.demo import Demo
from dirtylog.cli.exits import ExitCode, exit_code_of
from dirtylog.cli.export import Export
from dirtylog.cli.rate import Rate
from dirtylog.cli.record import Record
from dirtylog.cli.report import Report
from dirtylog.cli.restore import Restore
from dirtylog.cli.run import Run
from dirtylog.cli.stores import Checkpoints, Diff, Prune, Verify
from dirtylog.cli.top import Top
from dirtylog.errors import DirtyLogError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dirtylog.cli.command import Command

COMMANDS: tuple[type[Command], ...] = (
    *(Check, Run, Rate, Top, Record, Report, Export),
    *(Checkpoint, Checkpoints, Restore, Verify, Diff, Prune, Push, Pull),
    Demo,
)

_EPILOG = """exit status: 0 done; 1 failed; 2 usage; 3 this host cannot; 4 permission; 5 the target vanished;
6 done, but coverage was incomplete; 7 verification found a difference; 130 interrupted"""


def parser() -> argparse.ArgumentParser:
    """Return the whole parser."""
    top = argparse.ArgumentParser(
        prog="dirtylog",
        description="Which pages were written since I last asked?",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = top.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        text = (command.__doc__ or "").strip()
        sub = subparsers.add_parser(
            command.__name__.lower(),
            help=text.splitlines()[0].rstrip("."),
            description=text,
            epilog=f"example: {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.prepare(sub)
        sub.set_defaults(command=command)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; usage errors leave through SystemExit(2), as argparse does it."""
    words = list(sys.argv[1:] if argv is None else argv)
    # What follows -- is a program's own command line: argparse would look for our options in it.
    end = words.index("--") if "--" in words else len(words)
    args = parser().parse_args(words[:end], argparse.Namespace(program=words[end + 1 :] if end < len(words) else None))
    try:
        status = args.command().run(args)
        sys.stdout.flush()
    except DirtyLogError as error:
        print(f"dirtylog: {error}", file=sys.stderr)
        return exit_code_of(error)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone. Python would say so again when it closes stdout: give it another one.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    return int(status)

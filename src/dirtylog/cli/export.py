"""``dirtylog export``: a recording in other formats."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dirtylog.cli import arguments
from dirtylog.cli.command import Command
from dirtylog.cli.exits import ExitCode
from dirtylog.errors import InvalidArgumentError
from dirtylog.recording.export import TEXT_FORMATS, write_parquet
from dirtylog.recording.reader import Recording

if TYPE_CHECKING:
    import argparse


class Export(Command):
    """Write a recording in another format.

    csv has a line a run of dirty pages, parquet a row; jsonl an object a round, after a first one with the facts. Exits 7 where
    the recording is damaged.
    """

    example: ClassVar[str] = "dirtylog export hotset.dlog --to csv -o hotset.csv"

    @staticmethod
    def prepare(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of export."""
        parser.add_argument("file", metavar="FILE", type=Path, help="what dirtylog record wrote")
        parser.add_argument("--to", choices=[*TEXT_FORMATS, "parquet"], required=True, help="the format")
        parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to (default: stdout; parquet needs a file)")
        parser.add_argument("-f", "--force", action="store_true", help="replace the output if it exists")

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Read and write; a file has its name when it is whole."""
        if args.output is None:
            if args.to == "parquet":
                raise InvalidArgumentError("parquet is no text", remedy="name a file with -o")
            with Recording(args.file) as recording:
                TEXT_FORMATS[args.to](recording, sys.stdout)
            return ExitCode.DONE
        arguments.check_output(args.output, force=args.force)
        with Recording(args.file) as recording, arguments.written(args.output) as part:
            if args.to == "parquet":
                write_parquet(recording, part)
            else:
                with part.open("w", encoding="utf-8", newline="") as out:
                    TEXT_FORMATS[args.to](recording, out)
        print(f"wrote {os.fspath(args.output)}", file=sys.stderr)
        return ExitCode.DONE

"""``dirtylog report``: a page, or a picture, of a recording."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dirtylog.cli import arguments
from dirtylog.cli.command import Command
from dirtylog.cli.exits import ExitCode
from dirtylog.errors import InvalidArgumentError
from dirtylog.recording.reader import Recording
from dirtylog.report.page import page
from dirtylog.report.picture import picture

if TYPE_CHECKING:
    import argparse

_PAGE = ".html"
_PICTURES = (".png", ".svg", ".pdf")


class Report(Command):
    """Show a recording: as a page for the browser, or as a picture.

    FILE is what "dirtylog record" wrote; it may still be being written. The page (.html) has which pages were written when, to zoom
    down to single pages and rounds, how much is written within a time, what a live migration would come to, and the hottest memory
    with the names of variables where they are known. It is one file, and needs no network. The picture (.png, .svg, .pdf) has the
    first two, for papers. Exits 6 where the recording may have missed writes, and says which.
    """

    example: ClassVar[str] = "dirtylog report hotset.dlog -o hotset.html"

    @staticmethod
    def prepare(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of report."""
        parser.add_argument("file", type=Path, metavar="FILE", help="the recording")
        parser.add_argument(
            "-o", "--output", type=Path, required=True, metavar="OUTPUT", help="the page (.html) or picture (.png, .svg, .pdf)"
        )
        parser.add_argument("-f", "--force", action="store_true", help="replace OUTPUT if it exists")

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Read the recording and write the output."""
        suffix = args.output.suffix.lower()
        if suffix not in (_PAGE, *_PICTURES):
            raise InvalidArgumentError(
                f"{str(args.output)!r} must end in {', '.join((_PAGE, *_PICTURES))}: that says what it is to be"
            )
        arguments.check_output(args.output, force=args.force)
        with Recording(args.file) as recording:
            if suffix == _PAGE:
                text = page(recording)
                with arguments.written(args.output) as part:
                    part.write_text(text, "utf-8")
            else:
                with arguments.written(args.output) as part:
                    picture(recording, part, suffix[1:])
            print(f"wrote {args.output}", file=sys.stderr)
            return _told(recording)


def _told(recording: Recording) -> ExitCode:
    """Say what is missing from the recording, and return the exit status."""
    if recording.facts["status"] is None:
        print("dirtylog: the recording was not ended; its last round may be missing", file=sys.stderr)
    if recording.facts["incomplete"]:
        print(f"dirtylog: writes may have been missed: {'; '.join(recording.facts['incomplete'])}", file=sys.stderr)
    missed = recording.facts["incomplete"] or recording.facts["status"] == ExitCode.INCOMPLETE
    return ExitCode.INCOMPLETE if missed else ExitCode.DONE

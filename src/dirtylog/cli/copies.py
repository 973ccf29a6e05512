"""``dirtylog push`` and ``dirtylog pull``: copies of a store elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dirtylog.checkpoint.remote import pull, push
from dirtylog.checkpoint.store import Store
from dirtylog.cli.command import Command
from dirtylog.cli.exits import ExitCode
from dirtylog.cli.progress import Progress
from dirtylog.cli.stores import add_store
from dirtylog.size import format_size

if TYPE_CHECKING:
    import argparse

    from dirtylog.checkpoint.manifest import Transferred

_URL = "where the copy is, as fsspec writes it: s3://bucket/name, a folder, ..."


class Push(Command):
    """Make a copy elsewhere one of a store as it is now: only what is missing there is sent.

    A push that was cut off goes on when it is given again; until then the copy is what it was.
    """

    example: ClassVar[str] = "dirtylog push hotset.ckpt hotset.copy"

    @staticmethod
    def prepare(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of push."""
        add_store(parser)
        parser.add_argument("url", metavar="URL", help=_URL)
        parser.add_argument("--read-back", action="store_true", help="fetch what was sent, and compare")

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Send it."""
        with Store(args.directory) as store, Progress("push") as progress:
            sent = push(store, args.url, progress=progress, read_back=args.read_back)
        print(f"sent {_told(sent)} to {args.url}")
        return ExitCode.DONE


class Pull(Command):
    """Make a folder a store like a copy elsewhere: only what is missing here is fetched, and verified on arrival."""

    example: ClassVar[str] = "dirtylog pull hotset.copy hotset.pulled"

    @staticmethod
    def prepare(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of pull."""
        parser.add_argument("url", metavar="URL", help=_URL)
        parser.add_argument("directory", metavar="DIR", type=Path, help="the store; made if it is not there")
        parser.add_argument("--check", action="store_true", help="read what is here already, too, and fetch what is damaged")

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Fetch it."""
        with Progress("pull") as progress:
            fetched = pull(args.url, args.directory, progress=progress, check=args.check)
        print(f"fetched {_told(fetched)} into {args.directory}")
        return ExitCode.DONE


def _told(moved: Transferred) -> str:
    return f"{moved.objects} objects, {format_size(moved.nbytes)} of {format_size(moved.total)},"

"""``dirtylog checkpoints``, ``verify``, ``prune`` and ``diff``: what is in a store of checkpoints."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dirtylog.checkpoint.differences import diff
from dirtylog.checkpoint.retention import Keep, prune
from dirtylog.checkpoint.store import Store
from dirtylog.checkpoint.verify import verify
from dirtylog.cli import arguments
from dirtylog.cli.command import Command
from dirtylog.cli.exits import ExitCode
from dirtylog.cli.progress import Progress
from dirtylog.size import format_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from dirtylog.checkpoint.store import Checkpoint

SCHEMA = "dirtylog/checkpoints/1"


def add_store(parser: argparse.ArgumentParser) -> None:
    """Add DIR."""
    parser.add_argument("directory", metavar="DIR", type=Path, help="a store of checkpoints")


class Checkpoints(Command):
    """List the checkpoints of a store, as a tree: each one under the one that it adds to."""

    example: ClassVar[str] = "dirtylog checkpoints hotset.ckpt"

    @staticmethod
    def prepare(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of checkpoints."""
        add_store(parser)
        parser.add_argument("--json", action="store_true", help="print one JSON document")

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Print them."""
        with Store(args.directory) as store:
            found = store.checkpoints()
        if args.json:
            rows = [asdict(one) | {"nbytes": one.nbytes, "extra": len(one.extra)} for one in found]
            print(json.dumps({"schema": SCHEMA, "checkpoints": rows}))
            return ExitCode.DONE
        print(f"{'checkpoint':<14} {'saved':<19} {'memory':>10} {'new pages':>10} {'stored':>10}  note")
        for depth, one in _tree(found):
            name = f"{'  ' * min(depth, 4)}{one.id}{' (whole)' if one.whole else ''}"
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.created))
            size, stored = format_size(one.nbytes), format_size(one.stored)
            print(f"{name:<14} {when} {size:>10} {one.npages:>10} {stored:>10}  {one.note}".rstrip())
        return ExitCode.DONE


def _tree(found: Sequence[Checkpoint]) -> list[tuple[int, Checkpoint]]:
    """Return checkpoints with how deep each stands: a branch is deeper, and a line of single children is not."""
    children: dict[int | None, list[Checkpoint]] = {}
    for one in found:
        children.setdefault(None if one.whole else one.parent, []).append(one)
    rows: list[tuple[int, Checkpoint]] = []
    left = [(0, one) for one in reversed(children.get(None, []))]
    while left:
        depth, one = left.pop()
        rows.append((depth, one))
        below = children.get(one.id, [])
        left += [(depth + (len(below) > 1 or one.whole), child) for child in reversed(below)]
    return rows


class Verify(Command):
    """Check every page of every checkpoint against its checksum. Exits 7 if one differs, and names it."""

    example: ClassVar[str] = "dirtylog verify hotset.ckpt"

    @staticmethod
    def prepare(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of verify."""
        add_store(parser)

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Check, and print what differs."""
        with Store(args.directory) as store, Progress("verify") as progress:
            found = verify(store, progress)
            count = len(store.checkpoints())
        for one in found:
            where = "" if one.checkpoint is None else f"checkpoint {one.checkpoint}, "
            pages = "" if one.first is None else f", page{'s' * (one.npages > 1)} {_range(one.first, one.npages)}"
            print(f"{where}{one.slot}{pages}: {one.reason}")
        print(f"{count} checkpoints, {f'{len(found)} differences' if found else 'all pages are as they were saved'}")
        return ExitCode.DIFFERENT if found else ExitCode.DONE


class Prune(Command):
    """Drop checkpoints, but for those to keep, and get their room back.

    The newest one always stays. Rules add up: --keep 'last 10' --keep 'hourly 24' --keep 'daily 7'.
    """

    example: ClassVar[str] = "dirtylog prune hotset.ckpt --keep 'last 2'"

    @staticmethod
    def prepare(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of prune."""
        add_store(parser)
        parser.add_argument(
            "--keep",
            type=arguments.rule,
            action="append",
            required=True,
            metavar="RULE",
            help="last, hourly, daily or weekly, and how many",
        )
        parser.add_argument("--dry-run", action="store_true", help="say what would be dropped, and drop nothing")

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Drop them."""
        keep = Keep.of(args.keep)
        with Store(args.directory, write=not args.dry_run, create=False) as store:
            found = store.checkpoints()
            kept = keep.chosen(found) if found else set()
            if args.dry_run:
                dropped = ", ".join(str(one.id) for one in found if one.id not in kept)
                print(f"would keep {len(kept)} of {len(found)} checkpoints, and drop {dropped or 'none'}")
                return ExitCode.DONE
            freed = prune(store, keep)
        print(f"dropped {freed.checkpoints} checkpoints, freed {format_size(freed.nbytes)}; {len(kept)} are left")
        return ExitCode.DONE


class Diff(Command):
    """Say which pages two checkpoints have different."""

    example: ClassVar[str] = "dirtylog diff hotset.ckpt 1 2"

    @staticmethod
    def prepare(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of diff."""
        add_store(parser)
        parser.add_argument("first", metavar="A", type=arguments.count, help="a checkpoint")
        parser.add_argument("second", metavar="B", type=arguments.count, help="another one")
        parser.add_argument("--json", action="store_true", help="print one JSON document, with pages as [first, number]")

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Print the runs of pages."""
        with Store(args.directory) as store:
            found = diff(store, args.first, args.second)
        if args.json:
            slots = [{"slot": one.slot.label, "id": one.slot.id, "runs": one.runs.tolist(), "only": one.only} for one in found]
            print(json.dumps({"schema": "dirtylog/diff/1", "first": args.first, "second": args.second, "slots": slots}))
            return ExitCode.DONE
        for one in found:
            pages = int(one.runs[:, 1].sum())
            if one.only is not None:
                print(f"{one.slot.label}: only in checkpoint {one.only}, {pages} pages")
                continue
            print(f"{one.slot.label}: {pages} pages in {len(one.runs)} runs, {format_size(pages * one.slot.page_size)}")
            for first, npages in one.runs.tolist():
                print(f"  {_range(first, npages)}")
        if not found:
            print("no page differs")
        return ExitCode.DONE


def _range(first: int, npages: int) -> str:
    return str(first) if npages == 1 else f"{first} to {first + npages - 1}"

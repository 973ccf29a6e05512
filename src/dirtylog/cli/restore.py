"""``dirtylog restore``: a checkpoint as files."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from dirtylog.checkpoint.arrays import array_of
from dirtylog.checkpoint.restore import read_slot, write_slot
from dirtylog.checkpoint.store import Store
from dirtylog.cli import arguments
from dirtylog.cli.command import Command
from dirtylog.cli.exits import ExitCode
from dirtylog.cli.progress import Progress
from dirtylog.cli.stores import add_store
from dirtylog.errors import InvalidArgumentError
from dirtylog.size import format_size

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from dirtylog.checkpoint.store import Checkpoint, SlotLayout


class Restore(Command):
    """Write the memory of a checkpoint into files, one a slot; every page is verified.

    Arrays become .npy files, all else raw memory in .bin files, named by the slot. A file has its name when it is whole. To put a
    checkpoint back into a guest that runs on, use dirtylog.Checkpointer.
    """

    example: ClassVar[str] = "dirtylog restore hotset.ckpt -o restored"

    @staticmethod
    def prepare(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of restore."""
        add_store(parser)
        parser.add_argument("checkpoint", nargs="?", type=arguments.count, metavar="ID", help="which (default: the newest)")
        parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where to; made if it is not there")
        parser.add_argument("-f", "--force", action="store_true", help="replace files that exist")

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Read and write."""
        if args.output.absolute() == args.directory.absolute() or args.directory.absolute() in args.output.absolute().parents:
            raise InvalidArgumentError(f"{str(args.output)!r} lies in the store itself", remedy="name another folder")
        with Store(args.directory) as store:
            checkpoint = store.checkpoint(args.checkpoint)
            arguments.make_folder(args.output)
            paths = _paths(checkpoint, args.output)
            for _, path in paths:
                arguments.check_output(path, force=args.force)
            with Progress("restore") as progress:
                _write(store, checkpoint, paths, progress)
        print(f"restored checkpoint {checkpoint.id}: {format_size(checkpoint.nbytes)} in {len(paths)} files in {args.output}")
        return ExitCode.DONE


def _write(store: Store, checkpoint: Checkpoint, paths: Sequence[tuple[SlotLayout, Path]], progress: Progress) -> None:
    maps = store.maps(checkpoint.id)
    done = 0
    for slot, path in paths:
        with arguments.written(path) as part, part.open("wb") as out:
            if slot.array is None:
                out.truncate(slot.nbytes)
                write_slot(store, maps[slot.key], slot.page_size, out.fileno())
            else:
                whole = np.empty((slot.npages, slot.page_size), np.uint8)
                read_slot(store, maps[slot.key], whole)
                np.save(out, array_of(whole, slot))
        done += slot.nbytes
        progress(done, checkpoint.nbytes)
        print(f"wrote {path}", file=sys.stderr)


def _paths(checkpoint: Checkpoint, folder: Path) -> list[tuple[SlotLayout, Path]]:
    """Return a file for each slot: of its name as far as a file may have it, and its address."""
    paths: dict[Path, SlotLayout] = {}
    for slot in checkpoint.slots:
        word = re.sub(r"[^A-Za-z0-9_.-]+", "_", slot.name.rpartition("/")[2])[:80].strip("._")
        if slot.array is not None:
            path = folder / f"{word or 'array'}.npy"
        else:
            path = folder / f"{slot.base_gfn * slot.page_size:012x}{'-' * bool(word)}{word}.bin"
        if path in paths:
            path = path.with_stem(f"{path.stem}-{slot.key}")
        paths[path] = slot
    return [(slot, path) for path, slot in paths.items()]

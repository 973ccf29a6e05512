"""``dirtylog demo``: the main job on every architecture, and a picture."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from dirtylog.cli import arguments
from dirtylog.cli.command import Command
from dirtylog.cli.exits import ExitCode
from dirtylog.dirty_log import DirtyLog
from dirtylog.emulated.arch import PORTS
from dirtylog.emulated.guest import make_guest
from dirtylog.errors import UnsupportedError
from dirtylog.guests.machine import RAM_SLOT
from dirtylog.observe.heatmap import HeatMap
from dirtylog.observe.rounds import rounds

if TYPE_CHECKING:
    import argparse

_SIZE = 16 << 20
_ROUNDS = 10
_INTERVAL = 0.05
_PICTURE_SIZE = 64 << 20
_PICTURE_ROUNDS = 80


class Demo(Command):
    """Watch dirty page logging work on a guest of every architecture, and draw a heat map.

    Each guest runs without a stop while its memory is copied: after each get, the pages that it reports are copied again.
    In the end the guest is paused, and after one last get the copy must equal its memory. Exits 7 if one differs.
    """

    example: ClassVar[str] = "dirtylog demo -o demo.png"

    @staticmethod
    def prepare(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of demo."""
        parser.add_argument("-o", "--output", type=Path, default=Path("demo.png"), help="the picture (default: %(default)s)")
        parser.add_argument("-f", "--force", action="store_true", help="replace the picture if it exists")

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Run a guest on each port, then the long run."""
        arguments.check_output(args.output, force=args.force)
        print(f"A guest of {_SIZE >> 20} MiB on each port writes its memory while {_ROUNDS} gets copy what it wrote.")
        print(f"{'port':<10} {'pages reported':>15} {'get ms':>8} {'faults':>8}   copy equals memory")
        status = ExitCode.DONE
        for name in PORTS:
            try:
                if not _copy_running_guest(name):
                    status = ExitCode.DIFFERENT
            except UnsupportedError as error:
                print(f"{name:<10} skipped: {error}")
                status = ExitCode.CANNOT
        print(f"\nFour vCPUs of an x86 guest of {_PICTURE_SIZE >> 20} MiB: three write a hot set each, the last sweeps it all.")
        _draw(args.output)
        print(f"wrote {args.output}: which pages were written, round by round")
        return status


def _copy_running_guest(name: str) -> bool:
    with make_guest(name, _SIZE, program="random", vcpus=1) as memory, DirtyLog(memory) as log:
        slot = memory.slots[RAM_SLOT]
        copy = memory.read(slot.id, np.arange(slot.npages))
        memory.resume()
        pages, seconds = 0, 0.0
        for found in rounds(log, _ROUNDS, _INTERVAL):
            dirty = found.dirty[slot].pages()
            copy[dirty] = memory.read(slot.id, dirty)
            pages, seconds = pages + len(dirty), seconds + found.get_seconds
        memory.pause()
        memory.check()
        dirty = log.get(slot.id).pages()
        copy[dirty] = memory.read(slot.id, dirty)
        same = bool(np.array_equal(copy, memory.read(slot.id, np.arange(slot.npages))))
        get_ms = seconds / _ROUNDS * 1e3
        print(
            f"{name:<10} {pages + len(dirty):>15} {get_ms:>8.2f} {memory.stats.faults:>8}   {'yes' if same else 'NO'}", flush=True
        )
        return same


def _draw(path: Path) -> None:
    with make_guest("x86", _PICTURE_SIZE, program="hotset", vcpus=4) as memory, DirtyLog(memory) as log:
        slot = memory.slots[RAM_SLOT]
        picture = HeatMap(slot.npages, slot.page_size)
        began = time.perf_counter()
        pages = 0
        memory.resume()
        for found in rounds(log, _PICTURE_ROUNDS, _INTERVAL):
            picture.add(found.dirty[slot], found.seconds)
            pages += found.dirty_pages
        memory.pause()
        memory.check()
        print(f"{_PICTURE_ROUNDS} rounds in {time.perf_counter() - began:.1f} s, {pages} pages reported")
        picture.save(path, "Hot-set guest, x86, 4 vCPUs: pages written in each round")

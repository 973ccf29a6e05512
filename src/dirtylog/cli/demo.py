"""``dirtylog demo``: the main job on every source that this host has, and a picture."""

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
from dirtylog.errors import AccessDeniedError, UnsupportedError
from dirtylog.guests.machine import RAM_SLOT
from dirtylog.observe.heatmap import HeatMap
from dirtylog.observe.rounds import rounds
from dirtylog.options import Log
from dirtylog.size import format_size
from dirtylog.target import open_guest

if TYPE_CHECKING:
    import argparse

    from dirtylog.emulated.machine import EmulatedMemory
    from dirtylog.kvm.memory import KvmMemory

_SIZE = 16 << 20
_ROUNDS = 10
_INTERVAL = 0.05
_PICTURE_ROUNDS = 80
# A KVM guest writes some ten times as fast: its picture needs more memory to show a sweep.
_PICTURE_SIZES = {"kvm": 256 << 20, "emu:x86": 64 << 20}


class Demo(Command):
    """Watch dirty page logging work on every source that this host has, and draw a heat map.

    Each guest, KVM's with each of the kernel's logs and those of ten emulated architectures, runs without a stop while its memory
    is copied: after each get, the pages that it reports are copied again. In the end the guest is paused, and after one last get
    the copy must equal its memory. Exits 7 if one differs.
    """

    example: ClassVar[str] = "dirtylog demo -o demo.png"

    @staticmethod
    def prepare(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of demo."""
        parser.add_argument("-o", "--output", type=Path, default=Path("demo.png"), help="the picture (default: %(default)s)")
        parser.add_argument("-f", "--force", action="store_true", help="replace the picture if it exists")

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Run a guest on each port, then the long run on the best source."""
        arguments.check_output(args.output, force=args.force)
        print(f"A guest of {_SIZE >> 20} MiB on each port writes its memory while {_ROUNDS} gets copy what it wrote.")
        print(f"{'port':<10} {'pages reported':>15} {'get ms':>8}   copy equals memory")
        best, different, missing = "emu:x86", False, False
        for log in Log:
            try:
                different |= not _copy_running_guest("kvm:random", log.value)
                best = "kvm"
            except (UnsupportedError, AccessDeniedError) as error:
                print(f"kvm-{log.value:<6} skipped: {error}")
        for name in PORTS:
            try:
                different |= not _copy_running_guest(f"emu:{name}:random")
            except UnsupportedError as error:
                print(f"{name:<10} skipped: {error}")
                missing = True
        _draw(best, args.output)
        print(f"wrote {args.output}: which pages were written, round by round")
        if different:
            return ExitCode.DIFFERENT
        return ExitCode.CANNOT if missing else ExitCode.DONE


def _copy_running_guest(target: str, log_of_kvm: str | None = None) -> bool:
    with open_guest(target, size=_SIZE, log=log_of_kvm) as memory, DirtyLog(memory) as log:
        slot = memory.slots[RAM_SLOT]
        copy = memory.read(slot.id, np.arange(slot.npages))
        memory.resume()
        pages, seconds = 0, 0.0
        for found in rounds(log, _ROUNDS, _INTERVAL):
            pages, seconds = pages + _copy(memory, found.dirty[slot].pages(), copy), seconds + found.get_seconds
        memory.pause()
        memory.check()
        pages += _copy(memory, log.get(slot.id).pages(), copy)
        same = bool(np.array_equal(copy, memory.read(slot.id, np.arange(slot.npages))))
        print(f"{memory.port.name:<10} {pages:>15} {seconds / _ROUNDS * 1e3:>8.2f}   {'yes' if same else 'NO'}", flush=True)
        return same


def _copy(memory: EmulatedMemory | KvmMemory, dirty: np.ndarray[tuple[int], np.dtype[np.int64]], copy: np.ndarray) -> int:
    copy[dirty] = memory.read(RAM_SLOT, dirty)
    return len(dirty)


def _draw(target: str, path: Path) -> None:
    nbytes = _PICTURE_SIZES[target]
    print(f"\nFour vCPUs of a guest of {format_size(nbytes)} ({target}): three write a hot set each, the last sweeps it all.")
    with open_guest(f"{target}:hotset", size=nbytes, vcpus=4) as memory, DirtyLog(memory) as log:
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
        picture.save(path, f"Hot-set guest, {memory.port.name}, 4 vCPUs: pages written in each round")

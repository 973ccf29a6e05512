"""``dirtylog demo``: the main job on every source that this host has, and a picture."""

from __future__ import annotations

import tempfile
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
from dirtylog.observe.rounds import rounds
from dirtylog.options import Log
from dirtylog.recording.reader import Recording
from dirtylog.recording.recorder import Recorder
from dirtylog.report.page import page
from dirtylog.report.picture import picture
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
    """Watch dirty page logging work on every kind of guest that this host has, and draw what a guest writes.

    Each guest, KVM's with each of the kernel's logs and those of ten emulated architectures, runs without a stop while its memory
    is copied: after each get, the pages that it reports are copied again. In the end the guest is paused, and after one last get
    the copy must equal its memory. Exits 7 if one differs. At the end stand a picture and a report, a page for a browser.
    """

    example: ClassVar[str] = "dirtylog demo -o demo.png"

    @staticmethod
    def prepare(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of demo."""
        parser.add_argument(
            "-o",
            "--output",
            type=Path,
            default=Path("demo.png"),
            help="the picture (default: %(default)s); the report is beside it, in .html",
        )
        parser.add_argument("-f", "--force", action="store_true", help="replace the picture if it exists")

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Run a guest on each port, then the long run on the best source."""
        report = args.output.with_suffix(".html")
        for path in (args.output, report):
            arguments.check_output(path, force=args.force)
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
        with tempfile.TemporaryDirectory() as folder:
            recorded = Path(folder) / "demo.dlog"
            _record(best, recorded)
            missing |= not _draw(recorded, args.output, report)
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


def _record(target: str, path: Path) -> None:
    nbytes = _PICTURE_SIZES[target]
    print(f"\nFour vCPUs of a guest of {format_size(nbytes)} ({target}): three write a hot set each, the last sweeps it all.")
    with open_guest(f"{target}:hotset", size=nbytes, vcpus=4) as memory, DirtyLog(memory) as log:
        with Recorder(path, memory, target=f"{target}:hotset, 4 vCPUs") as recorder:
            began = time.perf_counter()
            pages = 0
            memory.resume()
            for found in rounds(log, _PICTURE_ROUNDS, _INTERVAL):
                recorder.add(found)
                pages += found.dirty_pages
            memory.pause()
            memory.check()
        print(f"{_PICTURE_ROUNDS} rounds in {time.perf_counter() - began:.1f} s, {pages} pages reported")


def _draw(recorded: Path, output: Path, report: Path) -> bool:
    """Draw the picture and the page; return whether both could be."""
    complete = True
    with Recording(recorded) as recording:
        for path, what in (
            (output, "which pages were written, round by round"),
            (report, "the same to zoom into, with the dirty rate and what a migration would cost"),
        ):
            try:
                with arguments.written(path) as part:
                    if path == report:
                        part.write_text(page(recording), "utf-8")
                    else:
                        picture(recording, part, output.suffix[1:])
                print(f"wrote {path}: {what}")
            except UnsupportedError as error:
                print(f"skipped {path}: {error}")
                complete = False
    return complete

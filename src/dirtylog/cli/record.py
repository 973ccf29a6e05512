"""``dirtylog record``: every round of a log, in one file."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dirtylog.cli import arguments, targets
from dirtylog.cli.command import Command
from dirtylog.cli.exits import ExitCode, exit_code_of
from dirtylog.cli.reports import print_coverage
from dirtylog.cli.session import conclude, log_in_rounds
from dirtylog.dirty_log import DirtyLog
from dirtylog.errors import DirtyLogError
from dirtylog.observe.metrics import Metrics
from dirtylog.recording.marks import GUEST_PORT, GuestMarks, WrittenMarks
from dirtylog.recording.recorder import Recorder
from dirtylog.size import format_seconds, format_size

if TYPE_CHECKING:
    import argparse

    from dirtylog.cli.session import Listener
    from dirtylog.observe.rounds import Round
    from dirtylog.target import AnyMemory


class Record(Command):
    """Record which pages a guest or process writes, round by round, into one file.

    It ends with the target, after --duration, or with Ctrl-C; the file can be read at any time, also after the recorder was killed:
    with "dirtylog report" and "dirtylog export", dirtylog.Recording, or any SQLite. A line typed meanwhile sets a mark in it, and
    so does one written to the pipe of --marks, or by a KVM guest to I/O port 0xe9.
    """

    example: ClassVar[str] = "dirtylog record emu:arm64:hotset -o hotset.dlog --duration 3s"

    @staticmethod
    def prepare(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of record."""
        parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the recording")
        parser.add_argument("-f", "--force", action="store_true", help="replace FILE if it exists")
        parser.add_argument("-d", "--duration", type=arguments.seconds, metavar="TIME", help="how long, such as 30s or 10min")
        parser.add_argument("--rounds", type=arguments.count, metavar="N", help="how many rounds")
        parser.add_argument(
            "--interval", type=arguments.seconds, default=0.1, metavar="TIME", help="length of a round (default: %(default)s s)"
        )
        parser.add_argument("--marks", type=Path, metavar="PIPE", help="a named pipe to read marks from; made if it is not there")
        targets.add_metrics(parser)
        targets.add_target(parser)

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Open the target, record it, and say what is in the file."""
        name = targets.name_of(args)
        with contextlib.ExitStack() as resources:
            metrics = resources.enter_context(Metrics.serving(args.metrics, args.metrics_address, name))
            memory = targets.open_named(args)
            resources.callback(memory.close)
            log = resources.enter_context(DirtyLog(memory))
            recorder = Recorder(args.output, memory, target=name, image=args.image, overwrite=args.force)
            resources.callback(_close_quietly, recorder)
            bus = getattr(memory, "bus", None)
            if bus is not None:
                bus.attach_port(GUEST_PORT, GuestMarks(recorder.mark))
            summary = _Summary(memory)
            listeners: list[Listener] = [recorder, summary, *metrics.listeners(memory)]
            # A command reads the terminal itself.
            with WrittenMarks(recorder.mark, pipe=args.marks, terminal=args.program is None):
                memory.resume()
                status = log_in_rounds(log, args.rounds, args.interval, listeners, duration=args.duration)
            status = conclude(memory, status)
            try:
                recorder.close(int(status))
            except DirtyLogError as error:
                if status in (ExitCode.DONE, ExitCode.INTERRUPTED):
                    print(f"dirtylog: {error}", file=sys.stderr)
                    status = exit_code_of(error)
            summary.print(name, args.output)
        return status


def _close_quietly(recorder: Recorder) -> None:
    """Close what is open still because of an error, which is the one to tell."""
    with contextlib.suppress(DirtyLogError):
        recorder.close(int(ExitCode.FAILED))


class _Summary:
    """Counts what was recorded."""

    def __init__(self, memory: AnyMemory) -> None:
        self._memory = memory
        self._rounds = self._runs = self._pages = self._bytes = 0
        self._seconds = self._get_seconds = 0.0

    def add(self, found: Round) -> None:
        """Count a round."""
        self._rounds, self._runs, self._pages = self._rounds + 1, self._runs + len(found.runs()), self._pages + found.dirty_pages
        self._bytes += found.dirty_bytes
        self._seconds, self._get_seconds = self._seconds + found.seconds, self._get_seconds + found.get_seconds

    def print(self, name: str, path: Path) -> None:
        """Print it, with what every result names."""
        memory = self._memory
        size = path.stat().st_size if path.exists() else 0
        rate = self._bytes / 1e6 / self._seconds if self._seconds else 0.0
        page_size = min((slot.page_size for slot in memory.slots), default=0)
        print(f"{' '.join(name.split())}: port {memory.port.name} ({memory.exactness.value}), page size {page_size}")
        print(
            f"wrote {path}: {self._rounds} rounds in {format_seconds(self._seconds) if self._seconds else '0 s'}, "
            f"{self._pages} dirty pages in {self._runs} runs, {rate:.1f} MB/s, {format_size(size)}"
        )
        if self._seconds:
            print(f"gets took {100 * self._get_seconds / self._seconds:.2g} % of the time")
        print_coverage(memory)

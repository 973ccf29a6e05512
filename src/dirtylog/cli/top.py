"""``dirtylog top``: a live view of a log in the terminal."""

from __future__ import annotations

import codecs
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, nullcontext
from typing import IO, TYPE_CHECKING, ClassVar

from dirtylog.cli import arguments, targets
from dirtylog.cli.command import Command
from dirtylog.cli.exits import ExitCode, exit_code_of
from dirtylog.cli.reports import Text, print_coverage
from dirtylog.cli.session import conclude, log_in_rounds
from dirtylog.dirty_log import DirtyLog
from dirtylog.errors import DirtyLogError, UnsupportedError
from dirtylog.size import format_size
from dirtylog.top.model import Model
from dirtylog.top.worker import Worker

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from dirtylog.target import AnyMemory
    from dirtylog.top.app import TopApp

_MB = 1e6
_OF_SIGNALS = 128


class Top(Command):
    """Show live what a guest or process writes: where, how fast, and which of its slots.

    TARGET is what "dirtylog run" takes. The view has a map of the memory in which written pages are hot and cool down, the history
    of the rate, and the slots by rate; ? explains it. What a COMMAND prints is shown when the view has ended. Where stdin, stdout
    or stderr is not a terminal, plain rounds are printed instead, as "dirtylog run" prints them.
    """

    example: ClassVar[str] = "dirtylog top emu:arm64:hotset --vcpus 2 --rounds 50"

    @staticmethod
    def prepare(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of top."""
        targets.add_target(parser)
        parser.add_argument("--rounds", type=arguments.count, metavar="N", help="end after so many (default: with q)")
        parser.add_argument(
            "--interval", type=arguments.seconds, default=0.2, metavar="SECONDS", help="length of a round (default: %(default)s)"
        )

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Open the target, and show it or print it."""
        name = targets.name_of(args)
        if not _has_screen():
            with targets.open_named(args) as memory, DirtyLog(memory) as log:
                report = Text(name, memory)
                memory.resume()
                status = conclude(memory, log_in_rounds(log, args.rounds, args.interval, [report]))
                report.end(status)
            return status
        app_type = _import_app()
        with tempfile.TemporaryFile() as said:
            try:
                return _show(app_type, name, args, said)
            finally:
                said.seek(0)
                sys.stdout.flush()
                shutil.copyfileobj(said, sys.stdout.buffer)


def _show(app_type: type[TopApp], name: str, args: argparse.Namespace, said: IO[bytes]) -> ExitCode:
    with ExitStack() as resources:
        with _standard_files_aside(said) if args.program is not None else nullcontext():
            memory = targets.open_named(args)
        resources.enter_context(memory)
        log = resources.enter_context(DirtyLog(memory))
        model = Model(time.perf_counter())
        worker = Worker(log, memory, model, args.rounds, args.interval)
        app = app_type(name, worker, unicode=_speaks_unicode())
        memory.resume()
        worker.start()
        try:
            ended_by = app.run(mouse=False)
        finally:
            worker.leave()
        status = conclude(memory, _how_it_ended(worker, ended_by, app.return_code))
        if status is ExitCode.DONE and worker.incomplete:
            print(f"dirtylog: writes may have been missed: {'; '.join(worker.incomplete)}", file=sys.stderr)
            status = ExitCode.INCOMPLETE
        _sum_up(name, memory, model)
    if ended_by is signal.SIGTERM:
        raise SystemExit(_OF_SIGNALS + ended_by)
    return status


def _how_it_ended(worker: Worker, ended_by: signal.Signals | None, code_of_app: int | None) -> ExitCode:
    if isinstance(worker.error, DirtyLogError):
        print(f"dirtylog: {worker.error}", file=sys.stderr)
        return exit_code_of(worker.error)
    if worker.error is not None:
        raise worker.error
    if ended_by is not None:
        return ExitCode.INTERRUPTED
    return ExitCode.DONE if code_of_app == 0 else ExitCode.FAILED


def _sum_up(name: str, memory: AnyMemory, model: Model) -> None:
    """Leave in the terminal what the view had last."""
    view = model.view(time.perf_counter(), 1, 1)
    pages = "/".join(str(size) for size in sorted({slot.page_size for slot in memory.slots}))
    print(f"{' '.join(name.split())}: port {memory.port.name} ({memory.exactness.value}), page size {pages or 'unknown'}")
    print(
        f"{view.rounds} rounds in {view.logged:.1f} s: {view.total} pages reported, {view.mean / _MB:.1f} MB/s on average; "
        f"{view.distinct} different ones, {format_size(view.distinct_bytes)}; gets took {view.get_share:.1%} of the time"
    )
    for mark in view.marks:
        print(f"mark {mark.number} at {mark.seconds:.1f} s, {mark.clock}")
    if getattr(memory, "status", None) is not None:
        print(f"the command has ended, exit status {getattr(memory, 'status', None)}")
    print_coverage(memory)


def _has_screen() -> bool:
    """Return whether there is a terminal to draw on and to take keys from. Textual draws on stderr."""
    return os.environ.get("TERM", "dumb") not in ("", "dumb") and all(os.isatty(number) for number in range(3))


def _speaks_unicode() -> bool:
    """Return whether what is drawn is written in UTF-8."""
    encoding = getattr(sys.__stderr__, "encoding", None) or "ascii"
    return codecs.lookup(encoding).name == "utf-8"


@contextmanager
def _standard_files_aside(said: IO[bytes]) -> Iterator[None]:
    """Let a program that is started in the meantime have no keys, and what it prints go to a file: the screen is ours."""
    sys.stdout.flush()
    kept = [os.dup(number) for number in range(3)]
    nothing = os.open(os.devnull, os.O_RDONLY)
    try:
        for number, other in enumerate((nothing, said.fileno(), said.fileno())):
            os.dup2(other, number)
        yield
    finally:
        for number, other in enumerate(kept):
            os.dup2(other, number)
        for number in (*kept, nothing):
            os.close(number)


def _import_app() -> type[TopApp]:
    try:
        from dirtylog.top.app import TopApp  # noqa: PLC0415 - an extra, and slow to import
    except ImportError as error:
        raise UnsupportedError(
            "a live view needs Textual",
            reason=str(error),
            remedy="install it: pip install 'dirtylog[tui]', or pipe the output for plain rounds",
        ) from error
    return TopApp

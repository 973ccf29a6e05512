"""What it costs to record: the recorder's processor time, and the throughput of the target."""

from __future__ import annotations

import mmap
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import dirtylog
from buffer_scene import PAGE_SIZE, compile_c, why_no_uffd
from dirtylog.buffers.program import WrittenBuffer
from dirtylog.dirty_log import DirtyLog
from dirtylog.errors import DirtyLogError
from dirtylog.linux.injection import inject_userfaultfd
from dirtylog.linux.process import ProcessMemory
from dirtylog.observe.rounds import rounds
from dirtylog.options import ProcessOptions, ProcessPorts
from dirtylog.recording.reader import Recording
from dirtylog.recording.recorder import Recorder
from dirtylog.size import format_size
from report import Section, Spread, Target, alternate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dirtylog.target import AnyMemory

_PAGES = 1 << 18
_DIRTY = _PAGES // 100
_INTERVAL = 0.1
_SECONDS = 5.0
_WARM_UP_SECONDS = 0.5
_AT_ONCE = 1 << 12
_CORE_PERCENT = 3.0
_LOST_PERCENT = 1.0
_WAYS = ("not logged", "bare PAGEMAP_SCAN in C", "recorded")


class _Sample(NamedTuple):
    """Of the target at an instant: seconds elapsed, seconds of processor time, sums."""

    elapsed: float
    cpu: float
    sums: int


class _Cost(NamedTuple):
    """Of one recording: percent of a core in all, in gets and in writing; dirty pages a round, and bytes in the file a run."""

    core: float
    gets: float
    writing: float
    pages: float
    bytes_a_run: float


class _Program:
    """A running recorded.c that writes."""

    def __init__(self, executable: Path, folder: Path) -> None:
        counter = folder / "sums"
        counter.write_bytes(bytes(mmap.PAGESIZE))
        self._executable = executable
        self._sums = np.memmap(counter, np.uint64, "r", shape=1)
        command: list[Any] = [executable, "write", counter, str(_PAGES), str(_DIRTY)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE)  # noqa: S603 - our own program
        assert self.process.stdout is not None
        self.start = int(self.process.stdout.readline(), 16)
        self.nbytes = _PAGES * PAGE_SIZE

    def sample(self) -> _Sample:
        return _Sample(time.perf_counter(), _cpu_seconds(self.process.pid), int(self._sums[0]))

    @contextmanager
    def scanned(self) -> Iterator[int]:
        """Have a bare loop log it; give that one's pid."""
        with inject_userfaultfd(self.process.pid) as uffd:
            uffd.register(self.start, self.nbytes)
            where = str(self.process.pid), hex(self.start), hex(self.start + self.nbytes)
            command: list[Any] = [self._executable, "scan", *where]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as scanner:  # noqa: S603 - our own program
                time.sleep(_WARM_UP_SECONDS)
                yield scanner.pid
                printed, _ = scanner.communicate()
                assert int(printed.split()[1]) > _PAGES
            uffd.unregister(self.start, self.nbytes)

    def end(self) -> None:
        """Kill it."""
        with self.process:
            self.process.kill()


def recording_cost(*, quick: bool = False) -> Section:
    """Measure what a recording costs who records and who is recorded."""
    seconds, laps = (1.0, 2) if quick else (_SECONDS, 9)
    size = format_size(_PAGES * PAGE_SIZE)
    section = Section(
        "15. The cost of recording",
        f"A C program stores to {_DIRTY} pages of {size} (1 %), drawn at random, {1 / _INTERVAL:.0f} times a second, and spins "
        f"between: it adds up 4 KiB, over and over, and counts the sums. For {seconds:.0f} s each it is not logged; is logged by a "
        "loop in C that calls PAGEMAP_SCAN as often, which is the anchor; and is recorded; in turn, "
        f"{laps} times. Core: processor time of who logs. Sums: a second of the program's own processor time, which has its write "
        "faults in it, and a second that elapses; over those of the program not logged in the same lap. Buffer and guest: a thread "
        "of this process writes; the time is that of the thread that records.",
    )
    compiler = shutil.which("cc")
    reason = why_no_uffd() or (None if compiler else "skipped: no C compiler")
    if reason is not None:
        section.rows.append({"target": reason})
        return section
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        problem = compile_c(str(compiler), "recorded.c", folder / "recorded")
        if problem is not None:
            section.rows.append({"target": f"skipped: {problem}"})
            return section
        try:
            section.rows, core, lost = _process_rows(folder, seconds, laps)
        except DirtyLogError as error:
            section.rows.append({"target": f"skipped: {error}"})
            return section
        cores = {"process": core}
        for target, opened in _others(size).items():
            try:
                costs = [_record_other(opened, folder, seconds) for _ in range(2 if quick else 3)]
            except DirtyLogError as error:
                section.rows.append(_row(f"{target}, skipped: {error}"))
                continue
            section.rows.append(_row(target, costs))
            if target.startswith("buffer"):
                cores["buffer"] = Spread.of(cost.core for cost in costs).median
    text = f"recording {size} at {1 / _INTERVAL:.0f} rounds a second and 1 % dirty takes at most {_CORE_PERCENT:.0f} % of a core"
    section.targets.append(Target(text, _CORE_PERCENT, "%", cores))
    text = f"a recorded target makes at most {_LOST_PERCENT:.0f} % fewer sums than one that the bare loop logs"
    section.targets.append(Target(text, _LOST_PERCENT, "%", lost))
    return section


def _process_rows(folder: Path, seconds: float, laps: int) -> tuple[list[dict[str, Any]], float, dict[str, float]]:
    """Return the rows of the C program, the recorder's percent of a core, and that of the sums lost to it, by either clock."""
    program = _Program(folder / "recorded", folder)
    by_cpu: dict[str, list[float]] = {way: [] for way in _WAYS}
    by_clock: dict[str, list[float]] = {way: [] for way in _WAYS}
    scanner_core: list[float] = []
    costs: list[_Cost] = []
    try:
        for _, way in alternate(_WAYS, laps):
            with ExitStack() as stack:
                if way == "recorded":
                    maps = [f"{program.start:#x}-{program.start + program.nbytes:#x}"]
                    memory = stack.enter_context(ProcessMemory(program.process.pid, ProcessOptions(ProcessPorts.UFFD, tuple(maps))))
                    log = stack.enter_context(DirtyLog(memory))
                    for _ in rounds(log, round(_WARM_UP_SECONDS / _INTERVAL), _INTERVAL):
                        pass
                    before = program.sample()
                    costs.append(_record(log, folder, seconds, time.process_time))
                elif way == "not logged":
                    before = program.sample()
                    time.sleep(seconds)
                else:
                    scanner = stack.enter_context(program.scanned())
                    before, took = program.sample(), _cpu_seconds(scanner)
                    time.sleep(seconds)
                    scanner_core.append(100 * (_cpu_seconds(scanner) - took) / seconds)
                after = program.sample()
            by_cpu[way].append((after.sums - before.sums) / (after.cpu - before.cpu))
            by_clock[way].append((after.sums - before.sums) / (after.elapsed - before.elapsed))
    finally:
        program.end()
    off, bare, recorded = _WAYS
    rows = [_row(f"process, {way}", sums=(_ratios(by_cpu, way, off), _ratios(by_clock, way, off))) for way in (off, bare)]
    rows[1]["core, %"] = Spread.of(scanner_core)
    rows.append(_row("process, recorded", costs, (_ratios(by_cpu, recorded, off), _ratios(by_clock, recorded, off))))
    clocks = {"processor time": by_cpu, "elapsed time": by_clock}
    lost = {name: 100 * (1 - Spread.of(_ratios(sums, recorded, bare)).median) for name, sums in clocks.items()}
    rows[-1]["more than bare, %"] = Spread.of(cost.core - core for cost, core in zip(costs, scanner_core, strict=True))
    return rows, Spread.of(cost.core for cost in costs).median, lost


def _ratios(sums: dict[str, list[float]], way: str, anchor: str) -> list[float]:
    return [one / other for one, other in zip(sums[way], sums[anchor], strict=True)]


def _others(size: str) -> dict[str, Callable[[], AnyMemory]]:
    """Return what else is recorded, as far as its writer has a share of 1 % or little more."""
    return {
        "buffer:random": lambda: WrittenBuffer(_PAGES * PAGE_SIZE, "random", port="uffd", stores_per_second=_DIRTY / _INTERVAL),
        "kvm:random": lambda: dirtylog.open("kvm:random", size=size),
    }


def _record_other(opened: Callable[[], AnyMemory], folder: Path, seconds: float) -> _Cost:
    memory = opened()
    try:
        if isinstance(memory, WrittenBuffer):
            # As that of the C program: memory that is there. Where none is yet, a get costs several times as much.
            for first in range(0, _PAGES, _AT_ONCE):
                memory.write(0, np.arange(first, first + _AT_ONCE), np.ones((_AT_ONCE, PAGE_SIZE), np.uint8))
        with DirtyLog(memory) as log:
            memory.resume()
            for _ in rounds(log, round(_WARM_UP_SECONDS / _INTERVAL), _INTERVAL):
                pass
            cost = _record(log, folder, seconds, time.thread_time)
            memory.pause()
    finally:
        memory.close()
    return cost


def _record(log: DirtyLog, folder: Path, seconds: float, clock: Callable[[], float]) -> _Cost:
    """Record for a while; ``clock`` is the processor time that counts."""
    path = folder / "recording.dlog"
    writing = 0.0
    begun, began = time.perf_counter(), clock()
    with Recorder(path, log.memory, overwrite=True) as recorder:
        for found in rounds(log, round(seconds / _INTERVAL), _INTERVAL):
            before = clock()
            recorder.add(found)
            writing += clock() - before
        spent, elapsed = clock() - began, time.perf_counter() - begun
    with Recording(path) as recording:
        pages, runs = float(recording.rounds["pages"].mean()), int(recording.rounds["runs"].sum())
    core, written = 100 * spent / elapsed, 100 * writing / elapsed
    return _Cost(core, core - written, written, pages, path.stat().st_size / max(1, runs))


def _row(target: str, costs: list[_Cost] | None = None, sums: tuple[list[float], list[float]] | None = None) -> dict[str, Any]:
    core, gets, writing, pages, bytes_a_run = map(Spread.of, zip(*costs, strict=True)) if costs else ["-"] * 5
    by_cpu, by_clock = map(Spread.of, sums) if sums else ("-", "-")
    return {
        "target": target,
        "core, %": core,
        "more than bare, %": "-",
        "gets, %": gets,
        "writing, %": writing,
        "dirty pages a round": pages,
        "bytes a run": bytes_a_run,
        "sums a second of its own": by_cpu,
        "sums a second": by_clock,
    }


def _cpu_seconds(pid: int) -> float:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9

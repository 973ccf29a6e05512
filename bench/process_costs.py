"""What it costs to attach to another process, and to read its memory."""

from __future__ import annotations

import ctypes
import shutil
import statistics
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from buffer_scene import PAGE_SIZE, compile_c, some_pages, why_no_uffd
from dirtylog.errors import DirtyLogError
from dirtylog.linux import injection
from dirtylog.linux.process import ProcessMemory
from dirtylog.linux.ptrace import Tracee
from dirtylog.linux.reading import runs_of
from dirtylog.options import ProcessOptions, ProcessPorts
from dirtylog.size import format_size
from report import Section, Spread, Target, alternate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_PAUSE_MS = 2.0
_READ_RATIO = 1.25
_PAGES = 1 << 18
_QUICK_PAGES = 1 << 15


class _Program(NamedTuple):
    pid: int
    address: int


class _TimedTracee(Tracee):
    """Notes for how long a thread was stopped: from before it is asked to until after it is let go."""

    stops: list[float] = []  # noqa: RUF012 - one list for all of them
    _began = 0.0

    def stop(self) -> None:
        self._began = time.perf_counter()
        super().stop()

    def detach(self) -> None:
        super().detach()
        self.stops.append(time.perf_counter() - self._began)


def attach_pauses(*, quick: bool) -> Section:
    """Measure how long the thread that makes the system call stands still, in an idle process."""
    section = Section(
        "13. Attaching to a process",
        "An idle process (it waits for its input) is attached to by an injected userfaultfd, again and again. The pause is that of "
        "the one thread that makes the system call, from the request to stop it until it has been let go, seen from here; the "
        "others run on. The whole attach has the checks beforehand and the search for the code, and in ProcessMemory the "
        "mappings and their registration, too.",
    )
    with _program(256) as program:
        if isinstance(program, str):
            section.rows.append({"attach": program})
            return section
        rounds = 50 if quick else 300
        whole = [_attach(program.pid) for _ in range(rounds)]
        memories = [_open(program.pid) for _ in range(rounds // 5)]
        section.rows.append(
            {
                "process": "idle, one thread",
                "pause, ms": Spread.of(seconds * 1e3 for seconds in _TimedTracee.stops),
                "inject_userfaultfd, ms": Spread.of(seconds * 1e3 for seconds in whole),
                "ProcessMemory, ms": Spread.of(seconds * 1e3 for seconds in memories),
                "rounds": str(rounds),
            }
        )
        pause = {"idle": statistics.median(_TimedTracee.stops) * 1e3}
        section.targets.append(Target(f"the attach pause of an idle process at most {_PAUSE_MS} ms", _PAUSE_MS, "ms", pause))
    return section


def process_reads(*, quick: bool) -> Section:
    """Measure the read-out of another process's dirty pages."""
    npages = _QUICK_PAGES if quick else _PAGES
    section = Section(
        "14. Reading the pages of another process",
        f"ProcessMemory.read of some of {format_size(npages * PAGE_SIZE)} into an array that is there already, beside a loop in C "
        "that is given the runs ready-made, and calls process_vm_readv with 1024 of them at a time into the same array; in turn.",
    )
    with _program(npages) as program, tempfile.TemporaryDirectory() as folder:
        if isinstance(program, str):
            section.rows.append({"read": program})
            return section
        path = Path(folder) / "processes.so"
        compile_c("cc", "processes.c", path, "-shared", "-fPIC")
        library = ctypes.CDLL(str(path))
        library.read_runs.restype = ctypes.c_int64
        options = ProcessOptions(ProcessPorts.COMPARE, (f"{program.address:#x}-{program.address + npages * PAGE_SIZE:#x}",))
        with ProcessMemory(program.pid, options) as memory:
            cases = {
                "1 % of the pages, at random": np.sort(some_pages(npages, npages // 100)),
                "every other page": np.arange(0, npages, 2),
                "runs of 16 pages, every other": np.flatnonzero(np.arange(npages) // 16 % 2 == 0),
                "all": np.arange(npages),
            }
            for name, pages in cases.items():
                section.rows.append(_read_row(library, memory, program, name, pages, rounds=5 if quick else 21))
    ratios = section.values("pages", "ratio")
    section.targets.append(Target("a read at most 1.25 times the bare loop (80 % of its speed)", _READ_RATIO, "times", ratios))
    return section


def _read_row(
    library: ctypes.CDLL, memory: ProcessMemory, program: _Program, name: str, pages: NDArray[np.int64], *, rounds: int
) -> dict[str, str | Spread]:
    out = np.ones((len(pages), PAGE_SIZE), np.uint8)
    runs = runs_of(pages, program.address, PAGE_SIZE)
    ms: dict[str, list[float]] = {"read": [], "bare": []}
    for _, way in alternate(tuple(ms), rounds):
        if way == "read":
            begin = time.perf_counter()
            memory.read(0, pages, out)
            ms[way].append((time.perf_counter() - begin) * 1e3)
        else:
            # Safe: the array has room for what the runs are long, and both outlive the call.
            where = ctypes.c_void_p(runs.ctypes.data), ctypes.c_int64(len(runs)), ctypes.c_void_p(out.ctypes.data)
            nanoseconds = library.read_runs(ctypes.c_int(program.pid), *where)
            assert nanoseconds > 0
            ms[way].append(nanoseconds / 1e6)
    assert out[:, 0].all()
    return {
        "pages": name,
        "runs": str(len(runs)),
        "read, ms": Spread.of(ms["read"]),
        "bare loop in C, ms": Spread.of(ms["bare"]),
        "ratio": Spread.of(one / other for one, other in zip(ms["read"], ms["bare"], strict=True)),
        "GB/s": Spread.of(out.nbytes / 1e6 / one for one in ms["read"]),
    }


def _attach(pid: int) -> float:
    """Attach with a tracee that is timed; it is measured where it is used."""
    before = injection.__dict__["Tracee"]
    injection.__dict__["Tracee"] = _TimedTracee
    try:
        begin = time.perf_counter()
        injection.inject_userfaultfd(pid).close()
        return time.perf_counter() - begin
    finally:
        injection.__dict__["Tracee"] = before


def _open(pid: int) -> float:
    begin = time.perf_counter()
    memory = ProcessMemory(pid)
    seconds = time.perf_counter() - begin
    memory.close()
    return seconds


@contextmanager
def _program(npages: int) -> Iterator[_Program | str]:
    """Give an idle process with touched pages, or why there is none."""
    reason = why_no_uffd() or (None if shutil.which("cc") else "skipped: no C compiler")
    if reason is not None:
        yield reason
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "processes"
        compile_c("cc", "processes.c", path)
        with subprocess.Popen([path, str(npages)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # noqa: S603 - our own
            assert process.stdin is not None
            assert process.stdout is not None
            address = int(process.stdout.readline(), 16)
            try:
                injection.inject_userfaultfd(process.pid).close()
            except DirtyLogError as error:
                yield f"skipped: {error}"
            else:
                yield _Program(process.pid, address)
            process.stdin.close()

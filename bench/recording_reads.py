"""What it costs to read a long recording: its runs, and D(t)."""

from __future__ import annotations

import sqlite3
import tempfile
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.bitmap import DirtyBitmap
from dirtylog.observe.rounds import Round
from dirtylog.recording.reader import Recording
from dirtylog.recording.recorder import Recorder
from dirtylog.size import format_size
from null import NullMemory
from report import Section, Spread, Target, alternate

if TYPE_CHECKING:
    from collections.abc import Callable

_PAGES = 1 << 18
_ROUNDS = 6000
_QUICK_ROUNDS = 600
_RUNS = 1667
_SECONDS = 0.1
_LIMIT = 2.0
_FOOTPRINT = "footprint()"
_ANCHOR = "SELECT and zlib.decompress, the anchor"


def recording_reads(*, quick: bool = False) -> Section:
    """Measure what reads the whole of a recording of 10 minutes."""
    count = _QUICK_ROUNDS if quick else _ROUNDS
    laps = 3 if quick else 7
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.dlog"
        _record(path, count)
        size = path.stat().st_size
        ways: dict[str, Callable[[Path], int]] = {_FOOTPRINT: _footprint, "runs()": _runs, _ANCHOR: _inflate}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number, name in alternate(tuple(ways), laps + 1):
            begin = time.thread_time()
            found = ways[name](path)
            took = time.thread_time() - begin
            assert found == count if name == _FOOTPRINT else found > 0
            if number:  # the first lap fills the kernel's cache
                seconds[name].append(took)
    runs = count * _RUNS
    section = Section(
        "16. Reading a long recording",
        f"{count} rounds of {_SECONDS} s, each of {_RUNS} random single pages of {format_size(_PAGES * 4096)}, no two adjacent: "
        f"{runs} runs in {format_size(size)}, {size / runs:.2f} bytes a run. Each way opens the file and reads all of it, in turn. "
        f"The anchor takes the packed rounds out of SQLite and inflates them, and decodes nothing. {laps} laps.",
    )
    section.rows = [
        {
            "what": name,
            "s": Spread.of(took),
            "ns a run": Spread.of(one / runs * 1e9 for one in took),
            "ratio": Spread.of(one / other for one, other in zip(took, seconds[_ANCHOR], strict=True)),
        }
        for name, took in seconds.items()
    ]
    text = f"D(t) of {runs:.2g} runs in at most {_LIMIT} s"
    section.targets.append(Target(text, _LIMIT, "s", {_FOOTPRINT: section.values("what", "s")[_FOOTPRINT]}))
    return section


def _footprint(path: Path) -> int:
    with Recording(path) as recording:
        return int(recording.footprint().windows[0])


def _runs(path: Path) -> int:
    with Recording(path) as recording:
        return len(recording.runs())


def _inflate(path: Path) -> int:
    database = sqlite3.connect(path)
    try:
        return sum(len(zlib.decompress(data)) for (data,) in database.execute("SELECT data FROM rounds ORDER BY round"))
    finally:
        database.close()


def _record(path: Path, count: int) -> None:
    generator = np.random.default_rng(2**16)
    memory = NullMemory(_PAGES)
    (slot,) = memory.slots
    began = time.perf_counter()
    with Recorder(path, memory, target="random single pages") as recorder:
        for number in range(count):
            # Every second page, so that each is a run.
            pages = 2 * generator.choice(_PAGES // 2, _RUNS, replace=False, shuffle=False)
            dirty = {slot: DirtyBitmap.from_pages(_PAGES, pages)}
            recorder.add(Round(number + 1, _SECONDS, 0.0, dirty, began + number * _SECONDS))

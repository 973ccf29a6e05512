"""What it costs to save a checkpoint of an array, against copying the same pages, writing them and one sync."""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dirtylog
from buffer_scene import PAGE_SIZE, why_no_uffd
from checkpoint_scene import BareSaver, Rewritten, full_array, on_disk, pages_that_fit
from dirtylog.buffers.memory import BufferMemory
from dirtylog.checkpoint.codecs import Checksum
from dirtylog.checkpoint.draft import Draft
from dirtylog.checkpoint.retention import Keep
from dirtylog.checkpoint.segments import SegmentWriter
from dirtylog.epoch import Epoch
from dirtylog.size import format_size
from report import Section, Spread, Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PAGES = 1 << 20
_QUICK_PAGES = 1 << 16
_RATIO = 1.5
_EXTRA_MIB = 64.0
_SHARES = {0.001: 15, 0.01: 11, 0.1: 7, 1.0: 3}
"""Of the pages; and how many rounds."""
_STAGES: dict[str, tuple[type, str]] = {
    "get": (Epoch, "__enter__"),
    "copy": (BufferMemory, "read"),
    "checksums": (Checksum, "of_pages"),
    "write": (SegmentWriter, "append"),
    "sync": (SegmentWriter, "sync"),
    "index": (Draft, "commit"),
}


def checkpoint_saves(*, quick: bool) -> Section:
    """Measure saves of an array of which more and more was written."""
    reason = why_no_uffd()
    with on_disk() as folder:
        npages = _QUICK_PAGES if quick else pages_that_fit(folder, _PAGES, copies_in_memory=2, copies_on_disk=4)
        section = Section(
            f"Saving a checkpoint of {format_size(npages * PAGE_SIZE)}",
            "A share of an array's pages, at random, is written; then Checkpointer.save saves them. Bare: the same pages, known "
            "beforehand, are copied into a buffer of 1 MiB and written into an empty file, 1 MiB at a time, and synced once. Both "
            "on the same disk, one after the other, in turn the one and the other first, everything else synced before. Elapsed "
            "time. Of a save: get is the log's (PAGEMAP_SCAN and the bitmaps), copy into the buffer, checksums are xxh3, write and "
            "sync are the segments', index is the commit without these, with a sync of its own; each without the others, medians. "
            "Extra memory: how much more than before a save the process had of it at most, the largest of all rounds.",
        )
        if reason is not None:
            section.rows.append({"save": reason})
            return section
        ratios, memory = {}, {}
        for name, row in _rows(folder, npages, quick=quick):
            section.rows.append(row)
            ratios[name] = row["ratio"].median
            memory[name] = float(row["extra, MiB"])
    section.targets += [
        Target(f"a save at most {_RATIO} times the bare copy, write and sync", _RATIO, "times", ratios),
        Target("the extra memory of a save at most 64 MiB", _EXTRA_MIB, "MiB", memory),
    ]
    return section


def _rows(folder: Path, npages: int, *, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    array = full_array(npages)
    rewritten = Rewritten(array)
    with BareSaver(folder / "bare") as bare, dirtylog.Checkpointer({"array": array}, folder / "store") as checkpointer:
        checkpointer.save()
        for share, rounds in _SHARES.items():
            name = f"{share * 100:g} % dirty"
            dirty = max(1, int(npages * share))
            seconds: dict[str, list[float]] = defaultdict(list)
            extra = 0
            for number in range(max(3, rounds // 3) if quick else rounds):
                pages = rewritten.write(dirty)
                for way in ("save", "bare") if number % 2 else ("bare", "save"):
                    os.sync()
                    if way == "bare":
                        cost = bare.save(array, pages)
                        seconds["bare"].append(cost.whole)
                        seconds["bare sync"].append(cost.sync)
                        continue
                    before = _memory_before()
                    with _timed_stages() as stages:
                        begin = time.perf_counter()
                        saved = checkpointer.save()
                        whole = time.perf_counter() - begin
                    extra = max(extra, _status("VmHWM") - before)
                    assert saved.npages == dirty, f"{saved.npages} pages saved where {dirty} were written"
                    seconds["save"].append(whole)
                    for stage in _STAGES:
                        seconds[stage].append(stages[stage])
                    seconds["rest"].append(whole - sum(stages.values()))
                    if share >= 1:
                        checkpointer.prune(Keep(last=1))
            yield name, _row(name, dirty, seconds, extra)


def _row(name: str, dirty: int, seconds: dict[str, list[float]], extra: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "dirty": name.removesuffix(" dirty"),
        "save, ms": Spread.of(one * 1e3 for one in seconds["save"]),
        "bare, ms": Spread.of(one * 1e3 for one in seconds["bare"]),
        "ratio": Spread.of(one / other for one, other in zip(seconds["save"], seconds["bare"], strict=True)),
        "GB/s": f"{dirty * PAGE_SIZE / Spread.of(seconds['save']).median / 1e9:.2f}",
        "bare sync, ms": f"{Spread.of(seconds['bare sync']).median * 1e3:.2f}",
    }
    row |= {f"{stage}, ms": f"{Spread.of(seconds[stage]).median * 1e3:.2f}" for stage in (*_STAGES, "rest")}
    return row | {"extra, MiB": f"{extra / (1 << 20):.1f}"}


@contextlib.contextmanager
def _timed_stages() -> Iterator[dict[str, float]]:
    """Yield what each stage takes, in seconds, those within it left out."""
    seconds: dict[str, float] = defaultdict(float)
    within: list[float] = []

    def timed(stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **options: Any) -> Any:  # noqa: ANN401 - whatever the stage takes and returns
            within.append(0.0)
            begin = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                whole = time.perf_counter() - begin
                seconds[stage] += whole - within.pop()
                if within:
                    within[-1] += whole

        return measured

    before = {stage: getattr(owner, name) for stage, (owner, name) in _STAGES.items()}
    try:
        for stage, (owner, name) in _STAGES.items():
            setattr(owner, name, timed(stage, before[stage]))
        yield seconds
    finally:
        for stage, (owner, name) in _STAGES.items():
            setattr(owner, name, before[stage])


def _memory_before() -> int:
    """Give back what is free, forget the high-water mark, and return what this process has of memory."""
    with contextlib.suppress(AttributeError):  # another C library has no such call
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise AssertionError(name)

"""Recordings of given writes, for what reads them."""

from __future__ import annotations

import shutil
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dirtylog import DirtyBitmap, MemorySlot, Recorder, Recording
from dirtylog.observe.rounds import Round
from dirtylog.report.page import page
from dirtylog.report.payload import MAX_RUNS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

SECONDS = 0.125
GET_SECONDS = 0.0078125


class Source:
    """A memory without contents or port: what a recorder asks it for."""

    def __init__(self, slots: Sequence[MemorySlot], **facts: Any) -> None:
        self.slots = slots
        self.port = SimpleNamespace(name="uffd")
        self.exactness = SimpleNamespace(value="superset")
        self.blind_spots: tuple[str, ...] = ("writes of the moon",)
        self.incomplete: tuple[str, ...] = ()
        self.faults: int | None = None
        self.held = sum(slot.nbytes for slot in slots)
        vars(self).update(facts)


def recorded(
    path: Path,
    slots: Sequence[MemorySlot],
    rounds: Iterable[Mapping[int, Iterable[int]]],
    *,
    target: str = "pid:1",
    marks: Mapping[int, str] | None = None,
    status: int | None = 0,
    faults: int | None = None,
    **facts: Any,
) -> Path:
    """Record rounds: of each slot, by its place in ``slots``, the pages written. ``marks`` are set after rounds of that number.

    With a ``status`` of None it is as if the recorder had been killed.
    """
    source: Any = Source(slots, faults=None if faults is None else 0, **facts)
    clock: Any = SimpleNamespace(time=time.time, perf_counter=lambda: clock.now, now=1000.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dirtylog.recording.recorder.time", clock)
        going_on = path.with_name(f"going-on-{path.name}")
        with Recorder(going_on, source, target=target) as recorder:
            source.faults = faults
            for number, written in enumerate(rounds, 1):
                dirty = {
                    slots[place]: DirtyBitmap.from_pages(slots[place].npages, np.fromiter(pages, np.int64))
                    for place, pages in written.items()
                }
                began, clock.now = clock.now, clock.now + SECONDS
                recorder.add(Round(number, SECONDS, GET_SECONDS, dirty, began))
                if number in (marks or {}):
                    recorder.mark((marks or {})[number])
            if status is not None:
                recorder.close(status)
            shutil.copyfile(going_on, path)
    going_on.unlink()
    return path


def reported(
    folder: Path,
    slots: Sequence[MemorySlot],
    rounds: Iterable[Mapping[int, Iterable[int]]],
    *,
    max_runs: int = MAX_RUNS,
    **facts: Any,
) -> tuple[Path, Path]:
    """Record, and make the page: the paths of both."""
    path = recorded(folder / "run.dlog", slots, rounds, **facts)
    with Recording(path) as recording:
        text = page(recording, max_runs=max_runs)
    (folder / "report.html").write_text(text, "utf-8")
    return path, folder / "report.html"

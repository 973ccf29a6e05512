"""What a get of one GiB costs on every port of the software machine."""

from __future__ import annotations

import time
import tracemalloc
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.dirty_log import DirtyLog
from dirtylog.emulated.arch import PORTS
from dirtylog.emulated.guest import make_guest
from dirtylog.emulated.port import PAGE_SIZE
from dirtylog.guests.machine import RAM_SLOT
from dirtylog.words import words_of_pages
from null import NullMemory
from report import Section, Spread, Target

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from dirtylog.emulated.machine import EmulatedMemory

_PAGES = 1 << 18
_SMALL = 1 << 16
_DIRTY = _PAGES // 100
# Its get drops every entry of the slot: only what is mapped again afterwards can weigh on the next.
_DROPS_ENTRIES = frozenset({"ppc-pv"})


def gets(*, quick: bool) -> Section:
    """Measure gets of a slot that is wholly mapped while no vCPU runs."""
    rounds, step = (5, 4) if quick else (15, 1)
    section = Section(
        "3. A get of a 1 GiB slot, 1 % dirty",
        f"{'Every fourth' if quick else 'Every'} page is mapped, {_DIRTY} pages are dirtied through the port before each get, at "
        "random or in a row, and no vCPU runs. The anchor, in turn with it, is the same get of the same pages on a port whose "
        f"hooks do nothing. {rounds} rounds. Peak: what one get of 512 dirty pages allocates, its result included.",
    )
    growth: dict[str, float] = {}
    for arch in PORTS:
        clean_small, peak_small = _clean(arch, _SMALL, rounds, step)
        with make_guest(arch, _PAGES * PAGE_SIZE, program="idle") as memory, DirtyLog(memory) as log:
            _map(memory, range(0, _PAGES, step))
            clean = _get_ms(memory, log, np.empty(0, np.int64), rounds)
            generator = np.random.default_rng(2**16)
            null = NullMemory(_PAGES)
            ms: list[float] = []
            null_ms: list[float] = []
            row_ms: list[float] = []
            with DirtyLog(null) as null_log:
                for _ in range(rounds):
                    pages = generator.choice(_PAGES // step, _DIRTY, replace=False) * step
                    null.mark(words_of_pages(pages))
                    null_ms += _timed_get(null_log, _DIRTY)
                    first = int(generator.integers(_PAGES - _DIRTY))
                    for dirty, times in ((pages, ms), (np.arange(first, first + _DIRTY), row_ms)):
                        if arch in _DROPS_ENTRIES:
                            _map(memory, range(0, _PAGES, step))
                        times.extend(_get_ms(memory, log, dirty, 1))
            peak = _peak(memory, log, _PAGES)
        section.rows.append(
            {
                "port": arch,
                "random, ms": Spread.of(ms),
                "null port, ms": Spread.of(null_ms),
                "ratio": Spread.of(one / other for one, other in zip(ms, null_ms, strict=True)),
                "in a row, ms": Spread.of(row_ms),
                "clean, ms": Spread.of(clean),
                "clean 256 MiB, ms": Spread.of(clean_small),
                "peak, KiB": f"{peak / 1024:.0f}",
                "peak 256 MiB, KiB": f"{peak_small / 1024:.0f}",
            }
        )
        growth[arch] = peak - peak_small
    section.targets = [
        Target("a get of 1 GiB at 1 % dirty at most 1 ms", 1, "ms", section.values("port", "random, ms")),
        Target("a port's get allocates nothing that grows with the slot, 256 MiB to 1 GiB", 4096, "bytes more", growth),
    ]
    return section


def _clean(arch: str, npages: int, rounds: int, step: int) -> tuple[list[float], int]:
    """Return the milliseconds of gets that find nothing dirty, and the peak of one that finds something."""
    with make_guest(arch, npages * PAGE_SIZE, program="idle") as memory, DirtyLog(memory) as log:
        _map(memory, range(0, npages, step))
        return _get_ms(memory, log, np.empty(0, np.int64), rounds), _peak(memory, log, npages)


def _map(memory: EmulatedMemory, gfns: Iterable[int], *, write: bool = False) -> None:
    translate = memory.port.translate
    for gfn in gfns:
        translate(0, gfn, write)


def _get_ms(memory: EmulatedMemory, log: DirtyLog, pages: NDArray[np.int64], rounds: int) -> list[float]:
    ms: list[float] = []
    for _ in range(rounds):
        _map(memory, pages.tolist(), write=True)
        ms += _timed_get(log, len(pages))
    return ms


def _timed_get(log: DirtyLog, count: int) -> list[float]:
    begin = time.thread_time()
    dirty = log.get(RAM_SLOT)
    seconds = time.thread_time() - begin
    assert dirty.count() == count
    return [seconds * 1e3]


def _peak(memory: EmulatedMemory, log: DirtyLog, npages: int) -> int:
    """Return the bytes that a get of 512 dirty pages, each in a bitmap word of its own, has allocated at its peak."""
    _map(memory, range(0, npages, npages // 512), write=True)
    log.get(RAM_SLOT)
    _map(memory, range(0, npages, npages // 512), write=True)
    return peak_of_get(log)


def peak_of_get(log: DirtyLog) -> int:
    """Return the bytes that a get has allocated at its peak, its result included."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        dirty = log.get(RAM_SLOT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert dirty
    return peak - before

"""What the generic get costs on a terabyte: no pages are behind it, only bitmaps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dirtylog.bitmap import DirtyBitmap
from dirtylog.dirty_log import DirtyLog
from dirtylog.words import words_of_pages
from gets import peak_of_get
from null import NullMemory
from report import Section, Spread, Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PAGES = 1 << 28
_DIRTY = 26844  # 0.01 %
_FEW_PAGES = 1 << 20
_ALLOCATED_FOR = 4096

_Prepare = Callable[[DirtyLog], DirtyBitmap | None]
_Measure = Callable[[DirtyLog, Any, "NDArray[np.uint64]"], object]


def _nothing(log: DirtyLog) -> None:  # noqa: ARG001 - one signature for all
    return None


# What is done beforehand, untimed, and what is timed.
_WAYS: dict[str, tuple[_Prepare, _Measure]] = {
    "get": (_nothing, lambda log, _, __: log.get(0)),
    "get, then pages()": (_nothing, lambda log, _, __: log.get(0).pages()),
    "get, then runs()": (_nothing, lambda log, _, __: log.get(0).runs()),
    "pages() alone": (lambda log: log.get(0), lambda _, dirty, __: dirty.pages()),
    "runs() alone": (lambda log: log.get(0), lambda _, dirty, __: dirty.runs()),
    "np.count_nonzero, the anchor again": (_nothing, lambda _, __, words: np.count_nonzero(words)),
    "np.flatnonzero of words != 0": (_nothing, lambda _, __, words: np.flatnonzero(words != 0)),
    "np.flatnonzero": (_nothing, lambda _, __, words: np.flatnonzero(words)),
}


def terabyte(*, quick: bool) -> Section:
    """Measure a get, and what its result is asked for, against passes over a bitmap of the same size."""
    rounds = 11 if quick else 51
    section = Section(
        "4. A get of a 1 TiB slot, 0.01 % dirty",
        f"{_DIRTY} random pages of 2^28 are marked before each get; the hooks of the port do nothing. The anchor is the fastest "
        f"full pass that NumPy has over as many words (32 MiB), np.count_nonzero, next to each figure, before or after it in turn. "
        f"{rounds} rounds.",
    )
    generator = np.random.default_rng(2**28)
    memory = NullMemory(_PAGES)
    # Written once, for an untouched array of zeros has no memory behind it, and reading that costs nothing.
    words = np.ones(_PAGES // 64, np.uint64)
    words[:] = 0
    ms: dict[str, list[float]] = {name: [] for name in _WAYS}
    ratios: dict[str, list[float]] = {name: [] for name in _WAYS}
    with DirtyLog(memory) as log:
        for number in range(rounds + 1):
            for name, (prepare, measure) in _WAYS.items():
                marked = words_of_pages(generator.choice(_PAGES, _DIRTY, replace=False, shuffle=False))
                memory.mark(marked)
                words[marked.offsets] = marked.values
                prepared = prepare(log)
                anchor_ms, way_ms = 0.0, 0.0
                for side in ("anchor", "way") if number % 2 else ("way", "anchor"):
                    begin = time.thread_time()
                    if side == "anchor":
                        np.count_nonzero(words)
                        anchor_ms = (time.thread_time() - begin) * 1e3
                    else:
                        measure(log, prepared, words)
                        way_ms = (time.thread_time() - begin) * 1e3
                words[marked.offsets] = 0
                log.get(0)
                if number:  # round 0 touches the memory
                    ms[name].append(way_ms)
                    ratios[name].append(way_ms / anchor_ms)
    section.rows = [{"what": name, "ms": Spread.of(ms[name]), "ratio": Spread.of(ratios[name])} for name in _WAYS]
    ratio = section.values("what", "ratio")["get"]
    section.targets.append(Target("a get of 1 TiB at 0.01 % dirty at most 1.5 NumPy passes", 1.5, "times", {"get": ratio}))
    return section


def allocation(*, quick: bool) -> Section:  # noqa: ARG001 - it takes no time
    """Measure what a get allocates, on slots of two sizes with equally many dirty words."""
    section = Section(
        "5. What a get allocates",
        f"tracemalloc's peak during one get of {_ALLOCATED_FOR} dirty pages, each in a word of its own; the hooks of the port do "
        "nothing. It includes the result. Exact: one round.",
    )
    peaks = []
    for npages in (_FEW_PAGES, _PAGES):
        memory = NullMemory(npages)
        pages = np.arange(_ALLOCATED_FOR, dtype=np.int64) * (npages // _ALLOCATED_FOR)
        with DirtyLog(memory) as log:
            memory.mark(words_of_pages(pages))
            log.get(0)
            memory.mark(words_of_pages(pages))
            peaks.append(peak_of_get(log))
        section.rows.append(
            {"slot": f"{npages} pages", "peak, KiB": f"{peaks[-1] / 1024:.1f}", "ratio": f"{peaks[-1] / peaks[0]:.4f}"}
        )
    text = "a get allocates nothing that grows with the slot, 4 GiB to 1 TiB"
    section.targets.append(Target(text, 4096, "bytes more", {"get": peaks[1] - peaks[0]}))
    return section

"""What a get of a tracked buffer costs, against the bare PAGEMAP_SCAN on the same memory."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import dirtylog
from buffer_scene import PAGE_SIZE, REGIONS, Bare, huge_bytes, some_pages, touched_buffer, why_no_uffd
from dirtylog.size import format_size
from report import Section, Spread, Target, alternate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dirtylog.dirty_log import DirtyLog

_PAGES = 1 << 18
_QUICK_PAGES = 1 << 16
_RATIO = 1.15


class _Case(NamedTuple):
    name: str
    pages: NDArray[np.int64]
    rounds: int
    has_target: bool


def buffer_gets(*, quick: bool) -> Section:
    """Measure gets of a buffer that the measuring thread has dirtied."""
    npages = _QUICK_PAGES if quick else _PAGES
    section = Section(
        "10. A get of a tracked buffer",
        f"A loop stores to 0, 1 (at random), 50 (every other) or 100 % of a buffer's pages of {PAGE_SIZE} bytes; then comes "
        "DirtyLog.get, or the bare PAGEMAP_SCAN with the same flags, the same range and a vector of as many regions "
        f"({REGIONS}), in turn. Two gets of another buffer, of one page, come right before, on either side: what the stores evict "
        "from the caches is not the call's own cost. The counts are checked. Elapsed time. Cold: without them. then pages(): the "
        "get and the offsets of its pages, which is what most callers want. Huge pages: the same memory in pages of 2 MiB, which "
        "the first store to each splits while it is tracked.",
    )
    reason = why_no_uffd()
    if reason is not None:
        section.rows.append({"get": reason})
        return section
    every = 2 if quick else 1
    random, half, whole = some_pages(npages, npages // 100), np.arange(0, npages, 2), np.arange(npages)
    small = [
        _Case("0 %", whole[:0], 200 // every, has_target=True),
        _Case("1 %", random, 100 // every, has_target=True),
        _Case("50 %", half, 20 // every, has_target=False),
        _Case("100 %", whole, 20 // every, has_target=True),
    ]
    huge = [_Case("0 %, huge pages", whole[:0], 200 // every, has_target=False)]
    huge.append(_Case("1 %, huge pages", random, 20 // every, has_target=False))
    ratios: dict[str, float] = {}
    with Bare() as bare:
        for cases, in_huge_pages in ((small, False), (huge, True)):
            for case, row in _rows(bare, npages, cases, huge=in_huge_pages):
                section.rows.append(row)
                if case.has_target:
                    ratios[f"{case.name} dirty"] = row["ratio"].median
    section.targets.append(
        Target(f"{format_size(npages * PAGE_SIZE)}: a get at most {_RATIO} times the bare PAGEMAP_SCAN", _RATIO, "times", ratios)
    )
    return section


def _rows(bare: Bare, npages: int, cases: list[_Case], *, huge: bool) -> Iterator[tuple[_Case, dict[str, Any]]]:
    buffer = touched_buffer(npages, huge=huge)
    tiny = touched_buffer(1)
    with dirtylog.track(buffer, port="uffd") as log, dirtylog.track(tiny, port="uffd") as tiny_log:
        sides = _Sides(bare, buffer, log, tiny_log)
        for case in cases:
            ms = sides.measure(case)
            get, scan = ms["get"], ms["bare"]
            yield (
                case,
                {
                    "dirty": case.name,
                    "regions": f"{_regions(case.pages)}",
                    "get, ms": Spread.of(get),
                    f"bare scan ({bare.language}), ms": Spread.of(scan),
                    "ratio": Spread.of(one / other for one, other in zip(get, scan, strict=True)),
                    "cold get, ms": Spread.of(ms["cold get"]),
                    "get, then pages(), ms": Spread.of(ms["get, pages"]),
                    "in huge pages, MiB": f"{huge_bytes(buffer) >> 20}",
                },
            )


def _regions(pages: NDArray[np.int64]) -> int:
    return int(np.count_nonzero(np.diff(np.sort(pages)) > 1)) + 1 if len(pages) else 0


class _Sides:
    """The ways to ask for the written pages of one buffer."""

    def __init__(self, bare: Bare, buffer: NDArray[np.uint8], log: DirtyLog, tiny_log: DirtyLog) -> None:
        self._bare = bare
        self._buffer = buffer
        self._log = log
        self._tiny_log = tiny_log
        self._value = 1

    def measure(self, case: _Case) -> dict[str, list[float]]:
        """Return the milliseconds of each way, a value a round."""
        ms: dict[str, list[float]] = {way: [] for way in ("get", "bare", "cold get", "get, pages")}
        for _, way in alternate(tuple(ms), case.rounds):
            self._value += 1
            self._bare.store(self._buffer, case.pages, self._value)
            if way != "cold get":
                self._tiny_log.get(0)
                self._tiny_log.get(0)
            seconds, count = self._scan() if way == "bare" else self._get(pages=way == "get, pages")
            assert count == len(case.pages), f"{count} pages found where {len(case.pages)} were written"
            ms[way].append(seconds * 1e3)
        return ms

    def _get(self, *, pages: bool) -> tuple[float, int]:
        begin = time.perf_counter()
        dirty = self._log.get(0)
        if pages:
            dirty.pages()
        seconds = time.perf_counter() - begin
        return seconds, dirty.count()

    def _scan(self) -> tuple[float, int]:
        scanned = self._bare.scan(self._buffer)
        return scanned.seconds, scanned.pages

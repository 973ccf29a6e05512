"""What a store to a tracked buffer costs: the first to a page in a round, and those after it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

import dirtylog
from buffer_scene import PAGE_SIZE, Bare, some_pages, touched_buffer, why_no_uffd
from dirtylog.size import format_size
from report import Section, Spread, Target, alternate

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

_PAGES = 1 << 16
_HOT = 1 << 9
_LAPS = 1600
_GROUPS = 4
_RATIO = 1.05


def buffer_stores(*, quick: bool) -> Section:
    """Measure a loop of stores, one to each page of a list."""
    rounds = 8 if quick else 40
    section = Section(
        "11. A store to a tracked buffer",
        f"A loop in C stores to each page of a list in a buffer of {format_size(_PAGES * PAGE_SIZE)}. First: once, right after a "
        "get. Its anchor is the same loop in a C program (trackers.c) that has armed memory of its own in the same way, in turn; "
        f"{_GROUPS} times fresh memory on either side. "
        f"Later: {_LAPS * _HOT} times or so to pages that are dirty already; hot: to {_HOT} of them. The anchor is the same loop "
        "on an untracked buffer, in turn; the buffers change places after half of the rounds. The counts are checked. Elapsed "
        f"time. {rounds} rounds.",
    )
    reason = why_no_uffd()
    with Bare() as bare:
        reason = reason or (f"skipped: {bare.why_not}" if bare.why_not else None)
        if reason is not None:
            section.rows.append({"stores": reason})
            return section
        random = some_pages(_PAGES, _PAGES)
        orders = {"in a row": np.sort(random), "at random": random, "1 % at random": random[: _PAGES // 100]}
        rows = {f"first, {order}": _first(bare, pages, rounds) for order, pages in orders.items()}
        laters = {f"later, {order}": _later(bare, pages, _LAPS * _HOT // len(pages), rounds) for order, pages in orders.items()}
        laters["later, hot"] = _later(bare, random[:_HOT], _LAPS, rounds)
    section.rows = [{"stores": name} | row for name, row in (rows | laters).items()]
    section.targets = [
        Target(f"a first store to a tracked page at most {_RATIO} times bare C's", _RATIO, "times", _ratios(rows)),
        Target(f"a later store to a tracked page at most {_RATIO} times one to untracked memory", _RATIO, "times", _ratios(laters)),
    ]
    return section


def _ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {name: row["ratio"].median for name, row in rows.items()}


def _first(bare: Bare, pages: NDArray[np.int64], rounds: int) -> dict[str, Any]:
    """Return the row of the first stores to these pages since a get."""
    seconds: list[float] = []
    anchor: list[float] = []
    # Fresh memory on either side for each part of the rounds: where it lies makes a difference.
    for _ in range(_GROUPS):
        tracked = touched_buffer(_PAGES)
        with dirtylog.track(tracked, port="uffd") as log, bare.tracker("uffd", _PAGES, pages) as program:
            log.get(0)
            for number, side in alternate(("tracked", "program"), rounds // _GROUPS):
                if side == "tracked":
                    seconds.append(bare.store(tracked, pages, number))
                    # What the program does too.
                    bare.store(tracked, pages, number)
                    assert log.get(0).count() == len(pages)
                else:
                    done = program.round()
                    assert done.found == len(pages)
                    anchor.append(done.first_stores)
    return _row(seconds, anchor, len(pages))


def _later(bare: Bare, pages: NDArray[np.int64], laps: int, rounds: int) -> dict[str, Any]:
    """Return the row of stores to these pages when they are dirty."""
    buffers = touched_buffer(_PAGES), touched_buffer(_PAGES)
    lists = np.tile(pages, laps)
    seconds: dict[str, list[float]] = {"tracked": [], "untracked": []}
    # Either buffer is tracked for half of the rounds, for the same reason.
    for tracked, untracked in (buffers, buffers[::-1]):
        sides = {"tracked": tracked, "untracked": untracked}
        with dirtylog.track(tracked, port="uffd") as log:
            for number, side in alternate(tuple(seconds), -(-rounds // 2)):
                log.get(0)
                for _ in range(2):
                    bare.store(sides[side], pages, number)
                seconds[side].append(bare.store(sides[side], lists, number))
                if side == "tracked":
                    assert log.get(0).count() == len(pages)
    return _row(seconds["tracked"], seconds["untracked"], len(lists))


def _row(seconds: list[float], anchor: list[float], stores: int) -> dict[str, Any]:
    def nanoseconds(values: Iterable[float]) -> Spread:
        return Spread.of(value / stores * 1e9 for value in values)

    return {
        "tracked, ns": nanoseconds(seconds),
        "anchor, ns": nanoseconds(anchor),
        "ratio": Spread.of(one / other for one, other in zip(seconds, anchor, strict=True)),
    }

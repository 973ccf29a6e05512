"""The table of slots."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from dirtylog.size import format_size
from dirtylog.top.text import Line, Terminal, fitted, printable, tail

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from dirtylog.memslot import MemorySlot
    from dirtylog.top.model import SlotRow

_MB = 1e6
_COLUMNS = (("size", 10), ("MB/s", 8), ("pages/s", 8), ("dirty", 6), ("total", 10), ("written", 8))
_DAY = 86400.0


class Sort(enum.Enum):
    """By what the slots are sorted; the word is the column's."""

    RATE = "MB/s"
    ADDRESS = "slot"
    SIZE = "size"
    TOTAL = "total"

    def next(self) -> Sort:
        """Return the next one."""
        every = list(Sort)
        return every[(every.index(self) + 1) % len(every)]


_KEYS: dict[Sort, Callable[[SlotRow], float]] = {
    # What is written no more falls to zero slowly, and would keep its place among slots of rate 0.
    Sort.RATE: lambda row: -round(row.rate),
    Sort.ADDRESS: lambda _: 0,
    Sort.SIZE: lambda row: -row.slot.nbytes,
    Sort.TOTAL: lambda row: -row.total,
}


def sorted_rows(rows: Sequence[SlotRow], sort: Sort) -> list[SlotRow]:
    """Return the rows in order; those that are equal in it, in order of address."""
    key = _KEYS[sort]
    return sorted(rows, key=lambda row: (key(row), row.slot.address_space, row.slot.base_gfn * row.slot.page_size))


def name_of(slot: MemorySlot, terminal: Terminal, width: int) -> str:
    """Return the address of a slot, guest-physical or of a process, and its name."""
    address = f"{slot.base_gfn * slot.page_size:#x}"
    name = printable(slot.name.rpartition("/")[2] or slot.name, terminal)
    if not name:
        name = "anonymous" if slot.permissions else "read-only" if slot.readonly else "memory"
    room = max(0, width - len(address) - 1)
    return f"{address} {tail(name, room, terminal.cut)}" if room > 1 else address


def table(rows: Sequence[SlotRow], sort: Sort, selected: MemorySlot | None, nrows: int, terminal: Terminal) -> list[Line]:
    """Return a head and ``nrows`` rows, among which the selected one is."""
    width = terminal.width - 2 - sum(width for _, width in _COLUMNS)
    arrow = "↓" if terminal.unicode else "v"
    heads = [(("slot", -width), sort is Sort.ADDRESS), *((column, column[0] == sort.value) for column in _COLUMNS)]
    head: Line = [("  ", "head")]
    for (word, room), by in heads:
        text = f"{word} {arrow}" if by and room < 0 else f"{arrow} {word}" if by else word
        head.append((f"{text:<{-room}}" if room < 0 else f"{text:>{room}}", "head by" if by else "head"))
    place = next((number for number, row in enumerate(rows) if row.slot is selected), 0)
    start = min(max(0, place - nrows // 2), max(0, len(rows) - nrows))
    shown = rows[start : start + nrows]
    if len(rows) > nrows:
        where = f" {start + 1}-{start + len(shown)} of {len(rows)}"
        text, style = head[1]
        head[1] = (fitted([(text.rstrip() + where, "")], len(text))[0][0].ljust(len(text)), style)
    return [head, *(_row(row, row.slot is selected, width, terminal) for row in shown)]


def _row(row: SlotRow, selected: bool, width: int, terminal: Terminal) -> Line:  # noqa: FBT001 - a row is the selected one or not
    name = name_of(row.slot, terminal, width)
    cells = (
        format_size(row.slot.nbytes),
        f"{row.rate / _MB:.1f}",
        f"{row.pages:.0f}",
        f"{row.dirty:.0%}" if not 0 < row.dirty < 0.01 else "<1%",  # noqa: PLR2004 - a hundredth is a per cent
        f"{row.total}",
        _ago(row.quiet),
    )
    text = "".join(f"{cell:>{room}}" for cell, (_, room) in zip(cells, _COLUMNS, strict=True))
    style = "selected" if selected else "" if row.total else "dim"
    return [(f"{'>' if selected else ' '} {name:<{width}}{text}", style)]


def _ago(quiet: float | None) -> str:
    if quiet is None:
        return "never"
    return f"{quiet:.1f} s" if quiet < 100 else f"{quiet:.0f} s" if quiet < _DAY else "long ago"  # noqa: PLR2004 - what has room

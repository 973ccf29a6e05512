"""The screen as text: where everything stands, and what it says. It knows nothing of the library that shows it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dirtylog.size import format_size
from dirtylog.top.heat import LEVELS
from dirtylog.top.table import Sort, name_of, sorted_rows, table
from dirtylog.top.text import Line, Terminal, apart, fitted, joined

if TYPE_CHECKING:
    from dirtylog.memslot import MemorySlot
    from dirtylog.top.history import Curve
    from dirtylog.top.model import Map, View

LABEL = 16
"""At the left of the map and of the curve stand addresses and rates."""
MIN_WIDTH, MIN_HEIGHT = 72, 18
_MB = 1e6
# The lines that are always there: four at the top, the map's title, the curve's axis, the table's head, the keys.
_FIXED = 8


@dataclass(frozen=True, slots=True)
class Layout:
    """How many lines the map, the curve and the table have, and how many columns the first two."""

    map: int
    curve: int
    table: int
    columns: int

    @classmethod
    def of(cls, terminal: Terminal) -> Layout:
        """Divide a terminal."""
        free = terminal.height - _FIXED
        curve = max(2, min(3 + (free - 16) // 8, 8))
        rows = max(2, (free - curve) * 7 // 13)
        return cls(rows, curve, free - curve - rows, terminal.width - LABEL)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is said of the target: its name, how it is logged, how that goes, and what is wrong with the coverage, if anything."""

    name: str
    about: str
    state: str
    alarm: str
    blind_spots: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Choices:
    """What the user has chosen to see."""

    sort: Sort = Sort.RATE
    selected: MemorySlot | None = None
    row: int = 0
    whole: bool = False
    help: bool = False
    notice: str = ""


def screen(view: View, facts: Facts, choices: Choices, terminal: Terminal) -> list[Line]:
    """Return every line of the screen."""
    if terminal.width < MIN_WIDTH or terminal.height < MIN_HEIGHT:
        text = f"The terminal is too small: at least {MIN_WIDTH} by {MIN_HEIGHT}. q quits"
        return [fitted([(text if row == 0 else "", "")], terminal.width) for row in range(terminal.height)]
    layout = Layout.of(terminal)
    lines = _top(view, facts, choices, terminal)
    if choices.help:
        lines += _help(facts, terminal.width)
    else:
        lines += [_map_title(view, terminal), *_map(view.map, layout, choices, terminal)]
        lines += _curve(view.curve, layout, terminal)
        lines += table(sorted_rows(view.rows, choices.sort), choices.sort, choices.selected, layout.table, terminal)
    lines = lines[: terminal.height - 1]
    lines += [[]] * (terminal.height - 1 - len(lines))
    return [fitted(line, terminal.width) for line in (*lines, _keys(view))]


def _top(view: View, facts: Facts, choices: Choices, terminal: Terminal) -> list[Line]:
    state = "alarm" if facts.alarm else "state"
    title = apart([(" dirtylog top ", "title"), (f" {facts.name}", "name")], [(f" {facts.state} ", state)], terminal.width)
    totals: Line = []
    for what, value in (
        ("now", f"{view.rate / _MB:.1f}"),
        ("mean", f"{view.mean / _MB:.1f} MB/s"),
        ("pages", f"{view.total}"),
        ("distinct", format_size(view.distinct_bytes)),
        ("gets", f"{view.get_share:.1%}"),
    ):
        totals += [(f" {what} ", "dim"), (value, "value"), (" ", "")]
    if facts.alarm:
        last: Line = [(f" {facts.alarm}", "alarm")]
    else:
        last = [
            (f" {choices.notice or 'coverage complete, but for the blind spots under ?'}", "dim" if not choices.notice else "value")
        ]
    return [title, [(f" {facts.about}", "dim")], totals, last]


def _map_title(view: View, terminal: Terminal) -> Line:
    shown = view.map
    legend: Line = [(" cold ", "head dim")]
    legend += [(char, f"heat{level}") for level, char in enumerate(terminal.heat)]
    legend += [(f" hot, halves in {view.half_life:g} s ", "head dim")]
    if shown.area is not None:
        area = shown.area
        text = f" {name_of(area.slot, terminal, 24)}, pages {area.first}-{area.first + area.npages - 1}"
    elif not shown.slots:
        text = " nothing written yet"
    else:
        unit = format_size(shown.npages * max(slot.page_size for slot in shown.slots))
        more = f" of {len(shown.slots) + shown.hidden}" if shown.hidden else ""
        text = (
            f" {len(shown.slots)}{more} written slots, a cell {unit}" if len(shown.slots) > 1 else f" 1 written slot, a cell {unit}"
        )
    return apart([(text, "head")], legend, terminal.width, "head")


def _map(shown: Map, layout: Layout, choices: Choices, terminal: Terminal) -> list[Line]:
    # Which of several slots is the selected one is told by a line under it.
    chosen = next((number for number, slot in enumerate(shown.slots) if slot is choices.selected), -1)
    if len(shown.slots) == 1:
        chosen = -1
    lines: list[Line] = []
    for row in range(layout.map):
        cells = slice(row * layout.columns, (row + 1) * layout.columns)
        heat, owner = shown.level[cells].tolist(), shown.owner[cells].tolist()
        if not heat:
            lines.append([])
            continue
        here = shown.area is not None and row == choices.row
        label = _labelled(f"{shown.address(cells.start):#x}", "by" if here else "dim", ">" if here else "")
        styled = (
            (terminal.chosen[level], f"heat{level} chosen") if slot == chosen else (terminal.heat[level], f"heat{level}")
            for level, slot in zip(heat, owner, strict=True)
        )
        lines.append([label, *joined(styled)])
    return lines


def _curve(curve: Curve, layout: Layout, terminal: Terminal) -> list[Line]:
    bars, steps = terminal.bars, len(terminal.bars) - 1
    top = float(curve.rates.max(initial=0.0))
    before = layout.columns - len(curve.rates)
    heights = [0] * before + [_height(rate, top, layout.curve * steps) for rate in curve.rates.tolist()]
    marked = {before + column for column, _ in curve.marks}
    lines: list[Line] = []
    for row in range(layout.curve):
        label = f"{top / _MB:.1f} MB/s" if row == 0 else "0" if row == layout.curve - 1 else ""
        parts = (min(max(height - (layout.curve - 1 - row) * steps, 0), steps) for height in heights)
        cells = [(bars[part], "bar full" if part == steps else "bar") for part in parts]
        for column in marked:
            cells[column] = (terminal.upright, "mark")
        lines.append([_labelled(label, "dim"), *joined(cells)])
    # The length of time stands where the curve begins, as far as there is room.
    since = f"{curve.seconds:.0f} s"
    axis = [(char, "dim") for char in f"{since:>{min(before + len(since), layout.columns)}}".ljust(layout.columns)]
    for column, mark in curve.marks:
        number = str(mark.number)[: layout.columns - before - column]
        axis[before + column : before + column + len(number)] = [(digit, "mark") for digit in number]
    return [*lines, [_labelled("the last", "dim"), *joined(axis)]]


def _labelled(text: str, style: str, sign: str = "") -> tuple[str, str]:
    return f"{text:>{LABEL - 2}} {sign:<1}", style


def _height(rate: float, top: float, steps: int) -> int:
    # What is not nothing can be seen.
    return max(1, round(rate / top * steps)) if rate and top else 0


def _keys(view: View) -> Line:
    zoomed = view.map.area is not None
    line: Line = []
    for key, what in (
        ("q", "quit"),
        ("p", "pause"),
        ("z", "zoom"),
        *((("Esc", "out"), ("<>", "row")) if zoomed else ()),
        ("s", "sort"),
        ("m", "mark"),
        ("t", "time"),
        ("+-", "cool"),
        ("?", "help"),
    ):
        line += [(" ", ""), (key, "key"), (f" {what}", "keys")]
    return line


def _help(facts: Facts, width: int) -> list[Line]:
    keys = (
        ("up down", "select a slot; the map underlines it"),
        ("z Enter", "zoom into the selected slot, then into the row that > marks; Esc leads out"),
        ("left right", "choose that row"),
        ("s", "sort by rate, address, size or total of pages"),
        ("p", "pause the view; logging goes on"),
        ("m", "put a numbered mark into the history"),
        ("t", "history: the last rounds, or the whole"),
        ("+ -", "let heat last longer, or cool sooner"),
        ("q", "quit; Ctrl-C too, with exit status 130"),
    )
    heat = "A cell is as hot as the share of its pages that one round wrote, less what has cooled since; each of the "
    heat += f"{LEVELS} levels is half as hot as the next."
    texts = [(heat, ""), *((f"blind spot: {blind}", "dim") for blind in facts.blind_spots)]
    if facts.alarm:
        texts.insert(0, (facts.alarm, "alarm"))
    lines: list[Line] = [[(f" {key:<11}", "by"), (what, "")] for key, what in keys]
    for text, style in texts:
        lines += [[(f" {part}", style)] for part in textwrap.wrap(text, width - 2)]
    return lines

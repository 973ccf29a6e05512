"""The styles that lines name, in as many colours as the terminal has; nothing is told by a colour alone."""

from __future__ import annotations

import curses
import sys
from typing import TYPE_CHECKING

from dirtylog.top.text import Colours

if TYPE_CHECKING:
    from rich.console import Console

# Dark to light, so that the order can be seen without telling the hues apart.
_HEAT = ("#5c5c78", "#4b1d78", "#6f1d81", "#93267f", "#b73779", "#d8456c", "#f1605d", "#fa8765", "#feb078", "#fcfdbf")
_MANY = {
    "title": "bold #14141f on #feb078",
    "name": "bold",
    "state": "#14141f on #8fd19e",
    "alarm": "bold #ffffff on #b3261e",
    "dim": "#8a8a9e",
    "value": "bold",
    "head": "#e8e8f0 on #33334d",
    "head dim": "#a0a0b4 on #33334d",
    "head by": "bold #feb078 on #33334d",
    "by": "bold #feb078",
    "selected": "#ffffff on #5a2d82",
    "bar": "#f1605d",
    "bar full": "#f1605d on #f1605d",
    "mark": "bold #6cc7ff",
    "key": "bold #feb078",
    "keys": "#8a8a9e",
    # The background too: not every font's blocks meet.
    **{f"heat{level}": f"{colour} on {colour}" if level else colour for level, colour in enumerate(_HEAT)},
    **{f"heat{level} chosen": f"bold #6cc7ff on {colour}" if level else "bold #6cc7ff" for level, colour in enumerate(_HEAT)},
}
_FEW = {
    "title": "bold black on yellow",
    "name": "bold",
    "state": "black on green",
    "alarm": "bold white on red",
    "value": "bold",
    "head": "bold underline",
    "head dim": "underline",
    "head by": "bold yellow underline",
    "by": "bold yellow",
    "selected": "reverse",
    "bar": "red",
    "bar full": "red",
    "mark": "bold cyan",
    "key": "bold yellow",
    **{f"heat{level}": ("blue", "magenta", "red", "yellow")[level // 3] for level in range(1, len(_HEAT))},
    **{f"heat{level} chosen": "underline" for level in range(len(_HEAT))},
}
_NONE = {
    "title": "reverse bold",
    "name": "bold",
    "state": "bold",
    "alarm": "reverse bold",
    "value": "bold",
    "head": "bold underline",
    "head dim": "underline",
    "head by": "bold underline",
    "by": "bold",
    "selected": "reverse",
    "mark": "bold",
    "key": "bold",
    **{f"heat{level} chosen": "underline" for level in range(len(_HEAT))},
}
STYLES = {Colours.NONE: _NONE, Colours.FEW: _FEW, Colours.MANY: _MANY}
"""By style, what Rich calls it."""


def colours_of(console: Console, *, no_color: bool) -> Colours:
    """Return how many colours to use: none where the user wants none (NO_COLOR), or where the terminal has none."""
    if no_color or _terminfo_colours() == 0:
        return Colours.NONE
    return Colours.MANY if console.color_system in ("256", "truecolor") else Colours.FEW


def _terminfo_colours() -> int | None:
    """Return how many colours the terminal's description names; None where there is no description."""
    try:
        curses.setupterm(fd=sys.__stdout__.fileno() if sys.__stdout__ is not None else -1)
        return max(0, curses.tigetnum("colors"))
    except (curses.error, ValueError):
        return None

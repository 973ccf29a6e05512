"""Text for the screen: lines of words in named styles, and the characters that a terminal can show."""

from __future__ import annotations

import enum
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

Line = list[tuple[str, str]]
"""A line of the screen: (text, style), from left to right. The styles are named in ``app.py``."""


class Colours(enum.Enum):
    """How many colours the terminal has."""

    NONE = "none"
    FEW = "few"
    MANY = "many"


@dataclass(frozen=True, slots=True)
class Terminal:
    """What the terminal can show."""

    width: int
    height: int
    unicode: bool
    colours: Colours

    @property
    def heat(self) -> str:
        """The characters of the levels of heat, the coldest first. Where there are many colours, they tell it better."""
        if not self.unicode:
            return " .:-=+*#%@"
        return "·" + "█" * 9 if self.colours is Colours.MANY else " ·░░▒▒▓▓██"

    @property
    def chosen(self) -> str:
        """The same, of a slot that is selected; where they are the same characters, the style tells it."""
        return "·" + "▁" * 9 if self.unicode and self.colours is Colours.MANY else self.heat

    @property
    def bars(self) -> str:
        """The characters of a bar's top, the lowest first."""
        return " ▁▂▃▄▅▆▇█" if self.unicode else " .:#"

    @property
    def upright(self) -> str:
        """A vertical line."""
        return "│" if self.unicode else "|"

    @property
    def cut(self) -> str:
        """What stands for the left part of a long name."""
        return "…" if self.unicode else "~"


def joined(cells: Iterable[tuple[str, str]]) -> Line:
    """Return a line of cells in which those of one style are one: less to send."""
    return [("".join(text for text, _ in group), style) for style, group in itertools.groupby(cells, key=lambda cell: cell[1])]


def fitted(line: Line, width: int, fill: str = "") -> Line:
    """Return a line of just that width: cut, or filled with spaces in style ``fill``."""
    out: Line = []
    for text, style in line:
        if width > 0 and text:
            out.append((text[:width], style))
            width -= len(text)
    if width > 0:
        out.append((" " * width, fill))
    return out


def apart(left: Line, right: Line, width: int, fill: str = "") -> Line:
    """Return a line with one part at its left and another at its right; where both have no room, the left one is cut."""
    return fitted(left, width - sum(len(text) for text, _ in right), fill) + right


def tail(text: str, width: int, cut: str) -> str:
    """Return the end of a text that is too long."""
    return text if len(text) <= width else cut + text[len(text) - width + 1 :]


def printable(text: str, terminal: Terminal) -> str:
    """Return a name from outside in characters that take one column each: what may not is a question mark."""
    last = 0x2FF if terminal.unicode else 0x7E
    return "".join(char if char.isprintable() and ord(char) <= last else "?" for char in text)

"""What a benchmark says: tables of medians with their spread, and targets met or missed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of several rounds, and the extremes."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the spread of one value a round."""
        rounds = sorted(values)
        return cls(statistics.median(rounds), rounds[0], rounds[-1])

    def __str__(self) -> str:
        digits = 3 if self.median < 2 else 2 if self.median < 100 else 0
        return f"{self.median:.{digits}f} [{self.low:.{digits}f} - {self.high:.{digits}f}]"


@dataclass(frozen=True, slots=True)
class Target:
    """A limit, and the measured value of each thing that it is set for."""

    text: str
    limit: float
    unit: str
    values: dict[str, float]

    @property
    def met(self) -> bool:
        """Whether every value is within the limit."""
        return all(value <= self.limit for value in self.values.values())

    def __str__(self) -> str:
        worst = max(self.values, key=self.values.__getitem__)
        line = f"{'PASS' if self.met else 'FAIL'}  {self.text}: worst {self.values[worst]:.3g} {self.unit} ({worst})"
        missed = [name for name, value in self.values.items() if value > self.limit]
        return f"{line}; missed by {len(missed)} of {len(self.values)}: {', '.join(missed)}" if missed else line


@dataclass(slots=True)
class Section:
    """One benchmark: how it measures, a table whose rows have the same columns, and its targets."""

    title: str
    method: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join((f"## {self.title}", "", self.method, "", *_table(self.rows), ""))

    def values(self, row_name: str, column: str) -> dict[str, float]:
        """Return the medians of one column by the name in another."""
        return {row[row_name]: row[column].median for row in self.rows}


def alternate(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Yield (round, name): every name once a round, in turn forwards and backwards, so that no drift favours one."""
    for number in range(rounds):
        for name in names if number % 2 else reversed(names):
            yield number, name


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a Markdown table that reads well as plain text."""
    lines = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        yield "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"

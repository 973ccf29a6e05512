"""What a soak counts of each source, and how it is shown: as a table, and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from oracle import Copy

SCHEMA = "dirtylog-soak/1"
_SHOWN = 20


@dataclass(slots=True)
class Tally:
    """The counts of one source. ``writes`` is None where nothing counts them; ``failures`` are those injected, by kind."""

    source: str
    seed: int
    port: str = ""
    seconds: float = 0.0
    writes: int | None = None
    reports: int = 0
    false_positives: int = 0
    compared: int = 0
    rounds: int = 0
    stops: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    signals: int = 0
    lost: int = 0
    lost_pages: list[str] = field(default_factory=list)
    skipped: str | None = None
    error: str | None = None

    @property
    def good(self) -> bool:
        """Whether nothing is lost, and nothing went wrong. A source that was skipped is neither good nor bad: see ``skipped``."""
        return not self.lost and self.error is None

    def wrote(self, writes: int) -> None:
        """Add writes that were counted."""
        self.writes = (self.writes or 0) + writes

    def add(self, copies: Iterable[Copy]) -> None:
        """Add what the readers' copies have counted."""
        for copy in copies:
            self.reports += copy.reports
            self.false_positives += copy.false_positives
            self.compared += copy.compared
            self.lost += len(copy.lost)
            self.lost_pages += [str(lost) for lost in copy.lost[: _SHOWN - len(self.lost_pages)]]


_COLUMNS = ("source", "port", "writes", "reports", "false pos.", "compared", "rounds", "stops", "failures", "signals", "lost")


def table(tallies: Sequence[Tally]) -> str:
    """Return the table, with a line below for each source that has something to say."""
    rows = [_COLUMNS, *(_row(tally) for tally in tallies)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(_placed(cell, width, at) for at, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows]
    for tally in tallies:
        if tally.skipped is not None:
            lines.append(f"SKIPPED {tally.source}: {tally.skipped}")
        if tally.error is not None:
            lines.append(f"FAILED {tally.source} (seed {tally.seed}): {tally.error}")
        lines += [f"LOST {tally.source} (seed {tally.seed}): {page}" for page in tally.lost_pages]
    ran = [tally for tally in tallies if tally.skipped is None]
    lost = sum(tally.lost for tally in ran)
    reports = sum(tally.reports for tally in ran)
    lines.append(f"{len(ran)} of {len(tallies)} sources ran: {reports:,} page reports, {lost} pages lost")
    return "\n".join(lines)


def document(tallies: Sequence[Tally], seed: int) -> str:
    """Return the same as JSON."""
    sources = [{"source": tally.source, "good": tally.good, **_counts(tally)} for tally in tallies]
    return json.dumps({"schema": SCHEMA, "seed": seed, "sources": sources}, indent=2)


def _counts(tally: Tally) -> dict[str, object]:
    counts = {each.name: getattr(tally, each.name) for each in fields(tally)}
    return counts | {"seconds": round(tally.seconds, 3), "failures": dict(tally.failures)}


def _row(tally: Tally) -> tuple[str, ...]:
    if tally.skipped is not None:
        return (tally.source, "skipped", *("-",) * (len(_COLUMNS) - 2))
    writes = "-" if tally.writes is None else f"{tally.writes:,}"
    counts = (tally.reports, tally.false_positives, tally.compared, tally.rounds, tally.stops, tally.failures.total())
    return (tally.source, tally.port, writes, *(f"{count:,}" for count in (*counts, tally.signals, tally.lost)))


def _placed(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 2 else cell.rjust(width)

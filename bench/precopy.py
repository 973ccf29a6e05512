"""The prediction of pre-copy against pre-copy simulated on the trace that it was predicted from."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from buffer_scene import PAGE_SIZE, why_no_uffd
from dirtylog.buffers.program import WrittenBuffer
from dirtylog.dirty_log import DirtyLog
from dirtylog.observe.precopy import predict
from dirtylog.observe.rounds import rounds
from dirtylog.recording.reader import Recording
from dirtylog.recording.recorder import Recorder
from dirtylog.size import format_size
from report import Section, Spread, Target

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dirtylog.observe.footprint import Curve
    from dirtylog.observe.precopy import Prediction

_INTERVAL = 0.01
_WARM_UP_ROUNDS = 100
_STARTS = 100
_PATIENCE = 10
"""A simulated pre-copy is given up after so many times as long as one copy of all memory takes."""
_LIMIT = 5.0


class _Pattern(NamedTuple):
    """A program of a buffer; its phases last ``period``, and the recording ``seconds``."""

    name: str
    program: str
    period: float
    seconds: float


class _Migration(NamedTuple):
    """A bandwidth, in bytes a second, and a limit of downtime, in seconds."""

    bandwidth: float
    downtime: float


class _Outcome(NamedTuple):
    """What a simulated pre-copy came to: copies while the source ran, and seconds of all; None: it was given up."""

    rounds: int
    seconds: float | None


def precopy(*, quick: bool = False) -> Section:
    """Compare predicted with simulated seconds, for some patterns, bandwidths and limits."""
    # No power of two, so that no hot set is written through just at the end of a measured window.
    nbytes = (48 if quick else 192) << 20
    scale = 0.25 if quick else 1.0
    patterns = [
        *(_Pattern(name, name, 1.0, 32 * scale) for name in ("sweep", "random", "hotset", "idle")),
        _Pattern("phases of 0.1 s", "phases", 0.1 * scale, 32 * scale),
        _Pattern("phases of 2 s", "phases", 2.0 * scale, 64 * scale),
    ]
    migrations = [_Migration(mbytes * 1e6, ms / 1e3) for mbytes in (150, 250, 400, 800) for ms in (10, 50)]
    section = Section(
        "17. Predicted and simulated pre-copy",
        f"buffer:PROGRAM, {format_size(nbytes)}, written at 205 MB/s, is recorded in rounds of {_INTERVAL * 1e3:.0f} ms. Simulated "
        f"pre-copy begins at {_STARTS} times of the recording: it sends all memory, then in each round the distinct pages that the "
        "trace has written meanwhile (of a round of the trace that lies in it by half, half of the pages), until the rest fits the "
        f"limit; it is given up after {_PATIENCE} times as long as one copy of all memory takes. Agree: the share of the starts "
        "that converge as predicted. Error: of the predicted seconds, for each start, without its sign; of the mean: against the "
        "mean of all starts. The prediction is from D(t) of the whole recording; held out: from that of the first half, for the "
        "starts in the second. From tenths: predicted from Curve.bounds, and the share of the starts that lie between, give or "
        "take 1 %; from errors: in the same way, with D(t) one standard error lower and higher.",
    )
    reason = why_no_uffd()
    if reason is not None:
        section.rows.append({"pattern": reason})
        return section
    whole: dict[str, float] = {}
    held_out: dict[str, float] = {}
    for pattern in patterns:
        errors: tuple[list[float], list[float]] = [], []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.dlog"
            _record(path, pattern, nbytes)
            with Recording(path) as recording:
                comparison = _Comparison(recording, nbytes, pattern)
                section.rows.extend(comparison.row(migration, errors) for migration in migrations)
        whole[pattern.name], held_out[pattern.name] = map(statistics.median, errors)
    text = f"the predicted seconds of pre-copy within {_LIMIT:.0f} % of the simulated, in the median"
    section.targets = [Target(text, _LIMIT, "%", whole), Target(f"{text}, held out", _LIMIT, "%", held_out)]
    return section


def _record(path: Path, pattern: _Pattern, nbytes: int) -> None:
    memory = WrittenBuffer(nbytes, pattern.program, port="uffd", period=pattern.period)
    try:
        with DirtyLog(memory) as log:
            memory.resume()
            for _ in rounds(log, _WARM_UP_ROUNDS, _INTERVAL):
                pass
            with Recorder(path, memory, target=pattern.name) as recorder:
                for found in rounds(log, round(pattern.seconds / _INTERVAL), _INTERVAL):
                    recorder.add(found)
            memory.pause()
    finally:
        memory.close()


class _Trace:
    """The pages of each round of a recording of one slot."""

    def __init__(self, recording: Recording, npages: int) -> None:
        self.begin = float(recording.rounds["began"][0])
        self.end = recording.duration
        self._npages = npages
        self._edges = np.append(recording.rounds["began"], recording.duration)
        self._rounds = [
            next((bitmap.pages() for bitmap in recording.dirty(row).values()), np.empty(0, np.int64))
            for row in range(len(recording.rounds))
        ]
        self._all = np.concatenate(self._rounds)
        self._first = np.cumsum([0, *map(len, self._rounds)])

    def written(self, begin: float, end: float) -> float:
        """Return how many distinct bytes were written in a time."""
        first, last = np.searchsorted(self._edges, (begin, end), side="right").tolist()
        first, last = first - 1, min(last - 1, len(self._rounds) - 1)
        missed = np.ones(self._npages)
        missed[self._all[self._first[first + 1] : self._first[last]]] = 0
        for edge in {first, last}:
            low, high = self._edges[edge : edge + 2]
            missed[self._rounds[edge]] *= 1 - (min(end, high) - max(begin, low)) / (high - low)
        return float(self._npages - missed.sum()) * PAGE_SIZE

    def precopy(self, begin: float, migration: _Migration) -> _Outcome:
        """Simulate pre-copy that begins at a time."""
        first = length = self._npages * PAGE_SIZE / migration.bandwidth
        now, count = begin, 0
        while now + length - begin <= _PATIENCE * first:
            rest = self.written(now, now + length) / migration.bandwidth
            now, count = now + length, count + 1
            if rest <= migration.downtime:
                return _Outcome(count, now + rest - begin)
            length = rest
        return _Outcome(count, None)


class _Comparison:
    """A trace, and what is predicted from all of it and from its first half."""

    def __init__(self, recording: Recording, nbytes: int, pattern: _Pattern) -> None:
        self._pattern = pattern
        self._nbytes = nbytes
        self._trace = _Trace(recording, nbytes // PAGE_SIZE)
        self._middle = recording.duration / 2
        self._curve = recording.footprint()
        self._half_curve = recording.footprint(end=self._middle)

    def row(self, migration: _Migration, errors: tuple[list[float], list[float]]) -> dict[str, Any]:
        """Return the row of a migration, and add the errors of its starts, in percent: whole, held out."""
        outcomes = list(self._outcomes(self._trace.begin, migration))
        later = list(self._outcomes(self._middle, migration))
        predicted, from_half = self._predict(self._curve, migration), self._predict(self._half_curve, migration)
        seconds, found, found_held_out = _seconds(outcomes), _errors(predicted, outcomes), _errors(from_half, later)
        errors[0].extend(found)
        errors[1].extend(found_held_out)
        of_mean = 100 * abs(predicted.seconds / statistics.mean(seconds) - 1) if found else None
        return {
            "pattern": self._pattern.name,
            "MB/s": f"{migration.bandwidth / 1e6:.0f}",
            "limit, ms": f"{migration.downtime * 1e3:.3g}",
            "predicted, s": f"{predicted.seconds:.2f}",
            "simulated, s": Spread.of(seconds) if seconds else "-",
            "rounds": f"{predicted.rounds}, {statistics.median(outcome.rounds for outcome in outcomes):.0f}",
            "error, %": Spread.of(found) if found else "-",
            "of the mean, %": "-" if of_mean is None else f"{of_mean:.1f}",
            "agree": f"{_share(predicted.converges == (outcome.seconds is not None) for outcome in outcomes):.2f}",
            "held out: error, %": Spread.of(found_held_out) if found_held_out else "-",
            "from tenths, s": self._range(self._curve.bounds(), migration, seconds),
            "from errors, s": self._range((self._curve.shifted(-1), self._curve.shifted(1)), migration, seconds),
        }

    def _predict(self, curve: Curve, migration: _Migration) -> Prediction:
        return predict(curve, self._nbytes, *migration)

    def _outcomes(self, begin: float, migration: _Migration) -> Iterator[_Outcome]:
        """Simulate starts from a time on, as many in each phase as in any other."""
        room = self._trace.end - _PATIENCE * self._nbytes / migration.bandwidth - begin
        assert room > 0, "the recording is too short"
        cycle = 2 * self._pattern.period
        span = room - room % cycle if room > cycle else room
        for start in range(_STARTS):
            yield self._trace.precopy(begin + span * start / _STARTS, migration)

    def _range(self, curves: tuple[Curve, Curve], migration: _Migration, seconds: list[float]) -> str:
        low, high = (self._predict(curve, migration).seconds for curve in curves)
        held = f", {_share(low * 0.99 <= one <= high * 1.01 for one in seconds):.2f}" if seconds else ""
        return f"{low:.2f} - {high:.2f}{held}"


def _seconds(outcomes: list[_Outcome]) -> list[float]:
    return [outcome.seconds for outcome in outcomes if outcome.seconds is not None]


def _errors(predicted: Prediction, outcomes: list[_Outcome]) -> list[float]:
    return [100 * abs(predicted.seconds / one - 1) for one in _seconds(outcomes)] if predicted.converges else []


def _share(truths: Iterator[bool]) -> float:
    return statistics.mean(map(float, truths))

"""``dirtylog rate``: how fast memory is dirtied, and what a migration would cost."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

from dirtylog.cli import arguments, targets
from dirtylog.cli.command import Command
from dirtylog.cli.exits import ExitCode
from dirtylog.cli.reports import facts_of, print_coverage
from dirtylog.cli.session import conclude, log_in_rounds
from dirtylog.dirty_log import DirtyLog
from dirtylog.observe.footprint import Footprint
from dirtylog.observe.metrics import Metrics
from dirtylog.observe.precopy import predict
from dirtylog.size import format_seconds, format_size

if TYPE_CHECKING:
    import argparse

    from dirtylog.cli.session import Listener
    from dirtylog.observe.footprint import Curve
    from dirtylog.observe.precopy import Prediction
    from dirtylog.observe.rounds import Round
    from dirtylog.target import AnyMemory

SCHEMA = "dirtylog/rate/1"
_MB = 1e6
_GBIT = 1e9 / 8


class Rate(Command):
    """Measure how much memory a guest or process writes within a time, and say what a migration would cost.

    One rate says little, for a page that is written a thousand times counts once in a window of any length. So this prints D(t),
    the distinct memory written within t, at windows from one interval to the whole duration, with the standard error of each mean;
    the rate of a window is D(t)/t. From that it predicts pre-copy migration at a bandwidth and a limit of downtime.
    """

    example: ClassVar[str] = "dirtylog rate emu:arm64:hotset --duration 2s --bandwidth 10Gbit --downtime 300ms"

    @staticmethod
    def prepare(parser: argparse.ArgumentParser) -> None:
        """Add the arguments of rate."""
        parser.add_argument(
            "-d", "--duration", type=arguments.seconds, default=10.0, metavar="TIME", help="how long (default: %(default)g s)"
        )
        parser.add_argument("--rounds", type=arguments.count, metavar="N", help="at most so many of the shortest windows")
        parser.add_argument(
            "--interval", type=arguments.seconds, default=0.05, metavar="TIME", help="the shortest window (default: %(default)s s)"
        )
        parser.add_argument(
            "--bandwidth",
            type=arguments.bandwidth,
            default=10 * _GBIT,
            metavar="B",
            help="of a migration, such as 10Gbit or 1.2GB/s (default: 10Gbit)",
        )
        parser.add_argument(
            "--downtime", type=arguments.seconds, default=0.3, metavar="TIME", help="its limit (default: %(default)s s)"
        )
        parser.add_argument("--json", action="store_true", help="print one JSON document")
        targets.add_metrics(parser)
        targets.add_target(parser)

    def run(self, args: argparse.Namespace) -> ExitCode:
        """Open the target, measure, and print."""
        name = targets.name_of(args)
        with (
            Metrics.serving(args.metrics, args.metrics_address, name) as metrics,
            targets.open_named(args) as memory,
            DirtyLog(memory) as log,
        ):
            measured = _Measured(memory)
            memory.resume()
            listeners: list[Listener] = [measured, *metrics.listeners(memory)]
            status = conclude(memory, log_in_rounds(log, args.rounds, args.interval, listeners, duration=args.duration))
            if not measured.rounds:
                return status
            result = measured.result(args.bandwidth, args.downtime)
            if args.json:
                print(json.dumps(facts_of(name, memory) | {"schema": SCHEMA, "complete": status is ExitCode.DONE} | result))
            else:
                facts = facts_of(name, memory)
                print(f"{' '.join(name.split())}: port {facts['port']} ({facts['exactness']}), page size {facts['page_size']}")
                _print(result)
                print_coverage(memory)
        return status


class _Measured:
    """What a log in rounds says of its memory, and of its own cost."""

    def __init__(self, memory: AnyMemory) -> None:
        self._memory = memory
        self._footprint = Footprint()
        self._held = 0
        self._faults_before = memory.faults
        self.rounds = 0
        self._pages = 0
        self._seconds = self._get_seconds = 0.0
        self._faults: int | None = None

    def add(self, found: Round) -> None:
        """Count a round."""
        self._footprint.add(found.seconds, found.dirty)
        self.rounds += 1
        self._pages += found.dirty_pages
        self._seconds, self._get_seconds = self._seconds + found.seconds, self._get_seconds + found.get_seconds
        self._held = max(self._held, self._memory.held)
        now = self._memory.faults
        self._faults = None if now is None or self._faults_before is None else now - self._faults_before

    def result(self, bandwidth: float, downtime: float) -> dict[str, Any]:
        """Return all of it, for JSON: bytes and seconds."""
        curve = self._footprint.curve()
        prediction = predict(curve, self._held, bandwidth, downtime)
        return {
            "rounds": self.rounds,
            "seconds": self._seconds,
            "dirty_pages": self._pages,
            "working_set_bytes": self._footprint.nbytes,
            "memory_bytes": self._held,
            "curve": _points(curve),
            "migration": {"bandwidth": bandwidth, "downtime_limit": downtime}
            | _plain(prediction)
            | {"seconds_range": [_finite(predict(of, self._held, bandwidth, downtime).seconds) for of in curve.bounds()]},
            "cost": {"get_seconds": self._get_seconds, "get_share": self._get_seconds / self._seconds, "faults": self._faults},
        }


def _points(curve: Curve) -> list[dict[str, Any]]:
    return [
        {"seconds": seconds, "bytes": nbytes, "standard_error": None if math.isnan(error) else error, "windows": windows}
        for seconds, nbytes, error, windows in zip(
            curve.seconds.tolist(), curve.nbytes.tolist(), curve.error.tolist(), curve.windows.tolist(), strict=True
        )
    ]


def _plain(prediction: Prediction) -> dict[str, Any]:
    return {name: _finite(value) if isinstance(value, float) else value for name, value in asdict(prediction).items()}


def _finite(value: float) -> float | None:
    """Return the number, or None for one that JSON does not have."""
    return value if math.isfinite(value) else None


def _print(result: dict[str, Any]) -> None:
    print(f"{'window':>10} {'written':>12} {'error':>8} {'MB/s':>10} {'windows':>8}")
    for point in result["curve"]:
        error, nbytes, seconds = point["standard_error"], point["bytes"], point["seconds"]
        share = "" if error is None else f"{100 * error / nbytes if nbytes else 0:.1f} %"
        print(
            f"{format_seconds(seconds):>10} {format_size(nbytes):>12} {share:>8} {nbytes / seconds / _MB:>10.1f} "
            f"{point['windows']:>8}"
        )
    held, migration, cost = result["memory_bytes"], result["migration"], result["cost"]
    print(
        f"working set {format_size(result['working_set_bytes'])} in {format_seconds(result['seconds'])}, memory {format_size(held)}"
    )
    limit = format_seconds(migration["downtime_limit"])
    print(f"pre-copy at {migration['bandwidth'] / _GBIT:.3g} Gbit/s with at most {limit} of downtime: {_told(migration)}")
    faults = cost["faults"]
    counted = "" if faults is None else f"; {faults} page faults of the target, {faults / result['seconds']:.0f} a second"
    print(
        f"cost of logging: gets took {format_seconds(cost['get_seconds'])}, {100 * cost['get_share']:.2g} % of the time; "
        f"{result['dirty_pages']} pages were armed again{counted}"
    )
    sys.stdout.flush()


def _told(migration: dict[str, Any]) -> str:
    smallest = format_seconds(migration["smallest_downtime"])
    if not migration["converges"]:
        return f"does not converge; the smallest downtime that would is {smallest}"
    low, high = migration["seconds_range"]
    bounds = "never" if high is None else format_seconds(high)
    spread = "" if low is None else f" (between {format_seconds(low)} and {bounds} by when it begins)"
    return (
        f"{migration['rounds']} round{'s' * (migration['rounds'] > 1)}, {format_size(migration['nbytes'])} sent in "
        f"{format_seconds(migration['seconds'])}{spread}, {format_seconds(migration['downtime'])} of downtime; "
        f"{smallest} would do"
    )

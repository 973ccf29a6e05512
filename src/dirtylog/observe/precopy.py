"""What a migration by pre-copy would cost, predicted from D(t). docs/rate.md has the formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dirtylog.errors import InvalidArgumentError

if TYPE_CHECKING:
    from dirtylog.observe.footprint import Curve

_SHRINKING = 1 - 1e-3
"""A round that is not a thousandth shorter than the one before is the last that helps: what follows is as long."""
_SHORTEST = 1e-6


@dataclass(frozen=True, slots=True)
class Prediction:
    """What pre-copy would come to.

    ``rounds`` counts the copies while the source runs, the first of all memory; then the rest is sent while it is paused, for
    ``downtime`` seconds. ``nbytes`` and ``seconds`` are of all that together; where it does not converge they are infinite,
    ``rounds`` are those after which nothing gets shorter, and ``downtime`` what a pause would be then. ``smallest_downtime`` is the
    smallest limit that is known to converge: rounds shorter than the curve's first window are not looked at for that.
    """

    converges: bool
    rounds: int
    nbytes: float
    seconds: float
    downtime: float
    smallest_downtime: float


def predict(curve: Curve, memory_bytes: int, bandwidth: float, downtime: float) -> Prediction:
    """Predict pre-copy of ``memory_bytes`` at ``bandwidth`` bytes a second with at most ``downtime`` seconds of pause.

    Each round sends what was written during the one before, so it lasts D(t) / bandwidth when that one lasted t. The rest is sent
    as soon as that takes no longer than the limit.
    """
    if not bandwidth > 0 or not downtime > 0:
        raise InvalidArgumentError(f"a bandwidth of {bandwidth} bytes/s and a downtime of {downtime} s: both must be above 0")
    shortest = max(_SHORTEST, float(curve.seconds[0]) if len(curve.seconds) else 0.0)
    lengths = [memory_bytes / bandwidth]
    reached: int | None = None
    while True:
        rest = curve.at(lengths[-1]) / bandwidth
        if reached is None and rest <= downtime:
            reached = len(lengths)
        shrinks = rest < lengths[-1] * _SHRINKING
        if shrinks or reached == len(lengths):
            lengths.append(rest)
        if not shrinks or (reached is not None and rest < shortest):
            break
    smallest = min(*lengths[1:], rest, math.inf)
    if reached is None:
        return Prediction(False, len(lengths), math.inf, math.inf, rest, smallest)  # noqa: FBT003 - it has a name in the class
    sent = lengths[: reached + 1]
    return Prediction(True, reached, math.fsum(sent) * bandwidth, math.fsum(sent), sent[-1], smallest)  # noqa: FBT003 - as above

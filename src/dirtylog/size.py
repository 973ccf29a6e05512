"""Quantities as people write them: sizes ``4096``, ``64MiB``, ``1.5G``, times ``10``, ``300ms``, bandwidths ``10Gbit``."""

from __future__ import annotations

import math
import re
import threading
from fractions import Fraction

from dirtylog.errors import InvalidArgumentError

_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: factor**power
    for suffix, factor in (("", 1024), ("ib", 1024), ("b", 1000))
    for power, prefix in enumerate("kmgtp", start=1)
}
_SECONDS = {
    "": Fraction(1),
    "us": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "min": Fraction(60),
    "h": Fraction(3600),
}
# Bytes a second. Without a unit nobody knows whether bits are meant; and networks count in thousands.
_BANDWIDTHS = {
    f"{prefix}{kind}": Fraction(factor**power, bits)
    for kind, bits in (("bit", 8), ("b", 1))
    for prefix, factor, power in (
        *((prefix, 1000, power) for power, prefix in enumerate(("", "k", "m", "g", "t"))),
        *((f"{prefix}i", 1024, power) for power, prefix in enumerate("kmgt", start=1)),
    )
} | {f"{prefix}bps": Fraction(1000**power, 8) for power, prefix in enumerate(("", "k", "m", "g", "t"))}
_SIZE = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([a-z]*)\s*", re.ASCII | re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Return a size in bytes. ``K``, ``KiB`` and so on are powers of 1024, ``KB`` and so on of 1000; case does not matter."""
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise InvalidArgumentError(f"size {text!r}: write a number of bytes, or a number with a unit such as KiB, MiB, GiB or MB")
    nbytes = Fraction(match[1]) * unit
    if nbytes.denominator != 1:
        raise InvalidArgumentError(f"size {text!r}: that is not a whole number of bytes")
    return int(nbytes)


def parse_seconds(text: str | float) -> float:
    """Return a time in seconds: a number, or one with us, ms, s, min or h. It is above 0."""
    if isinstance(text, str):
        match = _SIZE.fullmatch(text)
        unit = _SECONDS.get(match[2].lower()) if match else None
        seconds = float(Fraction(match[1]) * unit) if match is not None and unit is not None else math.nan
    else:
        seconds = text
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise InvalidArgumentError(
            f"{text!r} must be a number of seconds above 0, or a time such as 300ms, and at most {threading.TIMEOUT_MAX:.0f}"
        )
    return seconds


def parse_bandwidth(text: str | float) -> float:
    """Return a bandwidth in bytes a second: ``10Gbit``, ``10Gbit/s``, ``1.25GB/s``, ``100MiB/s``; a number is in bytes a second."""
    if not isinstance(text, str):
        return float(text)
    match = _SIZE.fullmatch(re.sub(r"/s\s*$", "", text))
    # A small b is a bit to some and a byte to others.
    unit = _BANDWIDTHS.get(match[2].lower()) if match and match[2] and match[2][-1] != "b" else None
    value = float(Fraction(match[1]) * unit) if match is not None and unit is not None else 0.0
    if not value > 0:
        raise InvalidArgumentError(f"bandwidth {text!r}: write a number above 0 and its unit, such as 10Gbit, 100MB/s or 1GiB/s")
    return value


def format_seconds(seconds: float) -> str:
    """Return a time for people, with three digits."""
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        # As rounded: no 1000 ms.
        if float(f"{seconds * factor:.3g}") < 1000:  # noqa: PLR2004 - the step between units
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 1000 else f"{seconds:.0f} s"  # noqa: PLR2004 - where three digits end


def format_size(nbytes: float) -> str:
    """Return a size for people, in powers of 1024."""
    unit, digits = "B", 0
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        # As rounded: no 1024.0 KiB.
        if round(abs(nbytes), digits) < 1024:  # noqa: PLR2004 - the step between units
            break
        nbytes, unit, digits = nbytes / 1024, larger, 1
    return f"{nbytes:.{0 if nbytes == int(nbytes) else digits}f} {unit}"

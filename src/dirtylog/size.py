"""Sizes as people write them: ``4096``, ``64MiB``, ``1.5G``."""

from __future__ import annotations

import re
from fractions import Fraction

from dirtylog.errors import InvalidArgumentError

_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: factor**power
    for suffix, factor in (("", 1024), ("ib", 1024), ("b", 1000))
    for power, prefix in enumerate("kmgtp", start=1)
}
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


def format_size(nbytes: float) -> str:
    """Return a size for people, in powers of 1024."""
    unit, digits = "B", 0
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        # As rounded: no 1024.0 KiB.
        if round(abs(nbytes), digits) < 1024:  # noqa: PLR2004 - the step between units
            break
        nbytes, unit, digits = nbytes / 1024, larger, 1
    return f"{nbytes:.{0 if nbytes == int(nbytes) else digits}f} {unit}"

"""Sizes as people write them: ``4096``, ``64MiB``, ``1.5G``."""

from __future__ import annotations

import re

from dirtylog.errors import InvalidArgumentError

_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: factor**power
    for suffix, factor in (("", 1024), ("ib", 1024), ("b", 1000))
    for power, prefix in enumerate("kmgtp", start=1)
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """Return a size in bytes. ``K``, ``KiB`` and so on are powers of 1024, ``KB`` and so on of 1000; case does not matter."""
    if isinstance(text, int):
        return text
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise InvalidArgumentError(f"size {text!r}: write a number of bytes, or a number with a unit such as KiB, MiB, GiB or MB")
    nbytes = float(match[1]) * unit if "." in match[1] else int(match[1]) * unit
    if nbytes != int(nbytes):
        raise InvalidArgumentError(f"size {text!r}: that is not a whole number of bytes")
    return int(nbytes)


def format_size(nbytes: float) -> str:
    """Return a size for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:  # noqa: PLR2004 - the step between units
            return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes == int(nbytes) else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"

"""What the page holds: a head in JSON, and columns of numbers packed as varints, all of it compressed.

Varints are LEB128: seven bits a byte, the least significant first, the high bit set in all bytes but a number's last. The runs of a
round are told by how far each begins after the end of the one before, and by one less than their length: for random single pages
that is little more than a byte a run.
"""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dirtylog.report.axis import united

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dirtylog.report.axis import Writes

MAX_RUNS = 2_000_000
_FEW_ROUNDS = 800
"""A picture is about 400 columns wide: rounds beyond twice that are the first to be merged."""
_COMPRESSION = 6


class Coarse(NamedTuple):
    """Writes as the page has them: rounds merged ``2**rounds`` at a time, pages ``2**pages``."""

    writes: Writes
    rounds: int
    pages: int


def coarsen(writes: Writes, rounds: int, limit: int = MAX_RUNS) -> Coarse:
    """Merge rounds in pairs and pages in pairs until there are at most ``limit`` runs."""
    merged_rounds = merged_pages = 0
    while len(writes.first) > limit:
        if rounds >> merged_rounds > _FEW_ROUNDS or (merged_pages > merged_rounds and rounds >> merged_rounds > 1):
            merged_rounds += 1
            writes = united(writes.rounds >> 1, writes.first, writes.end)
        else:
            merged_pages += 1
            low = np.int64(1 << merged_pages) - 1
            writes = united(writes.rounds, writes.first & ~low, (writes.end + low) & ~low)
    return Coarse(writes, merged_rounds, merged_pages)


def pack(head: dict[str, Any], columns: dict[str, NDArray[np.integer[Any]]]) -> bytes:
    """Return head and columns, compressed with zlib. The head tells where in the bytes after it each column lies."""
    packed = {name: varints(values) for name, values in columns.items()}
    text = json.dumps(head | {"columns": {name: [len(columns[name]), len(data)] for name, data in packed.items()}}).encode()
    return zlib.compress(b"".join((len(text).to_bytes(4, "little"), text, *packed.values())), _COMPRESSION)


def columns_of(writes: Writes, rounds: int) -> dict[str, NDArray[np.int64]]:
    """Return the columns that tell the runs of ``rounds`` rounds."""
    gaps = writes.first.copy()
    fresh = np.concatenate(([True], writes.rounds[1:] != writes.rounds[:-1])) if len(gaps) else np.empty(0, np.bool_)
    gaps[1:] -= np.where(fresh[1:], 0, writes.end[:-1])
    return {
        "run_counts": np.bincount(writes.rounds, minlength=rounds),
        "run_gaps": gaps,
        "run_lengths": writes.end - writes.first - 1,
    }


def varints(values: NDArray[np.integer[Any]]) -> bytes:
    """Return whole numbers of at least 0 as varints."""
    rest = np.asarray(values, np.uint64)
    if not len(rest):
        return b""
    # ceil(bits / 7), and one byte for 0.
    sizes = np.ones(len(rest), np.int64)
    for limit in range(7, 64, 7):
        sizes += rest >> np.uint64(limit) != 0
    places = np.cumsum(sizes) - sizes
    out = np.empty(int(places[-1] + sizes[-1]), np.uint8)
    for byte in range(int(sizes.max())):
        here = sizes > byte
        digits = (rest[here] >> np.uint64(7 * byte)) & np.uint64(0x7F)
        out[places[here] + byte] = digits | np.where(sizes[here] > byte + 1, np.uint64(0x80), np.uint64(0))
    return out.tobytes()

"""The rows of a store's index. Each has a sum, so that what a disk has changed is noticed."""

from __future__ import annotations

import zlib
from typing import NamedTuple, TypeVar

APPLICATION_ID = 0x444C434B
"""SQLite's application_id of an index: "DLCK"."""
VERSION = 1

CREATE = (
    """
    CREATE TABLE facts (
        id INTEGER PRIMARY KEY, checksum TEXT NOT NULL, next_place INTEGER NOT NULL, next_slot INTEGER NOT NULL,
        newest INTEGER NOT NULL, checkpoints INTEGER NOT NULL, crc INTEGER NOT NULL
    )
    """,
    """
    CREATE TABLE checkpoints (
        id INTEGER PRIMARY KEY, parent INTEGER, created REAL NOT NULL, note TEXT NOT NULL, whole INTEGER NOT NULL,
        npages INTEGER NOT NULL, zeros INTEGER NOT NULL, stored INTEGER NOT NULL, layout TEXT NOT NULL, extra BLOB NOT NULL,
        map BLOB NOT NULL, crc INTEGER NOT NULL
    )
    """,
    """
    CREATE TABLE batches (
        batch INTEGER PRIMARY KEY, segment INTEGER NOT NULL, offset INTEGER NOT NULL, nbytes INTEGER NOT NULL, codec TEXT NOT NULL,
        page_size INTEGER NOT NULL, first INTEGER NOT NULL, npages INTEGER NOT NULL, places BLOB, sums BLOB NOT NULL,
        crc INTEGER NOT NULL
    )
    """,
    "CREATE TABLE segments (segment INTEGER PRIMARY KEY, nbytes INTEGER NOT NULL, crc INTEGER NOT NULL)",
    f"PRAGMA application_id={APPLICATION_ID}",
    f"PRAGMA user_version={VERSION}",
)


class Facts(NamedTuple):
    """What holds for the whole store: the checksum, the next place, the next number of a slot.

    ``newest`` is the id of the newest checkpoint, and ``checkpoints`` how many there are: none can vanish unnoticed.
    """

    id: int
    checksum: str
    next_place: int = 0
    next_slot: int = 0
    newest: int = 0
    checkpoints: int = 0
    crc: int = 0


class CheckpointRow(NamedTuple):
    """A checkpoint: ``map`` has the pages that it has other than ``parent``, of which there is none if it is ``whole``."""

    id: int
    parent: int | None
    created: float
    note: str
    whole: int
    npages: int
    zeros: int
    stored: int
    layout: str
    extra: bytes
    map: bytes
    crc: int = 0


class BatchRow(NamedTuple):
    """Some pages in a segment, by ascending place: ``npages`` from place ``first`` on, or ``places`` (packed) once others went.

    ``nbytes`` at ``offset`` hold them, compressed by ``codec``; ``sums`` are the checksums of the pages.
    """

    batch: int
    segment: int
    offset: int
    nbytes: int
    codec: str
    page_size: int
    first: int
    npages: int
    places: bytes | None
    sums: bytes
    crc: int = 0


class SegmentRow(NamedTuple):
    """A segment, and its length as far as it is committed."""

    segment: int
    nbytes: int
    crc: int = 0


R = TypeVar("R", Facts, CheckpointRow, BatchRow, SegmentRow)


def summed(row: R) -> R:
    """Return a row with its sum."""
    return row._replace(crc=_sum(row))


def is_sound(row: R) -> bool:
    """Return whether a row is as it was written."""
    return row.crc == _sum(row)


def _sum(row: tuple[object, ...]) -> int:
    """Return the CRC-32 of all columns but the last."""
    total = 0
    for value in row[:-1]:
        octets = value if isinstance(value, bytes) else repr(value).encode()
        total = zlib.crc32(octets, zlib.crc32(len(octets).to_bytes(8, "little"), total))
    return total

"""The tables of a recording. Whoever changes them raises the version; docs/recording.md describes them for other readers."""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

APPLICATION_ID = 0x444C4F47
"""SQLite's application_id of a recording: "DLOG"."""
VERSION = 1
"""SQLite's user_version: of the tables and of the packing."""

CREATE = (
    "CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    """
    CREATE TABLE IF NOT EXISTS slots (
        slot INTEGER PRIMARY KEY, id INTEGER NOT NULL, base_gfn INTEGER NOT NULL, npages INTEGER NOT NULL,
        page_size INTEGER NOT NULL, flags INTEGER NOT NULL, host_address INTEGER NOT NULL, name NOT NULL,
        permissions TEXT NOT NULL, file_offset INTEGER NOT NULL, anonymous INTEGER NOT NULL
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS rounds (
        round INTEGER PRIMARY KEY, began REAL NOT NULL, seconds REAL NOT NULL, get_seconds REAL NOT NULL, slots INTEGER NOT NULL,
        runs INTEGER NOT NULL, pages INTEGER NOT NULL, nbytes INTEGER NOT NULL, crc INTEGER NOT NULL, data BLOB NOT NULL
    )
    """,
    "CREATE TABLE IF NOT EXISTS marks (mark INTEGER PRIMARY KEY, seconds REAL NOT NULL, text TEXT NOT NULL)",
    f"PRAGMA application_id={APPLICATION_ID}",
    f"PRAGMA user_version={VERSION}",
)
"""What makes an empty file a recording, in one transaction. All statements here may be done again, after an interrupt for one."""

INSERT_SLOT = "INSERT OR REPLACE INTO slots VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
INSERT_ROUND = "INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
INSERT_MARK = "INSERT OR REPLACE INTO marks VALUES (?, ?, ?)"
INSERT_FACT = "INSERT OR REPLACE INTO facts VALUES (?, ?)"

_SUMMED = struct.Struct("<q3d4q")


class RoundRow(NamedTuple):
    """A row of the table rounds."""

    round: int
    began: float
    seconds: float
    get_seconds: float
    slots: int
    runs: int
    pages: int
    nbytes: int
    crc: int
    data: bytes

    def sum(self) -> int:
        """Return the CRC-32 of the row: of its first eight columns as little-endian 64-bit numbers, and of the data."""
        return zlib.crc32(self.data, zlib.crc32(_SUMMED.pack(*self[:8])))

    def summed(self) -> RoundRow:
        """Return the row with its sum."""
        return self._replace(crc=self.sum())

"""The index of a store: which checkpoints there are, which pages they have, and where the contents lie.

SQLite, with a write-ahead log and a full sync at each commit. A commit is the instant at which a checkpoint exists. Every row has a
sum, so that what a disk has changed is noticed.
"""

from __future__ import annotations

import json
import sqlite3
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from dirtylog.errors import (
    AccessDeniedError,
    CorruptDataError,
    DirtyLogError,
    InvalidArgumentError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

APPLICATION_ID = 0x444C434B
"""SQLite's application_id of an index: "DLCK"."""
VERSION = 1
_BUSY_SECONDS = 30.0

_CREATE = (
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
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
    "CREATE INDEX batches_by_segment ON batches (segment)",
    "CREATE INDEX batches_by_place ON batches (first)",
    "CREATE TABLE segments (segment INTEGER PRIMARY KEY, nbytes INTEGER NOT NULL)",
    f"PRAGMA application_id={APPLICATION_ID}",
    f"PRAGMA user_version={VERSION}",
)


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


def summed(row: BatchRow | CheckpointRow) -> BatchRow | CheckpointRow:
    """Return a row with its sum, the CRC-32 of all other columns."""
    return row._replace(crc=_sum(row))


def _sum(row: BatchRow | CheckpointRow) -> int:
    total = 0
    for value in row[:-1]:
        octets = value if isinstance(value, bytes) else repr(value).encode()
        total = zlib.crc32(octets, zlib.crc32(len(octets).to_bytes(8, "little"), total))
    return total


@dataclass(frozen=True, slots=True)
class Facts:
    """What holds for the whole store: the checksum, the next place, and the next number of a slot."""

    checksum: str
    next_place: int = 0
    next_slot: int = 0


class Index:
    """The open index; a context manager. ``create`` makes one where there is none, with this checksum."""

    def __init__(self, path: Path, *, create: str | None = None, write: bool = False) -> None:
        self.path = path
        if not path.exists() and create is None:
            raise InvalidArgumentError(f"{str(path.parent)!r} is no checkpoint store: it has no {path.name}")
        with self.errors():
            mode = "rwc" if create is not None else "rw"
            self._database = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={mode}",
                uri=True,
                isolation_level=None,
                timeout=_BUSY_SECONDS,
                check_same_thread=False,
            )
        try:
            with self.errors():
                if create is not None and not self._database.execute("PRAGMA page_count").fetchone()[0]:
                    self._create(create)
                self._check()
                if write:
                    self._database.execute("PRAGMA synchronous=FULL")
                else:
                    self._database.execute("PRAGMA query_only=1")
        except BaseException:
            self.close()
            raise

    def _create(self, checksum: str) -> None:
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        with self.transaction():
            for statement in _CREATE:
                self._database.execute(statement)
            self.put_facts(Facts(checksum))

    def _check(self) -> None:
        kind, version = (self._database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version"))
        name = repr(str(self.path.parent))
        if kind != APPLICATION_ID:
            raise InvalidArgumentError(f"{name} is no checkpoint store", reason=f"{self.path.name} is another program's")
        if version > VERSION:
            raise UnsupportedError(
                f"the checkpoint store {name} has version {version}, and this dirtylog knows up to {VERSION}",
                remedy="use a newer dirtylog",
            )

    # --- rows

    def facts(self) -> Facts:
        """Return what holds for the whole store."""
        with self.errors():
            found = {name: json.loads(value) for name, value in self._database.execute("SELECT name, value FROM facts")}
            return Facts(**found)

    def put_facts(self, facts: Facts) -> None:
        """Write it."""
        for name in ("checksum", "next_place", "next_slot"):
            self._execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(getattr(facts, name))))

    def checkpoints(self) -> list[CheckpointRow]:
        """Return all checkpoints, oldest first."""
        with self.errors():
            rows = [CheckpointRow(*row) for row in self._database.execute("SELECT * FROM checkpoints ORDER BY id")]
        for row in rows:
            if row.crc != _sum(row):
                raise CorruptDataError(f"checkpoint {row.id} in {str(self.path)!r} does not have its checksum")
        return rows

    def put_checkpoint(self, row: CheckpointRow) -> int:
        """Write a checkpoint, and return its id."""
        self._execute("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", summed(row))
        return row.id

    def drop_checkpoint(self, number: int) -> None:
        """Forget a checkpoint."""
        self._execute("DELETE FROM checkpoints WHERE id = ?", (number,))

    def batches(self, segment: int | None = None) -> list[BatchRow]:
        """Return the batches, by place, of one segment or of all."""
        where, values = ("", ()) if segment is None else ("WHERE segment = ?", (segment,))
        with self.errors():
            found = self._database.execute(f"SELECT * FROM batches {where} ORDER BY first", values)  # noqa: S608 - our own words
            rows = [BatchRow(*row) for row in found]
        for row in rows:
            if row.crc != _sum(row):
                raise CorruptDataError(f"batch {row.batch} in {str(self.path)!r} does not have its checksum")
        return rows

    def put_batches(self, rows: list[BatchRow]) -> None:
        """Write batches."""
        with self.errors():
            self._database.executemany("INSERT OR REPLACE INTO batches VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", map(summed, rows))

    def drop_batch(self, number: int) -> None:
        """Forget a batch."""
        self._execute("DELETE FROM batches WHERE batch = ?", (number,))

    def next_batch(self) -> int:
        """Return a number that no batch has."""
        return int(self._execute("SELECT coalesce(max(batch), 0) + 1 FROM batches").fetchone()[0])

    def next_checkpoint(self) -> int:
        """Return the next checkpoint's id."""
        return int(self._execute("SELECT coalesce(max(id), 0) + 1 FROM checkpoints").fetchone()[0])

    def segments(self) -> dict[int, int]:
        """Return the length of each segment, as far as it is committed."""
        return dict(self._execute("SELECT segment, nbytes FROM segments").fetchall())

    def put_segment(self, number: int, nbytes: int) -> None:
        """Write the length of a segment."""
        self._execute("INSERT OR REPLACE INTO segments VALUES (?, ?)", (number, nbytes))

    def drop_segment(self, number: int) -> None:
        """Forget a segment."""
        self._execute("DELETE FROM segments WHERE segment = ?", (number,))

    def quick_check(self) -> list[str]:
        """Return what SQLite finds wrong with the file."""
        found = [row[0] for row in self._execute("PRAGMA quick_check").fetchall()]
        return [] if found == ["ok"] else found

    # --- the rest

    def transaction(self) -> _Transaction:
        """Return a context that commits, or on an exception changes nothing."""
        return _Transaction(self)

    def errors(self) -> _Errors:
        """Return a context that turns what SQLite says into what our users are told."""
        return _Errors(self.path)

    def backup(self, path: Path) -> None:
        """Write a copy of the index as it is now."""
        with self.errors(), sqlite3.connect(path) as copy:
            self._database.backup(copy)
        copy.close()

    def _execute(self, statement: str, values: Any = ()) -> sqlite3.Cursor:  # noqa: ANN401 - whatever SQLite stores
        with self.errors():
            return self._database.execute(statement, values)

    def close(self) -> None:
        """Close it. A second call does nothing."""
        database = getattr(self, "_database", None)
        if database is not None:
            database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Transaction:
    def __init__(self, index: Index) -> None:
        self._index = index

    def __enter__(self) -> None:
        self._index._execute("BEGIN IMMEDIATE")  # noqa: SLF001 - of this module

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        database = self._index._database  # noqa: SLF001 - of this module
        try:
            if kind is None:
                self._index._execute("COMMIT")  # noqa: SLF001 - of this module
        finally:
            if database.in_transaction:
                database.execute("ROLLBACK")


class _Errors:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, sqlite3.Error | ValueError | TypeError) or isinstance(error, DirtyLogError):
            return
        name, code = repr(str(self._path)), getattr(error, "sqlite_errorcode", None)
        base = None if code is None else code & 0xFF
        if base == sqlite3.SQLITE_NOTADB:
            raise InvalidArgumentError(f"{name} is no index of a checkpoint store", reason="it is not an SQLite file") from error
        if base in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY):
            raise DirtyLogError(f"the index {name} cannot be read or written", reason=str(error)) from error
        if base in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
            raise AccessDeniedError(f"the index {name} cannot be opened", reason=str(error)) from error
        raise CorruptDataError(f"the index {name} is damaged", reason=str(error)) from error


def rows_of(rows: list[CheckpointRow], number: int) -> Iterator[CheckpointRow]:
    """Yield a checkpoint and its ancestors, back to one that is whole."""
    by_id = {row.id: row for row in rows}
    wanted: int | None = number
    while wanted is not None:
        row = by_id.get(wanted)
        if row is None:
            raise InvalidArgumentError(
                f"there is no checkpoint {number}"
                if wanted == number
                else f"checkpoint {number} needs checkpoint {wanted}, which is missing",
                remedy=f"the checkpoints are: {', '.join(map(str, by_id)) or 'none'}",
            )
        yield row
        wanted = None if row.whole else row.parent

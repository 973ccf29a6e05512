"""The index of a store: which checkpoints there are, which pages they have, and where the contents lie.

A full sync at each commit. A commit is the instant at which a checkpoint exists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dirtylog.checkpoint.database import Database
from dirtylog.checkpoint.rows import (
    APPLICATION_ID,
    CREATE,
    VERSION,
    BatchRow,
    CheckpointRow,
    Facts,
    R,
    SegmentRow,
    is_sound,
    summed,
)
from dirtylog.errors import CorruptDataError, InvalidArgumentError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Index(Database):
    """The open index; a context manager. ``create`` makes one where there is none, with this checksum."""

    def __init__(self, path: Path, *, create: str | None = None, write: bool = False) -> None:
        if not path.exists() and create is None:
            raise InvalidArgumentError(f"{str(path.parent)!r} is no checkpoint store: it has no {path.name}")
        super().__init__(path, create=create is not None)
        try:
            with self.errors():
                self._database.execute("PRAGMA cell_size_check=1")
                if create is not None and self._is_empty():
                    self._create(create)
                self._check()
                self._database.execute("PRAGMA synchronous=FULL" if write else "PRAGMA query_only=1")
        except BaseException:
            self.close()
            raise

    def _is_empty(self) -> bool:
        """Return whether nothing is in it yet: it is new, or its making was cut off."""
        return not self._database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] and not self._number("application_id")

    def _create(self, checksum: str) -> None:
        self._database.execute("PRAGMA journal_mode=WAL")
        self._database.execute("PRAGMA synchronous=FULL")
        with self.transaction():
            for statement in CREATE:
                self._database.execute(statement)
            self.put_facts(Facts(1, checksum))

    def _check(self) -> None:
        kind, version = self._number("application_id"), self._number("user_version")
        name = repr(str(self.path.parent))
        if kind != APPLICATION_ID:
            raise InvalidArgumentError(f"{name} is no checkpoint store", reason=f"{self.path.name} is another program's")
        if version > VERSION:
            raise UnsupportedError(
                f"the checkpoint store {name} has version {version}, and this dirtylog knows up to {VERSION}",
                remedy="use a newer dirtylog",
            )

    def facts(self) -> Facts:
        """Return what holds for the whole store."""
        rows = self._rows(Facts, "SELECT * FROM facts")
        if len(rows) != 1 or not is_sound(rows[0]):
            raise CorruptDataError(f"the index {str(self.path)!r} is damaged", reason="its facts do not have their checksum")
        return rows[0]

    def put_facts(self, facts: Facts) -> None:
        """Write it."""
        self._put("facts", [facts])

    def ids(self) -> list[int]:
        """Return the ids of all checkpoints, ascending."""
        with self.reading():
            found = [row[0] for row in self._execute("SELECT id FROM checkpoints ORDER BY id")]
            facts = self.facts()
        if len(found) != facts.checkpoints or (found and found[-1] != facts.newest):
            raise CorruptDataError(f"the index {str(self.path)!r} is damaged", reason="checkpoints are missing in it")
        return found

    def checkpoint(self, number: int) -> CheckpointRow | None:
        """Return one checkpoint, if there is such a one."""
        found = self._rows(CheckpointRow, "SELECT * FROM checkpoints WHERE id = ?", (number,))
        if found and not (is_sound(found[0]) and found[0].id == number):
            raise CorruptDataError(f"checkpoint {number} in {str(self.path)!r} does not have its checksum")
        return found[0] if found else None

    def checkpoints(self) -> list[CheckpointRow]:
        """Return all checkpoints, oldest first."""
        with self.reading():
            ids = self.ids()
            found = self._rows(CheckpointRow, "SELECT * FROM checkpoints ORDER BY id")
        sound = [row for row in found if is_sound(row)]
        if [row.id for row in sound] == ids:
            return sound
        damaged = sorted(set(ids) - {row.id for row in sound})
        raise CorruptDataError(
            f"in {str(self.path)!r} these checkpoints do not have their checksums: {', '.join(map(str, damaged))}",
            remedy=f"the others can be named: {', '.join(str(row.id) for row in sound) or 'none'}",
        )

    def children(self, number: int) -> list[CheckpointRow]:
        """Return the checkpoints that have what they have not from ``number``."""
        found = self._rows(CheckpointRow, "SELECT * FROM checkpoints WHERE parent = ? AND NOT whole", (number,))
        if not all(map(is_sound, found)):
            raise CorruptDataError(f"checkpoints in {str(self.path)!r} do not have their checksums")
        return found

    def put_checkpoint(self, row: CheckpointRow) -> int:
        """Write a checkpoint, and return its id."""
        facts = self.facts()
        if row.id > facts.newest:
            self.put_facts(facts._replace(newest=row.id, checkpoints=facts.checkpoints + 1))
        self._put("checkpoints", [row])
        return row.id

    def drop_checkpoint(self, number: int) -> None:
        """Forget a checkpoint, which is not the newest."""
        facts = self.facts()
        self.put_facts(facts._replace(checkpoints=facts.checkpoints - 1))
        self._execute("DELETE FROM checkpoints WHERE id = ?", (number,))

    def batches(self) -> list[BatchRow]:
        """Return all batches, by place."""
        found, damaged = self.batches_by_soundness()
        if damaged:
            raise CorruptDataError(
                f"in {str(self.path)!r} these batches do not have their checksums: {', '.join(map(str, damaged))}"
            )
        return found

    def batches_by_soundness(self) -> tuple[list[BatchRow], list[int]]:
        """Return the batches that are as they were written, by place, and the numbers of the others."""
        found = self._rows(BatchRow, "SELECT * FROM batches ORDER BY batch")
        sound = sorted((row for row in found if is_sound(row)), key=lambda row: row.first)
        return sound, [row.batch for row in found if not is_sound(row)]

    def put_batches(self, rows: list[BatchRow]) -> None:
        """Write batches."""
        self._put("batches", rows)

    def drop_batch(self, number: int) -> None:
        """Forget a batch."""
        self._execute("DELETE FROM batches WHERE batch = ?", (number,))

    def next_batch(self) -> int:
        """Return a number that no batch has."""
        return int(self._execute("SELECT coalesce(max(batch), 0) + 1 FROM batches").fetchone()[0])

    def next_checkpoint(self) -> int:
        """Return the next checkpoint's id."""
        return self.facts().newest + 1

    def segments(self) -> dict[int, int]:
        """Return the length of each segment, as far as it is committed."""
        found = self._rows(SegmentRow, "SELECT * FROM segments")
        for row in found:
            if not is_sound(row):
                raise CorruptDataError(f"segment {row.segment} in {str(self.path)!r} does not have its checksum")
        return {row.segment: row.nbytes for row in found}

    def put_segment(self, number: int, nbytes: int) -> None:
        """Write the length of a segment."""
        self._put("segments", [SegmentRow(number, nbytes)])

    def drop_segment(self, number: int) -> None:
        """Forget a segment."""
        self._execute("DELETE FROM segments WHERE segment = ?", (number,))

    def _rows(self, kind: type[R], statement: str, values: Any = ()) -> list[R]:  # noqa: ANN401 - whatever SQLite stores
        with self.errors():
            return [kind(*row) for row in self._database.execute(statement, values)]

    def _put(self, table: str, rows: list[R]) -> None:
        if not rows:
            return
        marks = ", ".join("?" * len(rows[0]))
        with self.errors():
            self._database.executemany(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", map(summed, rows))  # noqa: S608 - our own words


def chain(index: Index, number: int) -> Iterator[CheckpointRow]:
    """Yield a checkpoint and its ancestors, back to one that is whole."""
    wanted: int | None = number
    while wanted is not None:
        row = index.checkpoint(wanted)
        if row is None and wanted == number:
            raise InvalidArgumentError(
                f"there is no checkpoint {number}", remedy=f"the checkpoints are: {', '.join(map(str, index.ids())) or 'none'}"
            )
        if row is None:
            raise CorruptDataError(f"checkpoint {number} needs checkpoint {wanted}, which is missing")
        yield row
        wanted = None if row.whole else row.parent

"""Reads a recording, also while it is being written."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

from dirtylog.bitmap import DirtyBitmap
from dirtylog.errors import AccessDeniedError, CorruptDataError, DirtyLogError, InvalidArgumentError, UnsupportedError
from dirtylog.memslot import MemorySlot, SlotFlags
from dirtylog.observe.footprint import Curve, Footprint
from dirtylog.recording.runs import Packed, Runs, unpack
from dirtylog.recording.schema import APPLICATION_ID, VERSION, RoundRow
from dirtylog.words import pages_of_runs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from numpy.typing import NDArray

ROUND = np.dtype(
    [
        *(("number", np.int64), ("began", np.float64), ("seconds", np.float64), ("get_seconds", np.float64)),
        *(("runs", np.int64), ("pages", np.int64), ("nbytes", np.int64)),
    ]
)
"""A round: times in seconds, ``began`` since the start; how many runs, pages and bytes were dirty."""
RUN = np.dtype([("round", np.int64), ("slot", np.int32), ("first", np.int64), ("npages", np.int64)])
"""A run of dirty pages: the row of its round, its slot in :attr:`Recording.slots`, its first page's offset there, its length."""

_RUNS_AT_ONCE = 1 << 17
_BUSY_SECONDS = 10.0


class Mark(NamedTuple):
    """What a user, or the target, wrote down while the recording ran, ``seconds`` after its start."""

    seconds: float
    text: str


class Recording:
    """A recording that :class:`Recorder` wrote; a context manager.

    ``facts`` are what every result names: "target", "port", "exactness", "page_size", "blind_spots", "incomplete", and more
    (docs/recording.md); "status" is None while the recording goes on, and for ever if its recorder was killed. ``slots`` are in
    order of appearance: several of a process may have had one id, one after the other. ``rounds`` has a row a round, of type
    :data:`ROUND`; ``marks`` are ascending. A recording that goes on is read as it is now.

    Raises :class:`InvalidArgumentError` for what is no recording, :class:`UnsupportedError` for one that is newer than this,
    :class:`CorruptDataError` for one that is damaged: here, or where its rounds are read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._database = _open(self.path)
        try:
            with self._reading():
                self._check()
                self.facts: dict[str, Any] = {
                    name: json.loads(value) for name, value in self._database.execute("SELECT name, value FROM facts")
                }
                self.slots = tuple(map(_slot, self._database.execute("SELECT * FROM slots ORDER BY slot")))
                columns = ", ".join(("round", *(ROUND.names or ())[1:]))
                self.rounds = np.array(
                    self._database.execute(f"SELECT {columns} FROM rounds ORDER BY round").fetchall(),  # noqa: S608 - our own names
                    ROUND,
                )
                self.marks = tuple(Mark(*row) for row in self._database.execute("SELECT seconds, text FROM marks ORDER BY mark"))
        except BaseException:
            self.close()
            raise

    @property
    def duration(self) -> float:
        """The seconds from the start to the end of the last round."""
        return float(self.rounds["began"][-1] + self.rounds["seconds"][-1]) if len(self.rounds) else 0.0

    def runs(self, start: float | None = None, end: float | None = None) -> NDArray[np.void]:
        """Return the runs of the rounds that lie in this time, in seconds since the start: rows of type :data:`RUN`, in order."""
        rows = self._rows(start, end)
        return self.runs_of(rows.start, rows.stop)

    def runs_of(self, first: int, stop: int) -> NDArray[np.void]:
        """Return the runs of rounds by their rows in :attr:`rounds`, from ``first`` up to but without ``stop``."""
        parts = list(self._batches(range(first, stop)))
        result = np.empty(sum(len(part.first) for part in parts), RUN)
        at = 0
        for part in parts:
            into = result[at : at + len(part.first)]
            for name, column in zip(RUN.names or (), part, strict=True):
                into[name] = column
            at += len(into)
        return result

    def dirty(self, row: int) -> dict[MemorySlot, DirtyBitmap]:
        """Return what a round found, ``row`` of :attr:`rounds`: of each slot that had any the dirty pages."""
        found = self._unpacked(range(len(self.rounds))[row], range(len(self.rounds))[row] + 1)
        bitmaps: dict[MemorySlot, DirtyBitmap] = {}
        for number in np.unique(found.slot).tolist():
            slot = self.slots[number]
            of_slot = found.slot == number
            bitmaps[slot] = DirtyBitmap.from_pages(slot.npages, pages_of_runs(found.first[of_slot], found.npages[of_slot]))
        return bitmaps

    def footprint(self, start: float | None = None, end: float | None = None) -> Curve:
        """Return D(t) of the rounds that lie in this time: how much is written at least once within t."""
        footprint = Footprint()
        bases = np.array([footprint.base_of(slot) for slot in self.slots], np.int64)
        sizes = np.array([slot.page_size for slot in self.slots], np.int64)
        uniform = int(sizes[0]) if len(sizes) and (sizes == sizes[0]).all() else None
        rows = self._rows(start, end)
        row = rows.start
        for part in self._batches(rows):
            firsts = bases[part.slot] + part.first
            last = int(part.round[-1]) if len(part.round) else row
            edges = np.searchsorted(part.round, np.arange(row, last + 2))
            for number, (begin, stop) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True), row):
                pages = pages_of_runs(firsts[begin:stop], part.npages[begin:stop])
                size = uniform if uniform is not None else np.repeat(sizes[part.slot[begin:stop]], part.npages[begin:stop])
                footprint.add_pages(float(self.rounds["seconds"][number]), pages, size)
            row = last + 1
        return footprint.curve()

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        self._database.close()

    def _rows(self, start: float | None, end: float | None) -> range:
        """Return the rows of the rounds that lie in a time."""
        ends = self.rounds["began"] + self.rounds["seconds"]
        first = 0 if start is None else int(np.searchsorted(self.rounds["began"], start))
        return range(first, len(ends) if end is None else max(first, int(np.searchsorted(ends, end, side="right"))))

    def _batches(self, rows: range) -> Iterator[Runs]:
        """Yield the runs of rounds, some at once: few enough to stay in the processor's cache."""
        before = np.cumsum(self.rounds["runs"]) // _RUNS_AT_ONCE
        first = rows.start
        while first < rows.stop:
            stop = min(rows.stop, max(first + 1, int(np.searchsorted(before, before[first], side="right"))))
            yield self._unpacked(first, stop)
            first = stop

    def _unpacked(self, first: int, stop: int) -> Runs:
        numbers = self.rounds["number"][first:stop]
        with self._reading():
            rows = list(
                map(
                    RoundRow._make,
                    self._database.execute(
                        "SELECT * FROM rounds WHERE round BETWEEN ? AND ? ORDER BY round", (int(numbers[0]), int(numbers[-1]))
                    ),
                )
            )
            for row in rows:
                if row.crc != row.sum():
                    raise CorruptDataError(f"round {row.round} of the recording {str(self.path)!r} does not have its checksum")
            if len(rows) != stop - first:
                raise CorruptDataError(f"the recording {str(self.path)!r} lacks rounds between {numbers[0]} and {numbers[-1]}")
            runs = unpack(np.arange(first, stop), [Packed(row.slots, row.runs, row.data) for row in rows])
            self._check_pages(runs)
            return runs

    def _check_pages(self, runs: Runs) -> None:
        if not len(runs.slot):
            return
        lengths = np.array([slot.npages for slot in self.slots], np.int64)
        known = runs.slot.max() < len(lengths) and runs.first.min() >= 0 and runs.npages.min() > 0
        if not known or (runs.npages > lengths[runs.slot] - runs.first).any():
            raise CorruptDataError(f"the recording {str(self.path)!r} has pages that none of its slots has")

    def _check(self) -> None:
        pages, kind, version = (
            self._database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "application_id", "user_version")
        )
        if kind != APPLICATION_ID:
            reason = "it is another program's SQLite file" if pages else "it is empty"
            raise InvalidArgumentError(f"{str(self.path)!r} is no recording", reason=reason)
        if version > VERSION:
            raise UnsupportedError(
                f"the recording {str(self.path)!r} has version {version}, and this dirtylog reads up to {VERSION}",
                remedy="read it with a newer dirtylog",
            )

    def _reading(self) -> _Reading:
        return _Reading(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Reading:
    """Turns what SQLite says of a file into what our users are told."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, sqlite3.Error | ValueError | TypeError | OverflowError) and not isinstance(error, DirtyLogError):
            code = getattr(error, "sqlite_errorcode", None)
            name = repr(str(self._path))
            if code == sqlite3.SQLITE_NOTADB:
                raise InvalidArgumentError(f"{name} is no recording", reason="it is not an SQLite file") from error
            if code == sqlite3.SQLITE_BUSY:
                raise DirtyLogError(f"the recording {name} is locked", remedy="try again when nobody writes to it") from error
            if code is not None and code & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
                raise AccessDeniedError(
                    f"{name} cannot be read",
                    reason=str(error),
                    remedy="its recorder was killed: copy it, with the journal beside it, to where you may write",
                ) from error
            raise CorruptDataError(f"the recording {name} is damaged", reason=str(error)) from error


def _open(path: Path) -> sqlite3.Connection:
    try:
        with path.open("rb"):
            pass
    except FileNotFoundError as error:
        raise InvalidArgumentError(f"there is no file {str(path)!r}") from error
    except PermissionError as error:
        raise AccessDeniedError(f"{str(path)!r} may not be read", reason=error.strerror) from error
    except OSError as error:
        raise InvalidArgumentError(f"{str(path)!r} cannot be read", reason=error.strerror) from error
    # To read a file whose recorder was killed may mean to take back its last transaction, which is a write; nothing else is.
    database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=_BUSY_SECONDS, check_same_thread=False)
    database.execute("PRAGMA query_only=1")
    return database


def _slot(row: tuple[Any, ...]) -> MemorySlot:
    _, slot_id, base_gfn, npages, page_size, flags, host_address, name, permissions, file_offset, anonymous = row
    return MemorySlot(
        slot_id,
        base_gfn,
        npages,
        page_size,
        SlotFlags(flags),
        host_address,
        name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name,
        permissions,
        file_offset,
        bool(anonymous),
    )

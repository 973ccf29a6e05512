"""An SQLite file with a write-ahead log, shared by threads, whose errors are ours."""

from __future__ import annotations

import errno
import sqlite3
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from dirtylog.errors import AccessDeniedError, CorruptDataError, DirtyLogError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

_BUSY_SECONDS = 30.0


class Database:
    """An open file; a context manager. ``create`` makes it where there is none.

    Threads may share it: one that reads waits for the end of another's transaction, and does not see half of it.
    """

    def __init__(self, path: Path, *, create: bool) -> None:
        self.path = path
        self._lock = threading.RLock()
        with self.errors():
            self._database = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode={'rwc' if create else 'rw'}",
                uri=True,
                isolation_level=None,
                timeout=_BUSY_SECONDS,
                check_same_thread=False,
            )

    def transaction(self) -> _Transaction:
        """Return a context that commits, or on an exception changes nothing."""
        return _Transaction(self, "BEGIN IMMEDIATE")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Return a context in which all that is read is of one instant."""
        with self._lock:
            if self._database.in_transaction:
                yield
                return
            with _Transaction(self, "BEGIN"):
                yield

    def quick_check(self) -> list[str]:
        """Return what SQLite finds wrong with the file."""
        try:
            found = [row[0] for row in self._execute("PRAGMA quick_check").fetchall()]
        except CorruptDataError as error:
            return [str(error)]
        return [] if found == ["ok"] else found

    def settle(self) -> bool:
        """Bring what is committed from the log to the file itself, synced; return whether all of it is there.

        A process that dies between its commit and the sync leaves a commit that others see, and that a power cut takes back.
        """
        busy, logged, moved = self._execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        return not busy and logged == moved

    def errors(self) -> _Errors:
        """Return a context that turns what SQLite says into what our users are told."""
        return _Errors(self.path, self._lock)

    def backup(self, path: Path) -> None:
        """Write a copy of the index as it is now."""
        with self.errors(), sqlite3.connect(path) as copy:
            self._database.backup(copy)
        copy.close()

    def _number(self, pragma: str) -> int:
        return int(self._database.execute(f"PRAGMA {pragma}").fetchone()[0])

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
    def __init__(self, database: Database, begin: str) -> None:
        self._of = database
        self._begin = begin

    def __enter__(self) -> None:
        self._of._lock.acquire()  # noqa: SLF001 - of this module
        try:
            self._of._execute(self._begin)  # noqa: SLF001 - of this module
        except BaseException:
            self._of._lock.release()  # noqa: SLF001 - of this module
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        database = self._of._database  # noqa: SLF001 - of this module
        try:
            if kind is None:
                self._of._execute("COMMIT")  # noqa: SLF001 - of this module
        finally:
            try:
                if database.in_transaction:
                    self._of._execute("ROLLBACK")  # noqa: SLF001 - of this module
            finally:
                self._of._lock.release()  # noqa: SLF001 - of this module


class _Errors:
    def __init__(self, path: Path, lock: threading.RLock) -> None:
        self._path = path
        self._lock = lock

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()
        if not isinstance(error, sqlite3.Error | ValueError | TypeError) or isinstance(error, DirtyLogError):
            return
        name, code = repr(str(self._path)), getattr(error, "sqlite_errorcode", None)
        base = None if code is None else code & 0xFF
        if base == sqlite3.SQLITE_NOTADB:
            raise InvalidArgumentError(f"{name} is no index of a checkpoint store", reason="it is not an SQLite file") from error
        if base == sqlite3.SQLITE_FULL:
            raise DirtyLogError(f"the index {name} cannot be written", errno=errno.ENOSPC, reason="the disk is full") from error
        if base in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY):
            raise DirtyLogError(f"the index {name} cannot be read or written", reason=str(error)) from error
        if base in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
            raise AccessDeniedError(f"the index {name} cannot be opened", reason=str(error)) from error
        raise CorruptDataError(f"the index {name} is damaged", reason=str(error)) from error

"""Writes a recording while a log runs: a transaction a round, so that what is in the file is whole at any instant.

Facts about SQLite that this relies on:

* A transaction that is cut off, by SIGKILL too, leaves a journal from which the next reader takes the file back to the one before.
  The journal is found by its name; one that is left of an earlier file is not played into a new, empty one.
* With synchronous=OFF it waits for no disk. A process that dies loses nothing by that, for the kernel has the pages; a machine that
  loses its power may.
* Readers lock the file while they read. A round that finds it locked is kept, and written with the next one.
* Closing any descriptor of a file drops the locks that the process has on it (fcntl(2)). So the descriptor that holds ours open is
  closed last. Ours is flock's, which is none of SQLite's.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import sqlite3
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dirtylog.errors import DirtyLogError, InvalidArgumentError
from dirtylog.memslot import SlotFlags
from dirtylog.recording.runs import pack
from dirtylog.recording.schema import (
    CREATE,
    INSERT_FACT,
    INSERT_MARK,
    INSERT_ROUND,
    INSERT_SLOT,
    RoundRow,
)

if TYPE_CHECKING:
    from types import TracebackType

    from dirtylog.memory import Memory
    from dirtylog.memslot import MemorySlot
    from dirtylog.observe.rounds import Round

_BUSY_SECONDS = 1.0
_BUSY_SECONDS_AT_END = 30.0
_ROUNDS_BETWEEN_COUNTS = 16
_MOST_GAPS = 100


class Recorder:
    """Writes the rounds of one memory's log into a new file; a context manager.

    ``target`` is what the user calls it. A file that exists is replaced with ``overwrite`` only. Methods may be called from several
    threads. Raises :class:`InvalidArgumentError`, and :class:`DirtyLogError` when the file cannot be written, with a full disk for
    one: what was written before stays valid.
    """

    def __init__(
        self, path: str | Path, memory: Memory, *, target: str = "", image: Path | None = None, overwrite: bool = False
    ) -> None:
        self.path = Path(path)
        self._memory = memory
        self._lock = threading.Lock()
        self._slots: dict[MemorySlot, int] = {}
        self._marks = 0
        self._pending: list[tuple[str, tuple[Any, ...]]] = [(statement, ()) for statement in CREATE]
        self._told: dict[str, Any] = {}
        self._file: int | None = _create(self.path, overwrite=overwrite)
        self._faults = memory.faults
        self._began = time.perf_counter()
        self._database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=_BUSY_SECONDS)
        try:
            self._database.execute("PRAGMA journal_mode=DELETE")
            self._database.execute("PRAGMA synchronous=OFF")
            self._tell(
                target=target,
                port=memory.port.name,
                exactness=memory.exactness.value,
                page_size=min((slot.page_size for slot in memory.slots), default=0),
                blind_spots=list(memory.blind_spots),
                image=None if image is None else str(image.absolute()),
                started=time.time(),
                clock="seconds since started, by a clock that never goes back",
                dirtylog=version("dirtylog"),
                machine=platform.machine(),
                kernel=f"{platform.system()} {platform.release()}",
                status=None,
            )
            self._tell_gaps()
            self._tell_counts()
            self._commit()
        except BaseException as error:
            self._leave()
            self.path.unlink(missing_ok=True)
            if isinstance(error, sqlite3.Error):
                raise self._failure(error) from error
            raise

    def add(self, found: Round) -> None:
        """Write a round."""
        with self._lock:
            runs = {self._number(slot): dirty.runs() for slot, dirty in found.dirty.items() if dirty}
            packed = pack(runs)
            row = RoundRow(
                found.number,
                found.began - self._began,
                found.seconds,
                found.get_seconds,
                packed.slots,
                packed.runs,
                found.dirty_pages,
                found.dirty_bytes,
                0,
                packed.data,
            ).summed()
            self._pending.append((INSERT_ROUND, row))
            self._tell_gaps()
            if found.number % _ROUNDS_BETWEEN_COUNTS == 0:
                self._tell_counts()
            self._commit()

    def mark(self, text: str) -> None:
        """Set a mark at this instant."""
        with self._lock:
            self._marks += 1
            self._pending.append((INSERT_MARK, (self._marks, time.perf_counter() - self._began, text)))
            self._commit()

    def close(self, status: int = 0) -> None:
        """End the recording with an exit status as the command line has them. A second call does nothing."""
        with self._lock:
            if self._file is None:
                return
            try:
                self._tell(status=status)
                self._tell_gaps()
                self._tell_counts()
                self._database.execute(f"PRAGMA busy_timeout={int(_BUSY_SECONDS_AT_END * 1e3)}")
                self._commit(last=True)
            finally:
                self._leave()

    def _leave(self) -> None:
        self._database.close()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _number(self, slot: MemorySlot) -> int:
        number = self._slots.get(slot)
        if number is None:
            number = len(self._slots)
            place = (
                number,
                slot.id,
                slot.base_gfn,
                slot.npages,
                slot.page_size,
                int(slot.flags & SlotFlags.READONLY),
                slot.host_address,
            )
            mapping = (_storable(slot.name), slot.permissions, slot.file_offset, int(slot.anonymous))
            # In this order: an interrupt between the two leaves a row that is written again.
            self._pending.append((INSERT_SLOT, place + mapping))
            self._slots[slot] = number
        return number

    def _tell_gaps(self) -> None:
        """Write down why writes may have been missed: a gap that is over was there all the same."""
        known = self._told.get("incomplete", [])
        self._tell(incomplete=[*known, *(gap for gap in self._memory.incomplete if gap not in known)][:_MOST_GAPS])

    def _tell_counts(self) -> None:
        """Write down what is counted all the time: not at each round, for to ask costs as much as to pack one."""
        faults = self._memory.faults
        # Nobody counts those of a process that has ended: then the count before stands.
        taken = self._told.get("faults") if faults is None or self._faults is None else faults - self._faults
        held = max(self._memory.held, self._told.get("held", 0))
        self._tell(faults=taken, held=held)

    def _tell(self, **facts: Any) -> None:  # noqa: ANN401 - whatever JSON has
        for name, value in facts.items():
            if name not in self._told or self._told[name] != value:
                self._pending.append((INSERT_FACT, (name, json.dumps(value))))
                self._told[name] = value

    def _commit(self, *, last: bool = False) -> None:
        """Write what is pending, or keep it if somebody reads just now."""
        if self._file is None:
            raise DirtyLogError(f"{str(self.path)!r} is closed: nothing more can be recorded")
        try:
            self._database.execute("BEGIN IMMEDIATE")
            for statement, values in self._pending:
                self._database.execute(statement, values)
            self._database.execute("COMMIT")
            self._pending.clear()
        except BaseException as error:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            if not isinstance(error, sqlite3.Error):
                raise
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or last:
                raise self._failure(error) from error

    def _failure(self, error: sqlite3.Error) -> DirtyLogError:
        full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        return DirtyLogError(
            f"the recording {str(self.path)!r} cannot be written",
            errno=errno.ENOSPC if full else errno.EIO,
            reason=str(error),
            remedy="the rounds before are in it" if self._slots else None,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            # The first error is the one to tell.
            with contextlib.suppress(DirtyLogError):
                self.close(1)


def _storable(name: str) -> str | bytes:
    """Return a name of any octets as text if it is that."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogateescape")
    return name


def _create(path: Path, *, overwrite: bool) -> int:
    """Create the file, and return a descriptor that says that it is being recorded."""
    try:
        if overwrite:
            _refuse_if_recorded(path)
            path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_CLOEXEC", 0), 0o666)
    except FileExistsError as error:
        raise InvalidArgumentError(f"{error.filename!r} exists", remedy="choose another name, or replace it with -f") from error
    except OSError as error:
        raise InvalidArgumentError(f"{str(path)!r} cannot be written", errno=error.errno, reason=error.strerror) from error
    _lock(descriptor)
    return descriptor


def _refuse_if_recorded(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        if not _lock(descriptor):
            raise InvalidArgumentError(f"{str(path)!r} is being recorded", remedy="choose another name, or end that recording")
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Hold the file until the descriptor is closed; return False if somebody else does. Where there is no flock, nobody does."""
    try:
        import fcntl  # noqa: PLC0415 - Windows has none
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True

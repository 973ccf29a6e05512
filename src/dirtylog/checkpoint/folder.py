"""The folder of a store: what lies in it, how it is made, and the lock by which one writes at a time."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from dirtylog.checkpoint import segments
from dirtylog.errors import AccessDeniedError, CorruptDataError, DirtyLogError, InvalidArgumentError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

INDEX = "index.sqlite"
SEGMENTS = "segments"
LOCK = "lock"
_OURS = {INDEX, f"{INDEX}-wal", f"{INDEX}-shm", f"{INDEX}-journal", SEGMENTS, LOCK}
_PID_WIDTH = 20


def make(path: Path) -> None:
    """Make the folders of a store where they are not; :class:`InvalidArgumentError` if something else lies there.

    The making may have been cut off before, at any point, and then goes on. The index is there, for good, before the first segment.
    """
    folder = path / SEGMENTS
    try:
        if (path / INDEX).exists() and (path / INDEX).stat().st_size:
            return
        if path.is_dir() and {one.name for one in path.iterdir()} - _OURS:
            raise InvalidArgumentError(
                f"{str(path)!r} is no checkpoint store, and it is not empty", remedy="name an empty or a new folder"
            )
        if segments.numbers_in(folder):
            raise CorruptDataError(f"{str(path)!r} has pages, and no index", remedy="bring the index back, or remove the folder")
        folder.mkdir(parents=True, exist_ok=True)
        segments.sync_folder(path)
        for parent in path.absolute().parents:
            # Whichever of them are new. What cannot be opened is not.
            with suppress(OSError):
                segments.sync_folder(parent)
    except OSError as error:
        raise DirtyLogError(f"{str(path)!r} cannot be made", errno=error.errno, reason=error.strerror) from error


def write_synced(path: Path, data: bytes, temporary: Path) -> None:
    """Replace a file at once, for good; ``temporary`` is a name beside it."""
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    segments.sync_folder(path.parent)


class Lock:
    """Holds a store against other writers until it is closed. The kernel lets go of a dead process's lock (flock).

    A lock of this kind belongs to all descriptors that a fork has made of one: so children close theirs at once.
    """

    def __init__(self, path: Path) -> None:
        import fcntl  # noqa: PLC0415 - Windows has none, and this module is imported there

        self._descriptor = -1
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise DirtyLogError(f"{str(path)!r} cannot be opened", errno=error.errno, reason=error.strerror) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # As long as what is there: that takes no more room on a disk that is full.
            os.pwrite(descriptor, f"{os.getpid():<{_PID_WIDTH}}".encode(), 0)
        except BlockingIOError as error:
            who = os.pread(descriptor, _PID_WIDTH, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise AccessDeniedError(
                f"{str(path.parent)!r} is being written by process {who}",
                errno=error.errno,
                pid=int(who) if who.isdecimal() else None,
                remedy="wait for it, or use another store",
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise DirtyLogError(f"{str(path)!r} cannot be written", errno=error.errno, reason=error.strerror) from error
        self._descriptor = descriptor
        _held.add(self)

    @property
    def held(self) -> bool:
        """Whether it is held, by this process."""
        return self._descriptor >= 0

    def close(self) -> None:
        """Let others write. A second call does nothing."""
        _held.discard(self)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


_held: set[Lock] = set()


def _leave_to_parent() -> None:
    for lock in list(_held):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)

"""Segment files: contents of pages, one batch after the other, written once and never changed.

Facts about files that this relies on:

* What write(2) has taken is in the kernel; after a sync it is on the disk. A new file's name is there after its directory's sync.
* A sync that failed may have dropped what it was to write, and the next one says all is well (the page is marked clean): so nothing
  is ever appended to a segment whose sync failed.
* Bytes behind the length that the index has are of a commit that did not come to be: they are written over.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from dirtylog.errors import CorruptDataError, DirtyLogError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

FULL_BYTES = 256 << 20
"""A segment as long as that gets no more batches."""
MOST_OPEN = 256
"""So many segments are kept open to be read: a process may have 1024 files by default."""
_START_BYTES = 4 << 20
"""After so many bytes the disk is set to work, and does not wait for the sync."""


def path_of(folder: Path, number: int) -> Path:
    """Return the path of a segment."""
    return folder / f"{number:08}.seg"


def numbers_in(folder: Path) -> list[int]:
    """Return the numbers of the segments that lie there."""
    return sorted(int(path.stem) for path in folder.glob("*.seg") if path.stem.isdigit())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class SegmentWriter:
    """Appends to one segment from ``nbytes`` on."""

    def __init__(self, folder: Path, number: int, nbytes: int) -> None:
        self.number = number
        self.nbytes = nbytes
        self._folder = folder
        self.path = path_of(folder, number)
        with _writing(self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._new = nbytes == 0
        self._started = nbytes

    def append(self, data: bytes | memoryview) -> int:
        """Write some octets, and return where."""
        at = self.nbytes
        octets = memoryview(data).cast("B")
        with _writing(self.path):
            while octets:
                written = os.pwrite(self._descriptor, octets, self.nbytes)
                if not written:
                    raise OSError(errno.EIO, "nothing was written")
                self.nbytes += written
                octets = octets[written:]
            if self.nbytes - self._started >= _START_BYTES and hasattr(os, "posix_fadvise"):
                # Of what is not on the disk yet, Linux only begins to write it. An error is the sync's to tell.
                os.posix_fadvise(self._descriptor, self._started, self.nbytes - self._started, os.POSIX_FADV_DONTNEED)
                self._started = self.nbytes
        return at

    def sync(self) -> None:
        """Return when all is on the disk."""
        with _writing(self.path):
            os.fdatasync(self._descriptor)
            if self._new:
                sync_folder(self._folder)
                self._new = False

    def close(self) -> None:
        """Close the file. A second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class _Open:
    """An open segment. It is closed when nobody reads it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CorruptDataError(f"{str(path)!r} cannot be opened", errno=error.errno, reason=error.strerror) from error

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class SegmentReader:
    """Reads segments, each of which is opened when it is first wanted. Threads may share it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._open: dict[int, _Open] = {}

    def read_into(self, number: int, offset: int, out: memoryview) -> None:
        """Fill ``out``; :class:`CorruptDataError` where the segment ends before that, or is not there."""
        segment = self._opened(number)
        while out:
            try:
                count = os.preadv(segment.descriptor, [out], offset)
            except OSError as error:
                raise CorruptDataError(
                    f"segment {number} cannot be read at {offset}", errno=error.errno, reason=error.strerror
                ) from error
            if not count:
                raise CorruptDataError(f"segment {number} ends at {offset}, before all of its pages")
            offset += count
            out = out[count:]

    def hold(self, numbers: Iterable[int]) -> None:
        """Open segments that will be read, as many as can be: what the store's writer removes then can be read all the same."""
        for number in itertools.islice(numbers, MOST_OPEN):
            # One that is not there is told of when it is read.
            with suppress(CorruptDataError):
                self._opened(number)

    def expect(self, number: int, offset: int, nbytes: int) -> None:
        """Say that this will be read soon."""
        segment = self._opened(number)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(segment.descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)

    def _opened(self, number: int) -> _Open:
        with self._lock:
            segment = self._open.get(number)
            if segment is None:
                segment = self._open[number] = _Open(path_of(self._folder, number))
                if len(self._open) > MOST_OPEN:
                    self._open.pop(next(iter(self._open)))
            return segment

    def close(self) -> None:
        """Close all. What is wanted later is opened again."""
        with self._lock:
            self._open.clear()


class _writing:  # noqa: N801 - reads as a word at its use
    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise DirtyLogError(f"{str(self._path)!r} cannot be written", errno=error.errno, reason=error.strerror) from error


def drop(folder: Path, number: int) -> None:
    """Remove a segment that no index has."""
    with _writing(path_of(folder, number)):
        path_of(folder, number).unlink(missing_ok=True)


def length(folder: Path, number: int) -> int:
    """Return how long a segment's file is, -1 if there is none."""
    try:
        return path_of(folder, number).stat().st_size
    except OSError:
        return -1


def cut(folder: Path, number: int, nbytes: int) -> None:
    """Cut off what lies behind the end of a segment."""
    if length(folder, number) > nbytes:
        with _writing(path_of(folder, number)):
            os.truncate(path_of(folder, number), nbytes)

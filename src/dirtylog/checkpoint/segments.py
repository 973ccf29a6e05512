"""Segment files: contents of pages, one batch after the other, written once and never changed.

Facts about files that this relies on:

* What write(2) has taken is in the kernel; after a sync it is on the disk. A new file's name is there after its directory's sync.
* A sync that failed may have dropped what it was to write, and the next one says all is well (the page is marked clean): so nothing
  is ever appended to a segment whose sync failed.
* Bytes behind the length that the index has are of a commit that did not come to be: they are written over.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from dirtylog.errors import CorruptDataError, DirtyLogError

if TYPE_CHECKING:
    from pathlib import Path

FULL_BYTES = 256 << 20
"""A segment as long as that gets no more batches."""


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


class SegmentReader:
    """Reads segments, each of which is opened when it is first wanted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[int, int] = {}

    def read_into(self, number: int, offset: int, out: memoryview) -> None:
        """Fill ``out``; :class:`CorruptDataError` where the segment ends before that, or is not there."""
        descriptor = self._descriptor(number)
        while out:
            try:
                count = os.preadv(descriptor, [out], offset)
            except OSError as error:
                raise CorruptDataError(
                    f"segment {number} cannot be read at {offset}", errno=error.errno, reason=error.strerror
                ) from error
            if not count:
                raise CorruptDataError(f"segment {number} ends at {offset}, before all of its pages")
            offset += count
            out = out[count:]

    def expect(self, number: int, offset: int, nbytes: int) -> None:
        """Say that this will be read soon."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor(number), offset, nbytes, os.POSIX_FADV_WILLNEED)

    def _descriptor(self, number: int) -> int:
        descriptor = self._open.get(number)
        if descriptor is None:
            path = path_of(self._folder, number)
            try:
                descriptor = self._open[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CorruptDataError(f"{str(path)!r} cannot be opened", errno=error.errno, reason=error.strerror) from error
        return descriptor

    def close(self) -> None:
        """Close all. What is wanted later is opened again."""
        while self._open:
            os.close(self._open.popitem()[1])


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
    with suppress(FileNotFoundError), _writing(path_of(folder, number)):
        path_of(folder, number).unlink()

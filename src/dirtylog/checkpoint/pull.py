"""Brings a copy from elsewhere to a folder, or one there up to date: docs/remote.md."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dirtylog.checkpoint import manifest, segments
from dirtylog.checkpoint.folder import INDEX, LOCK, SEGMENTS, Lock, make, write_synced
from dirtylog.checkpoint.index import Index
from dirtylog.checkpoint.location import Location
from dirtylog.checkpoint.manifest import Stamp, Transferred, rows_by_segment, stamps
from dirtylog.errors import CorruptDataError, DirtyLogError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dirtylog.checkpoint.manifest import Manifest, Part
    from dirtylog.checkpoint.rows import BatchRow

_CHUNK_BYTES = 8 << 20
_TRIES = 3
_PULLED_INDEX = "pulled.sqlite"
_PULLED = "pulled.json"
"""Which checkpoints a copy has had from elsewhere: others are its own."""


def pull(
    url: str,
    path: str | Path,
    *,
    storage_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    check: bool = False,
) -> Transferred:
    """Make a folder a store like the copy at a URL of fsspec, each object verified; only what is missing here is fetched.

    ``storage_options`` are fsspec's. ``progress`` is told how many bytes of how many are here. With ``check`` what is here already
    is read and compared, too, and what is damaged is fetched again.

    Raises :class:`InvalidArgumentError` where there is no copy, or a store here has checkpoints that it lacks;
    :class:`AccessDeniedError`, for one while the store is being written; :class:`UnsupportedError`, :class:`CorruptDataError`.
    """
    location, path = Location(url, storage_options), Path(path)
    wanted = _manifest_at(location)
    try:
        make(path)
        # The index of an empty store is there before the first segment: what is cut off is an empty store, or the one that it was.
        with closing(Lock(path / LOCK)), Index(path / INDEX, create="crc32", write=True) as index:
            for attempt in range(_TRIES):
                try:
                    return _Pull(location, path, index, progress, check=check).run(wanted)
                except _Gone as error:
                    before, wanted = wanted, _manifest_at(location)
                    if wanted == before or attempt == _TRIES - 1:
                        raise CorruptDataError(
                            f"the copy at {url!r} lacks {error}", remedy="push to it again: what is missing is sent"
                        ) from error
    except OSError as error:
        raise DirtyLogError(f"{str(path)!r} cannot be written", errno=error.errno, reason=error.strerror) from error
    raise AssertionError


def _manifest_at(location: Location) -> Manifest:
    found = manifest.read(location)
    if found is None:
        raise InvalidArgumentError(f"there is no copy of a store at {location.url!r}: it has no {manifest.NAME}")
    return found


class _Gone(Exception):  # noqa: N818 - no error, but a reason to look at the manifest again
    """An object is no more there."""


class _Pull:
    def __init__(self, location: Location, path: Path, index: Index, progress: Callable[[int, int], None], *, check: bool) -> None:
        self._location = location
        self._path = path
        self._index = index
        self._progress = progress
        self._check = check
        self._done = self._total = self._objects = self._nbytes = 0

    def run(self, wanted: Manifest) -> Transferred:
        here = stamps(self._index)
        self._refuse_own(here, wanted)
        self._total = wanted.nbytes
        if here == wanted.checkpoints and not self._check:
            self._progress(self._total, self._total)
            return self._transferred(wanted, 0)
        pulled = self._pulled_index(wanted)
        with Index(pulled, write=True) as index:
            lengths = index.segments()
            _check_covered(wanted, lengths, self._location.url)
            numbers, trusted = _chosen(rows_by_segment(index), rows_by_segment(self._index), lengths, self._index.segments())
            for part in wanted.parts:
                segment = part.segment or 0
                self._bring(part, segments.path_of(self._path / SEGMENTS, numbers[segment]), trusted.get(segment, 0))
            segments.sync_folder(self._path / SEGMENTS)
            _renumber(index, {old: new for old, new in numbers.items() if old != new}, lengths)
            names = json.dumps(sorted({*here, *wanted.checkpoints})).encode()
            write_synced(self._path / _PULLED, names, self._path / f"{_PULLED}.new")
            # One transaction: whoever reads has the old index or this one.
            index.backup(self._path / INDEX)
        _remove(pulled)
        needed = set(numbers.values())
        unneeded = [number for number in segments.numbers_in(self._path / SEGMENTS) if number not in needed]
        if unneeded and self._index.settle():
            for number in unneeded:
                segments.drop(self._path / SEGMENTS, number)
        return self._transferred(wanted, len(unneeded))

    def _transferred(self, wanted: Manifest, removed: int) -> Transferred:
        return Transferred(self._objects, self._nbytes, wanted.nbytes, len(wanted.checkpoints), removed)

    def _refuse_own(self, here: tuple[Stamp, ...], wanted: Manifest) -> None:
        known = set(wanted.checkpoints)
        with suppress(FileNotFoundError, ValueError, TypeError):
            known |= {Stamp(*one) for one in json.loads((self._path / _PULLED).read_bytes())}
        # The newest one always stays: a copy that has lost it has gone back.
        newest = max((one.id for one in wanted.checkpoints), default=0)
        own = [str(one.id) for one in here if one not in known or one.id > newest]
        if own:
            raise InvalidArgumentError(
                f"{str(self._path)!r} has checkpoints that the copy at {self._location.url!r} lacks: {', '.join(own)}",
                remedy="pull into another folder",
            )

    def _pulled_index(self, wanted: Manifest) -> Path:
        """Fetch the index into a file beside the one that is in use. What both have in common is not fetched."""
        pulled = self._path / _PULLED_INDEX
        for suffix in ("-wal", "-shm", "-journal"):
            # Of a pull that was cut off: they would be taken for this one's.
            _remove(pulled.with_name(pulled.name + suffix))
        if not pulled.exists():
            self._index.backup(pulled)
        for part in wanted.index:
            self._bring(part, pulled, 0)
        os.truncate(pulled, max((part.end for part in wanted.index), default=0))
        return pulled

    def _bring(self, part: Part, path: Path, trusted: int) -> None:
        """Have a part in a file, verified. ``trusted`` bytes of the file need no look."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            if part.end > min(trusted, size) or self._check:
                self._fetch(part, descriptor, max(part.begin, min(part.end, size)))
                # Also what a pull that was cut off had written, and nobody has synced.
                os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
        self._done += part.nbytes
        self._progress(self._done, self._total)

    def _fetch(self, part: Part, descriptor: int, there: int) -> None:
        """Fetch a part of which a file has what is before ``there``, perhaps, and all of it again if that was not so."""
        found = hashlib.blake2b(digest_size=32)
        for at in range(part.begin, there, _CHUNK_BYTES):
            found.update(os.pread(descriptor, min(_CHUNK_BYTES, there - at), at))
        if there == part.end and found.hexdigest() == part.digest:
            return
        if there == part.end:
            there = part.begin
            found = hashlib.blake2b(digest_size=32)
        self._objects += 1
        for at in range(there, part.end, _CHUNK_BYTES):
            self._progress(self._done + at - part.begin, self._total)
            end = min(at + _CHUNK_BYTES, part.end)
            data = self._read(part, at - part.begin, end - part.begin)
            found.update(data)
            _write(descriptor, data, at)
        if found.hexdigest() == part.digest:
            return
        if there > part.begin:
            self._objects -= 1
            self._fetch(part, descriptor, part.begin)
        else:
            raise CorruptDataError(
                f"{part.name} at {self._location.url!r} does not have its digest",
                remedy="remove it, and push again: it is sent anew",
            )

    def _read(self, part: Part, begin: int, end: int) -> bytes:
        try:
            data = self._location.get(part.name, begin, end)
        except FileNotFoundError as error:
            raise _Gone(part.name) from error
        self._nbytes += len(data)
        if len(data) != end - begin:
            raise CorruptDataError(
                f"{part.name} at {self._location.url!r} ends at {begin + len(data)}, and has to have {part.nbytes} bytes",
                remedy="push again: what is cut short is sent anew",
            )
        return data


def _check_covered(wanted: Manifest, lengths: dict[int, int], url: str) -> None:
    """Raise :class:`CorruptDataError` unless the parts are the segments of the index."""
    ends: dict[int, int] = {}
    for part in wanted.parts:
        segment = part.segment or 0
        if part.begin != ends.get(segment, 0):
            raise CorruptDataError(f"{manifest.NAME} at {url!r} is damaged", reason=f"segment {segment} has a hole")
        ends[segment] = part.end
    if ends != lengths:
        raise CorruptDataError(f"{manifest.NAME} at {url!r} is damaged", reason="it does not have the segments of its index")


def _chosen(
    theirs: dict[int, list[BatchRow]], ours: dict[int, list[BatchRow]], lengths: dict[int, int], our_lengths: dict[int, int]
) -> tuple[dict[int, int], dict[int, int]]:
    """Return which number each segment of the copy has here, and how much of it is here already.

    A number may be another segment's here: one that went, there, and whose number was given again. What we have stays as it is
    until the index says otherwise.
    """
    by_contents = {_facts(rows[0]): number for number, rows in ours.items()}
    free = max([0, *lengths, *our_lengths]) + 1
    numbers: dict[int, int] = {}
    trusted: dict[int, int] = {}
    for segment in lengths:
        rows = theirs.get(segment, [])
        same = by_contents.get(_facts(rows[0])) if rows else None
        if same is not None and list(map(_facts, ours[same])) == list(map(_facts, rows[: len(ours[same])])):
            numbers[segment], trusted[segment] = same, our_lengths.get(same, 0)
        elif segment in our_lengths:
            numbers[segment], free = free, free + 1
        else:
            numbers[segment] = segment
    return numbers, trusted


def _facts(row: BatchRow) -> tuple[object, ...]:
    """Return what says which bytes lie where in a segment."""
    return row.offset, row.nbytes, row.codec, row.page_size, row.first, row.npages, row.places, row.sums


def _renumber(index: Index, numbers: dict[int, int], lengths: dict[int, int]) -> None:
    if not numbers:
        return
    rows = rows_by_segment(index)
    with index.transaction():
        for old in numbers:
            index.drop_segment(old)
        for old, new in numbers.items():
            index.put_segment(new, lengths[old])
            index.put_batches([row._replace(segment=new) for row in rows.get(old, [])])


def _write(descriptor: int, data: bytes, at: int) -> None:
    octets = memoryview(data)
    while octets:
        written = os.pwrite(descriptor, octets, at)
        at += written
        octets = octets[written:]


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.unlink()

"""Copies of a store elsewhere, brought up to date by what is missing: docs/remote.md.

A push writes objects, then a manifest that names them, then removes what it names no more: whoever pulls finds a whole copy at any
instant. A pull writes behind the ends of segments, where nobody looks, and then the index in one transaction. Either may be cut off
at any point, and goes on when it is done again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dirtylog.checkpoint import manifest, segments
from dirtylog.checkpoint.folder import INDEX
from dirtylog.checkpoint.index import Index
from dirtylog.checkpoint.location import Location
from dirtylog.checkpoint.manifest import Manifest, Part, Stamp, Transferred, digest, digest_of_rows, rows_by_segment, stamps
from dirtylog.checkpoint.pull import pull
from dirtylog.errors import CorruptDataError, DirtyLogError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from dirtylog.checkpoint.rows import BatchRow
    from dirtylog.checkpoint.store import Store

PART_BYTES = 32 << 20
"""The length of an object: what is held in memory, and what an upload that was cut off does again."""
INDEX_PART_BYTES = 1 << 20
"""The same of the index, which changes here and there."""
_TRIES = 3

__all__ = ["Transferred", "pull", "push"]


class _Moved(Exception):  # noqa: N818 - no error, but a reason to look again
    """What was to be copied was moved meanwhile, by the one who writes it."""


def push(
    store: Store,
    url: str,
    *,
    storage_options: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    read_back: bool = False,
) -> Transferred:
    """Make the copy at a URL of fsspec one of this store as it is now; only what is missing there is sent.

    The store may be written meanwhile. ``storage_options`` are fsspec's. ``progress`` is told how many bytes of how many are sent.
    The lengths of all objects there are compared with what they should be; with ``read_back`` what was sent is read again, too.

    Raises :class:`InvalidArgumentError` for a copy of something else, or one that is ahead; :class:`UnsupportedError`,
    :class:`AccessDeniedError`, :class:`CorruptDataError`.
    """
    location = Location(url, storage_options)
    for attempt in range(_TRIES):
        with tempfile.TemporaryDirectory(prefix="dirtylog-push-") as folder:
            copied = Path(folder) / INDEX
            # Another connection than the store's, on which something may be under way that is not committed.
            with Index(store.path / INDEX) as index:
                index.backup(copied)
            try:
                return _Push(store, location, copied, progress, read_back=read_back).run()
            except _Moved as error:
                if attempt == _TRIES - 1:
                    raise CorruptDataError(
                        str(error),
                        reason="it is damaged, or pages are moved all the time",
                        remedy="verify the store, and push again",
                    ) from error
    raise AssertionError


class _Push:
    def __init__(
        self, store: Store, location: Location, index: Path, progress: Callable[[int, int], None], *, read_back: bool
    ) -> None:
        self._store = store
        self._location = location
        self._index = index
        self._progress = progress
        self._read_back = read_back
        self._present: dict[str, int] = {}
        self._done = self._total = self._objects = self._nbytes = 0

    def run(self) -> Transferred:
        before = manifest.read(self._location)
        with Index(self._index) as index:
            checkpoints = stamps(index)
            lengths, rows = index.segments(), rows_by_segment(index)
        if before is not None:
            _refuse_other(before, checkpoints, self._location.url)
        self._present = self._listed()
        at_first = self._present
        known, missing = _planned(() if before is None else before.parts, lengths, rows, at_first)
        index_bytes = self._index.stat().st_size
        self._total = sum(part.nbytes for part in missing) + index_bytes
        self._progress(0, self._total)
        parts = [self._sent(segments.path_of(self._store.folder, part.segment or 0), part) for part in missing]
        self._check_unmoved(parts)
        pieces = [
            self._sent(self._index, Part(None, at, min(at + INDEX_PART_BYTES, index_bytes), ""))
            for at in range(0, index_bytes, INDEX_PART_BYTES)
        ]
        after = Manifest(checkpoints, tuple(sorted([*known, *parts], key=_place)), tuple(pieces))
        self._present = self._listed()
        for part in after.objects:
            if self._present.get(part.name) != part.nbytes:
                raise CorruptDataError(
                    f"{part.name} at {self._location.url!r} has {self._present.get(part.name, 0)} bytes, not {part.nbytes}",
                    remedy="push again, and let no other push there meanwhile",
                )
        if manifest.read(self._location) != before:
            raise DirtyLogError(f"somebody else pushed to {self._location.url!r} meanwhile", remedy="push again")
        if after != before:
            self._location.put(manifest.NAME, after.packed())
        needed = {part.name for part in after.objects}
        # Only what was there at first: what came since may be another push's.
        unneeded = [name for name in at_first if name not in needed and manifest.is_ours(name)]
        left = 0
        try:
            self._location.remove(unneeded)
        except DirtyLogError:
            # The copy is whole. Who may add but not remove has chosen that.
            left = len(unneeded)
        return Transferred(self._objects, self._nbytes, after.nbytes, len(checkpoints), len(unneeded) - left, left)

    def _listed(self) -> dict[str, int]:
        return self._location.sizes(manifest.SEGMENTS) | self._location.sizes(manifest.INDEX)

    def _sent(self, path: Path, part: Part) -> Part:
        """Send a part unless it is there, and return it with its digest."""
        data = _bytes_of(path, part)
        part = Part(part.segment, part.begin, part.end, digest(data), part.rows)
        if self._present.get(part.name) != part.nbytes:
            self._location.put(part.name, data)
            self._objects += 1
            self._nbytes += part.nbytes
            if self._read_back and digest(self._location.get(part.name)) != part.digest:
                raise CorruptDataError(f"{part.name} at {self._location.url!r} is not what was sent", remedy="push again")
        self._done += part.nbytes
        self._progress(self._done, self._total)
        return part

    def _check_unmoved(self, parts: list[Part]) -> None:
        """Raise :class:`_Moved` if a segment is no more what it was: its number may be another's by now."""
        with Index(self._store.path / INDEX) as index:
            rows = rows_by_segment(index)
        for part in parts:
            if digest_of_rows(_within(rows.get(part.segment or 0, []), part.begin, part.end)) != part.rows:
                raise _Moved(f"segment {part.segment} was moved while it was read")


def _bytes_of(path: Path, part: Part) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(part.begin)
            data = file.read(part.nbytes)
    except FileNotFoundError as error:
        raise _Moved(f"{str(path)!r} has gone") from error
    except OSError as error:
        raise DirtyLogError(f"{str(path)!r} cannot be read", errno=error.errno, reason=error.strerror) from error
    if len(data) != part.nbytes:
        raise _Moved(f"{str(path)!r} ends at {part.begin + len(data)}, before all of its pages")
    return data


def _within(rows: list[BatchRow], begin: int, end: int) -> list[BatchRow]:
    return [row for row in rows if begin <= row.offset < end]


def _place(part: Part) -> tuple[int, int]:
    return part.segment or 0, part.begin


def _planned(
    before: tuple[Part, ...], lengths: dict[int, int], rows: dict[int, list[BatchRow]], present: dict[str, int]
) -> tuple[list[Part], list[Part]]:
    """Return which parts are there already, and which are to be sent."""
    known: list[Part] = []
    missing: list[Part] = []
    ends: dict[int, int] = {}
    for part in sorted(before, key=_place):
        segment = part.segment or 0
        same = (
            part.begin == ends.get(segment, 0)
            and part.end <= lengths.get(segment, 0)
            and digest_of_rows(_within(rows.get(segment, []), part.begin, part.end)) == part.rows
        )
        # What has vanished or is cut short is sent again, and nothing after it is looked at.
        if same and present.get(part.name) == part.nbytes:
            known.append(part)
            ends[segment] = part.end
    for segment, nbytes in lengths.items():
        begin = ends.get(segment, 0)
        for end in _ends(rows.get(segment, []), begin, nbytes):
            missing.append(Part(segment, begin, end, "", digest_of_rows(_within(rows.get(segment, []), begin, end))))
            begin = end
    return known, missing


def _ends(rows: list[BatchRow], begin: int, nbytes: int) -> Iterator[int]:
    """Yield where parts end, between batches: each is as long as it may be."""
    if begin == nbytes:
        return
    last = begin
    for row in rows:
        end = row.offset + row.nbytes
        if end - begin > PART_BYTES and last > begin:
            yield last
            begin = last
        last = max(last, end)
    yield nbytes


def _refuse_other(before: Manifest, checkpoints: tuple[Stamp, ...], url: str) -> None:
    """Raise :class:`InvalidArgumentError` if a copy has what this store never had."""
    mine = dict(checkpoints)
    newest = max(mine, default=0)
    for one in before.checkpoints:
        if one.id > newest:
            raise InvalidArgumentError(
                f"the copy at {url!r} has checkpoint {one.id}, and the newest here is {newest}", remedy="push to another place"
            )
        if mine.get(one.id, one.created) != one.created:
            raise InvalidArgumentError(
                f"the copy at {url!r} is another store's: its checkpoint {one.id} was made at another time",
                remedy="push to another place",
            )

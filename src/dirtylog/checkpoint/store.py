"""A store: a folder with an index and segments. One writes at a time, any number read.

The order of a commit: the contents go into a segment, the segment is synced, and then the index commits. A crash at any instant
leaves every checkpoint that was committed whole, and at most some bytes behind the end of a segment that nobody looks at.
"""

from __future__ import annotations

import errno
import json
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dirtylog.checkpoint import segments
from dirtylog.checkpoint.codecs import Checksum, checksum
from dirtylog.checkpoint.draft import Draft
from dirtylog.checkpoint.folder import INDEX, LOCK, SEGMENTS, Lock, make
from dirtylog.checkpoint.index import Index, chain
from dirtylog.checkpoint.pages import PageMap, unpack
from dirtylog.errors import CorruptDataError, DirtyLogError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from dirtylog.checkpoint.rows import CheckpointRow


@dataclass(frozen=True, slots=True)
class SlotLayout:
    """A slot as a checkpoint has it. ``key`` is its number in the store: a slot of the same key is the same one.

    ``array`` has a NumPy array's facts where the slot is one: dtype, shape, and where it begins in the first page.
    """

    key: int
    id: int
    base_gfn: int
    npages: int
    page_size: int
    name: str = ""
    permissions: str = ""
    array: dict[str, Any] | None = None

    @property
    def nbytes(self) -> int:
        """The length in bytes."""
        return self.npages * self.page_size

    @property
    def label(self) -> str:
        """What to call it: its name, or its place."""
        return self.name or f"slot {self.id}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint of a store.

    ``whole`` says that it stands alone; otherwise it has what was written since ``parent``. ``npages`` are the pages that it
    brought, ``zeros`` those of them that are zero; ``stored`` the bytes that they took. ``created`` is a Unix time. ``extra`` is
    what the saver keeps beside the pages.
    """

    id: int
    parent: int | None
    created: float
    note: str
    whole: bool
    npages: int
    zeros: int
    stored: int
    slots: tuple[SlotLayout, ...]
    extra: bytes

    @property
    def nbytes(self) -> int:
        """The size of the memory that it restores."""
        return sum(slot.nbytes for slot in self.slots)


class Store:
    """An open store; a context manager.

    ``write`` holds it against other writers until it is closed, and makes it if need be, unless ``create`` is false.

    ``checksum`` is that of a new store: "xxh3" (the default where xxhash is installed), "crc32", "blake2b" or "sha256".

    Raises :class:`InvalidArgumentError` for what is no store, :class:`UnsupportedError` for a newer one, :class:`AccessDeniedError`
    when somebody else writes to it, :class:`CorruptDataError`.
    """

    def __init__(self, path: str | Path, *, write: bool = False, create: bool = True, checksum_name: str | None = None) -> None:
        self.path = Path(path)
        self.folder = self.path / SEGMENTS
        self._resources = ExitStack()
        self._segment: segments.SegmentWriter | None = None
        self._spoiled: set[int] = set()
        self._in_doubt = False
        self._lock: Lock | None = None
        with ExitStack() as resources:
            if write and create:
                make(self.path)
            elif not (self.path / INDEX).exists():
                raise InvalidArgumentError(f"{str(self.path)!r} is no checkpoint store: it has no {INDEX}")
            if write:
                self._lock = Lock(self.path / LOCK)
                resources.callback(self._lock.close)
            name = checksum(checksum_name).name if write and create else None
            self.index = resources.enter_context(Index(self.path / INDEX, create=name, write=write))
            self.checksum: Checksum = checksum(self.index.facts().checksum)
            if checksum_name is not None and checksum_name != self.checksum.name:
                raise InvalidArgumentError(
                    f"{str(self.path)!r} has the checksum {self.checksum.name}, not {checksum_name}", remedy="leave it out"
                )
            if write:
                self._drop_leftovers()
            self._resources = resources.pop_all()

    # --- what is there

    def checkpoints(self) -> list[Checkpoint]:
        """Return all checkpoints, oldest first."""
        return [checkpoint_of(row) for row in self.index.checkpoints()]

    def checkpoint(self, number: int | None = None) -> Checkpoint:
        """Return one checkpoint, by default the newest. No other needs to be readable."""
        ids = self.index.ids()
        if not ids:
            raise InvalidArgumentError(f"{str(self.path)!r} has no checkpoint yet")
        row = self.index.checkpoint(ids[-1] if number is None else number)
        if row is None:
            raise InvalidArgumentError(
                f"{str(self.path)!r} has no checkpoint {number}", remedy=f"it has {', '.join(map(str, ids))}"
            )
        return checkpoint_of(row)

    def maps(self, number: int) -> dict[int, PageMap]:
        """Return where each page of a checkpoint is, by key of its slot: of every slot a map that has every page."""
        with self.index.reading():
            rows = list(chain(self.index, number))
        slots = checkpoint_of(rows[0]).slots
        brought = [unpack(row.map) for row in reversed(rows)]
        maps = {slot.key: PageMap.layers(slot.npages, (one[slot.key] for one in brought if slot.key in one)) for slot in slots}
        for slot in slots:
            if not maps[slot.key].covers(slot.npages):
                raise CorruptDataError(f"checkpoint {number} lacks pages of {slot.label}")
        return maps

    # --- writing

    def draft(self, *, compression: str = "none") -> Draft:
        """Begin a checkpoint. Nothing is in the store until it is committed."""
        self.check_writable()
        return Draft(self, compression)

    def append(self, data: bytes | memoryview) -> tuple[int, int, int]:
        """Write some octets, and return the segment, the offset in it, and its length now. They count from the next commit on."""
        try:
            if self._segment is not None and self._segment.nbytes >= segments.FULL_BYTES:
                self._segment.sync()
                # The index does not know yet how long it has become.
                self.avoid(self._segment.number)
            if self._segment is None:
                self._segment = self._next_segment()
            offset = self._segment.append(data)
        except DirtyLogError:
            self._spoil()
            raise
        return self._segment.number, offset, self._segment.nbytes

    def sync(self) -> None:
        """Return when all that was appended is on the disk."""
        try:
            if self._segment is not None:
                self._segment.sync()
        except DirtyLogError:
            self._spoil()
            raise

    @contextmanager
    def transaction(self) -> Iterator[Index]:
        """Return a context that commits to the index what is said of pages that were appended and synced.

        A commit that failed may have come to be all the same, when this process dies and the log is read again: until another one
        lies over it, nothing that it tells of is written over.
        """
        try:
            with self.index.transaction():
                yield self.index
        except BaseException as error:
            # A disk that is full says so before the last word is written.
            self._in_doubt |= not (isinstance(error, DirtyLogError) and error.errno == errno.ENOSPC)
            self._spoiled |= {*segments.numbers_in(self.folder)}
            self.leave_segment()
            raise
        self._in_doubt = False

    def give_up(self) -> None:
        """Leave what was appended since the last commit, and give its room back."""
        self.leave_segment()
        # What stays lies behind the end of a segment, or is removed by the next writer.
        with suppress(DirtyLogError):
            if self._in_doubt:
                with self.transaction() as index:
                    index.put_facts(index.facts())
            lengths = self.index.segments()
            for number in segments.numbers_in(self.folder):
                if number not in lengths:
                    segments.drop(self.folder, number)
                elif number == max(lengths):
                    segments.cut(self.folder, number, lengths[number])
            # The index's log begins anew then: a disk that is full has room for what makes some.
            self.index.settle()

    def leave_segment(self) -> None:
        """Append no more to what is written over if nothing commits it."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None

    def avoid(self, segment: int) -> None:
        """Append nothing more to a segment: it is full, or about to go."""
        self._spoiled.add(segment)
        if self._segment is not None and self._segment.number == segment:
            self.leave_segment()

    def _next_segment(self) -> segments.SegmentWriter:
        lengths = self.index.segments()
        last = max(lengths, default=0)
        # One that a disk has cut off is left as it is.
        whole = last and segments.length(self.folder, last) >= lengths[last]
        if whole and lengths[last] < segments.FULL_BYTES and last not in self._spoiled:
            return segments.SegmentWriter(self.folder, last, lengths[last])
        return segments.SegmentWriter(self.folder, max(last, *segments.numbers_in(self.folder), *self._spoiled, 0) + 1, 0)

    def _spoil(self) -> None:
        """Leave a segment in which a write or a sync has failed, for good."""
        if self._segment is not None:
            self._spoiled.add(self._segment.number)
            self.leave_segment()

    def check_writable(self) -> None:
        """Raise :class:`InvalidArgumentError` if it was opened for reading, or by the process that this one was forked from."""
        if self._lock is None:
            raise InvalidArgumentError(f"{str(self.path)!r} was opened for reading", remedy="open it with write=True")
        if not self._lock.held:
            raise InvalidArgumentError(f"{str(self.path)!r} is closed, or held by the process that this one was forked from")

    def _drop_leftovers(self) -> None:
        """Remove segments that no commit knows: of a crash before it, or after one that took the last page out of them.

        In the latter case the commit must be there for good first.
        """
        known = self.index.segments()
        unknown = [number for number in segments.numbers_in(self.folder) if number not in known]
        if unknown and self.index.settle():
            for number in unknown:
                segments.drop(self.folder, number)

    def close(self) -> None:
        """Close it, and let others write. A second call does nothing."""
        self.leave_segment()
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def checkpoint_of(row: CheckpointRow) -> Checkpoint:
    """Return a checkpoint from its row."""
    try:
        slots = tuple(SlotLayout(**slot) for slot in json.loads(row.layout))
    except (ValueError, TypeError) as error:
        raise CorruptDataError(f"checkpoint {row.id} has no readable layout", reason=str(error)) from error
    return Checkpoint(
        row.id, row.parent, row.created, row.note, bool(row.whole), row.npages, row.zeros, row.stored, slots, row.extra
    )

"""A store: a folder with an index and segments. One writes at a time, any number read.

The order of a commit: the contents go into a segment, the segment is synced, and then the index commits. A crash at any instant
leaves every checkpoint that was committed whole, and at most some bytes behind the end of a segment that nobody looks at.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from dirtylog.checkpoint import segments
from dirtylog.checkpoint.codecs import Checksum, checksum
from dirtylog.checkpoint.draft import Draft
from dirtylog.checkpoint.index import Index, rows_of
from dirtylog.checkpoint.pages import PageMap, unpack
from dirtylog.errors import AccessDeniedError, CorruptDataError, DirtyLogError, InvalidArgumentError

if TYPE_CHECKING:
    from types import TracebackType

    from dirtylog.checkpoint.index import CheckpointRow

INDEX = "index.sqlite"
SEGMENTS = "segments"
_LOCK = "lock"


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
        self._can_write = write
        with ExitStack() as resources:
            if write and create:
                _make(self.path, self.folder)
            elif not (self.path / INDEX).exists():
                raise InvalidArgumentError(f"{str(self.path)!r} is no checkpoint store: it has no {INDEX}")
            if write:
                resources.callback(os.close, _lock(self.path / _LOCK))
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
        """Return one checkpoint, by default the newest."""
        found = self.checkpoints()
        if not found:
            raise InvalidArgumentError(f"{str(self.path)!r} has no checkpoint yet")
        for one in found:
            if one.id == (found[-1].id if number is None else number):
                return one
        raise InvalidArgumentError(
            f"{str(self.path)!r} has no checkpoint {number}", remedy=f"it has {', '.join(str(one.id) for one in found)}"
        )

    def maps(self, number: int) -> dict[int, PageMap]:
        """Return where each page of a checkpoint is, by key of its slot: of every slot a map that has every page."""
        chain = list(rows_of(self.index.checkpoints(), number))
        slots = checkpoint_of(chain[0]).slots
        maps: dict[int, PageMap] = {}
        # Newest first: what is laid over is never looked at again. Slots that are gone since are left out.
        wanted = {slot.key for slot in slots}
        for row in chain:
            for key, one in unpack(row.map).items():
                if key in wanted:
                    maps[key] = one.under(maps[key]) if key in maps else one
        for slot in slots:
            if slot.key not in maps or not maps[slot.key].covers(slot.npages):
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
        if last and lengths[last] < segments.FULL_BYTES and last not in self._spoiled:
            return segments.SegmentWriter(self.folder, last, lengths[last])
        return segments.SegmentWriter(self.folder, max(last, *segments.numbers_in(self.folder), 0) + 1, 0)

    def _spoil(self) -> None:
        """Leave a segment in which a write or a sync has failed, for good."""
        if self._segment is not None:
            self._spoiled.add(self._segment.number)
            self.leave_segment()

    def check_writable(self) -> None:
        """Raise :class:`InvalidArgumentError` if it was opened for reading."""
        if not self._can_write:
            raise InvalidArgumentError(f"{str(self.path)!r} was opened for reading", remedy="open it with write=True")

    def _drop_leftovers(self) -> None:
        """Remove segments that no commit knows: of a crash before it, or after one that took the last page out of them."""
        known = self.index.segments()
        for number in segments.numbers_in(self.folder):
            if number not in known:
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


def _make(path: Path, folder: Path) -> None:
    try:
        if path.is_dir() and any(path.iterdir()) and not (path / INDEX).exists() and not (path / _LOCK).exists():
            raise InvalidArgumentError(
                f"{str(path)!r} is no checkpoint store, and it is not empty", remedy="name an empty or a new folder"
            )
        made = not folder.is_dir()
        folder.mkdir(parents=True, exist_ok=True)
        if made:
            segments.sync_folder(path)
            with suppress(OSError):
                segments.sync_folder(path.absolute().parent)
    except OSError as error:
        raise DirtyLogError(f"{str(path)!r} cannot be made", errno=error.errno, reason=error.strerror) from error


def _lock(path: Path) -> int:
    """Hold the store against other writers until the descriptor is closed. The kernel lets go of a dead process's lock (flock)."""
    import fcntl  # noqa: PLC0415 - Windows has none, and this module is imported there

    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise DirtyLogError(f"{str(path)!r} cannot be opened", errno=error.errno, reason=error.strerror) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    except BlockingIOError as error:
        who = os.pread(descriptor, 20, 0).decode(errors="replace")
        os.close(descriptor)
        raise AccessDeniedError(
            f"{str(path.parent)!r} is being written by process {who}", errno=error.errno, remedy="wait for it, or use another store"
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise DirtyLogError(f"{str(path)!r} cannot be written", errno=error.errno, reason=error.strerror) from error
    return descriptor

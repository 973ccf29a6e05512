"""Saves checkpoints of memory that is logged."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from dirtylog.bitmap import DirtyBitmap
from dirtylog.buffers.memory import BUFFER_SLOT
from dirtylog.buffers.track import track
from dirtylog.checkpoint.arrays import array_facts, restore
from dirtylog.checkpoint.background import Saving
from dirtylog.checkpoint.own_files import refuse_own_files
from dirtylog.checkpoint.restore import put_back, restore_memory
from dirtylog.checkpoint.retention import prune
from dirtylog.checkpoint.store import Checkpoint, SlotLayout, Store
from dirtylog.checkpoint.vcpus import pack_vcpus
from dirtylog.checkpoint.verify import verify
from dirtylog.dirty_log import DirtyLog
from dirtylog.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray

    from dirtylog.checkpoint.draft import Draft
    from dirtylog.checkpoint.retention import Freed, Keep
    from dirtylog.checkpoint.verify import Difference
    from dirtylog.epoch import Consumer
    from dirtylog.memory import Memory
    from dirtylog.memslot import MemorySlot

_SHORT_BYTES = 16 << 20
"""A round of no more than that is short: the next one may be the last, for which the memory stands still."""
_MOST_ROUNDS = 30


@dataclass(slots=True)
class _Part:
    """A log whose memory is saved: the whole checkpoint's, or one array's."""

    log: DirtyLog
    consumer: Consumer
    name: str = ""
    array: dict[str, Any] | None = None
    has_contents: bool = False
    """Whether the first epoch has the pages that hold something: then all others are zero."""
    keys: dict[MemorySlot, int] = field(default_factory=dict)

    @property
    def memory(self) -> Memory:
        return self.log.memory


class Checkpointer:
    """Saves a memory, or some arrays, again and again: at first all of it, then what was written since; a context manager.

    ``what`` is a :class:`DirtyLog`, which is started if it is not on, or a mapping of names to NumPy arrays, which are tracked.
    ``path`` is the folder of the store; others may read it meanwhile. ``compression`` is "none", "lz4" or "zstd", and turns itself
    off where it does not pay; ``checksum`` is that of a new store.

    A checkpoint is the memory as it was at one instant. A guest or a process is paused for that; the threads of this program that
    write to an array must wait for :meth:`save` themselves.

    Raises :class:`InvalidArgumentError`, :class:`AccessDeniedError` while another one writes to the store, :class:`DirtyLogError`
    where it cannot be written.
    """

    def __init__(
        self,
        what: DirtyLog | Mapping[str, NDArray[Any]],
        path: str | Path,
        *,
        compression: str = "none",
        checksum: str | None = None,
    ) -> None:
        self._compression = compression
        self._parent: Checkpoint | None = None
        self._lock = threading.Lock()
        self._saving: Saving | None = None
        with ExitStack() as resources:
            self.store = resources.enter_context(Store(path, write=True, checksum_name=checksum))
            self._next_key = self.store.index.facts().next_slot
            # Fails now, and not at the first save.
            self.store.draft(compression=compression).abort()
            name = f"checkpoint {self.store.path}"
            self._parts = (
                [_part_of(what, name, resources)]
                if isinstance(what, DirtyLog)
                else _arrays_of(what, name, self.store.path, resources)
            )
            self._resources = resources.pop_all()

    def save(
        self, note: str = "", *, pause: bool = True, progress: Callable[[int, int], None] = lambda _done, _total: None
    ) -> Checkpoint:
        """Save a checkpoint, and return it when it is safe on the disk.

        What runs is saved in rounds, each of what was written during the one before, and paused for the last one, unless ``pause``
        is false. On any failure nothing of it is in the store, and the next checkpoint has these pages too. ``progress`` is told
        how many bytes are done, of how many that are known of.
        """
        self._refuse_while_saving()
        runs = pause and any(not part.memory.paused for part in self._parts if part.array is None)
        return self._save(note, self._paused if runs else None, progress)

    def begin(self, note: str = "") -> Saving:
        """Begin a checkpoint in the background, while the program goes on; :meth:`Saving.finish` is the instant that it has."""
        self._refuse_while_saving()
        self._saving = Saving(self._save, note)
        return self._saving

    def _refuse_while_saving(self) -> None:
        """Refuse what would wait for a checkpoint that waits for its end."""
        if self._saving is not None and self._saving.under_way:
            raise InvalidArgumentError("a checkpoint is being saved in the background", remedy="finish it or abandon it first")

    def _save(
        self, note: str, still: Callable[[], Any] | None, progress: Callable[[int, int], None] = lambda _done, _total: None
    ) -> Checkpoint:
        """Save, in rounds if there is a context ``still`` in which the memory stands still for the last one."""
        with self._lock, ExitStack() as epochs:
            draft = self.store.draft(compression=self._compression)
            draft.progress = progress
            try:
                opened = [(part, epochs.enter_context(part.consumer.epoch())) for part in self._parts]
                nbytes = sum(self._write(draft, part, epoch.dirty) for part, epoch in opened)
                if still is None:
                    for part, epoch in opened:
                        self._write(draft, part, _unlogged(part.memory, epoch.dirty))
                    slots, extra = self._state()
                else:
                    for _ in range(_MOST_ROUNDS):
                        if nbytes <= _SHORT_BYTES:
                            break
                        before, nbytes = nbytes, sum(self._write(draft, part, epoch.more()) for part, epoch in opened)
                        if nbytes > before / 2:
                            break
                    with still():
                        for part, epoch in opened:
                            dirty = epoch.more()
                            self._write(draft, part, dirty | _unlogged(part.memory, dirty))
                        slots, extra = self._state()
                # Out of the pause: the disk may take its time.
                saved = self.store.checkpoint(draft.commit(slots, parent=self._parent, note=note, extra=extra))
            except BaseException:
                draft.abort()
                raise
            self._parent = saved
        return saved

    def _write(self, draft: Draft, part: _Part, dirty: dict[int, DirtyBitmap]) -> int:
        """Write dirty pages of a part, and of slots that the store has not met all pages; return how many bytes."""
        draft.expected += sum(bitmap.count() * part.memory.slots[number].page_size for number, bitmap in dirty.items())
        nbytes = 0
        memory = part.memory
        for slot_id, bitmap in dirty.items():
            slot = memory.slots[slot_id]
            key = part.keys.get(slot)
            if key is None:
                key = part.keys[slot] = self._next_key
                self._next_key += 1
            if not draft.has(key) and not self._has(key):
                # New here: what is not written now is zero.
                draft.zeros(key, slot.npages)
                if not part.has_contents:
                    draft.expected += (slot.npages - bitmap.count()) * slot.page_size
                    bitmap = _all_pages(slot)  # noqa: PLW2901 - whatever was dirty
            pages = bitmap.pages()
            if len(pages):
                draft.write(key, pages, slot.page_size, partial(memory.read, slot_id))
            nbytes += len(pages) * slot.page_size
        return nbytes

    def _has(self, key: int) -> bool:
        return self._parent is not None and any(slot.key == key for slot in self._parent.slots)

    def _state(self) -> tuple[Sequence[SlotLayout], bytes]:
        """Return what a checkpoint has beside its pages: the slots, and the states of vCPUs."""
        slots = [
            SlotLayout(
                key=part.keys[slot],
                id=slot.id,
                base_gfn=slot.base_gfn,
                npages=slot.npages,
                page_size=slot.page_size,
                name=part.name or slot.printable_name,
                permissions=slot.permissions,
                array=part.array,
            )
            for part in self._parts
            for slot in part.memory.slots
            if slot in part.keys
        ]
        return slots, pack_vcpus([part.memory for part in self._parts if part.array is None])

    @contextmanager
    def _paused(self) -> Iterator[None]:
        with ExitStack() as resuming:
            for part in self._parts:
                if part.array is None and not part.memory.paused:
                    resuming.callback(part.memory.resume)
                    part.memory.pause()
            yield

    # --- what is in the store

    def restore(self, number: int | None = None, *, into: Memory | Mapping[str, NDArray[Any]] | None = None) -> Checkpoint:
        """Put a checkpoint, by default the newest, back into the memory: only pages that differ are written. It must stand still.

        Its slots must be as they were. The writes are logged: the next checkpoint has them. With ``into`` it is put into another
        memory instead, or into other arrays, by their names.
        """
        checkpoint = self.store.checkpoint(number)
        if isinstance(into, Mapping):
            restore(self.store.path, checkpoint.id, into=into)
            return checkpoint
        if into is not None:
            return restore_memory(into, self.store.path, checkpoint.id)
        slots = [(part.memory, slot, part.name) for part in self._parts for slot in part.memory.slots]
        put_back(self.store, checkpoint, slots)
        return checkpoint

    def prune(self, keep: Keep) -> Freed:
        """Drop all checkpoints but those to keep, and get their room back."""
        self._refuse_while_saving()
        with self._lock:
            return prune(self.store, keep)

    def verify(self) -> list[Difference]:
        """Check every page of every checkpoint, and return those that are not as they were saved."""
        return verify(self.store)

    def list(self) -> Sequence[Checkpoint]:
        """Return the checkpoints of the store, oldest first."""
        return self.store.checkpoints()

    def close(self) -> None:
        """Leave the store to others, and the log; what is saved in the background is given up. A second call does nothing."""
        if self._saving is not None and self._saving.under_way:
            self._saving.abandon()
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _unlogged(memory: Memory, dirty: Mapping[int, DirtyBitmap]) -> dict[int, DirtyBitmap]:
    """Return all pages of the slots that are not logged: nobody knows what was written to them."""
    return {slot.id: _all_pages(slot) for slot in memory.slots if slot.id not in dirty}


def _all_pages(slot: MemorySlot) -> DirtyBitmap:
    everything = DirtyBitmap(slot.npages)
    everything.set_range(0, slot.npages)
    return everything


def _part_of(log: DirtyLog, name: str, resources: ExitStack) -> _Part:
    consumer = log.consumer(name)
    resources.callback(consumer.close)
    started = not log.on
    if started:
        log.start(contents=True)
        resources.callback(log.stop)
    return _Part(log, consumer, has_contents=started)


def _arrays_of(arrays: Mapping[str, NDArray[Any]], name: str, path: Path, resources: ExitStack) -> list[_Part]:
    if not arrays:
        raise InvalidArgumentError("no arrays: there is nothing to save")
    parts = []
    for title, array in arrays.items():
        if isinstance(array, np.ndarray):
            refuse_own_files(title, array, path)
        log = resources.enter_context(track(array))
        slot = log.memory.slots[BUFFER_SLOT]
        parts.append(_Part(log, log.consumer(name), title, array_facts(title, array, slot.host_address)))
    return parts

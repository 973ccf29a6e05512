"""Consumers: several users of one dirty log, none of which takes another's pages.

A consumer's *epoch* is what it takes at once. It ends in a commit, and then the pages are done with, or in a rollback, and
then the consumer's next epoch has them again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from dirtylog.bitmap import DirtyBitmap
from dirtylog.errors import InvalidArgumentError

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from dirtylog.memslot import MemorySlot


class PendingPages:
    """Pages of several slots that their reader has not been given yet, and those it was given but has not committed.

    Both stay here until the commit, so that a reader that is interrupted at any instant loses nothing. Whoever calls holds
    the log's lock.
    """

    def __init__(self) -> None:
        self._pending: dict[MemorySlot, DirtyBitmap] = {}
        self._taken: dict[MemorySlot, DirtyBitmap] = {}

    def __getitem__(self, slot: MemorySlot) -> DirtyBitmap:
        """Return the pending pages of one slot, live."""
        pages = self._pending.get(slot)
        if pages is None:
            pages = self._pending[slot] = DirtyBitmap(slot.npages)
        return pages

    def begin(self, slots: Iterable[MemorySlot]) -> None:
        """Begin with nothing pending in ``slots``."""
        for slot in slots:
            self[slot].clear()

    def keep(self, slots: Iterable[MemorySlot]) -> None:
        """Forget every slot but these."""
        kept = set(slots)
        self._pending = {slot: pages for slot, pages in self._pending.items() if slot in kept}

    def pop(self, slot: MemorySlot) -> DirtyBitmap:
        """Hand the pending pages of one slot over."""
        return self._pending.pop(slot)

    def add(self, slot: MemorySlot, pages: DirtyBitmap) -> None:
        """Add pages of a slot. Of a slot never met every page counts as written: all its contents are news."""
        if slot in self._pending:
            self._pending[slot] |= pages
        else:
            everything = DirtyBitmap(slot.npages)
            everything.set_range(0, slot.npages)
            self._pending[slot] = everything

    def take(self) -> dict[int, DirtyBitmap]:
        """Return a copy of all pending pages by slot id; they count as taken until :meth:`commit` or :meth:`give_back`."""
        self.give_back()
        self._taken = self._pending
        self._pending = {slot: DirtyBitmap(slot.npages) for slot in self._taken}
        return {slot.id: pages.copy() for slot, pages in self._taken.items()}

    def take_more(self) -> dict[int, DirtyBitmap]:
        """Take what has come since :meth:`take` too, and return a copy of just that."""
        fresh = self._pending
        self._pending = {slot: DirtyBitmap(slot.npages) for slot in fresh}
        taken = {slot: pages for slot, pages in self._taken.items() if slot in fresh}
        for slot, pages in fresh.items():
            if slot in taken:
                taken[slot] |= pages
            else:
                taken[slot] = pages.copy()
        self._taken = taken
        return {slot.id: pages.copy() for slot, pages in fresh.items()}

    def commit(self) -> None:
        """Forget what was taken."""
        self._taken = {}

    def give_back(self) -> None:
        """Make what was taken pending again, but for slots that are gone."""
        for slot, pages in self._taken.items():
            if slot in self._pending:
                self._pending[slot] |= pages
        self._taken = {}


class Consumer:
    """One reader of a dirty log, from :meth:`DirtyLog.consumer`.

    Its first epoch begins with what nobody had taken from the port when the consumer was made.
    """

    def __init__(
        self, name: str, lock: threading.RLock, drain: Callable[[], None], forget: Callable[[Consumer], None] = lambda _: None
    ) -> None:
        self.name = name
        self._forget = forget
        self.pending = PendingPages()
        self._lock = lock
        self._drain = drain
        self._open: Epoch | None = None

    def epoch(self) -> Epoch:
        """Return the next epoch, a context manager: it takes on entry, commits on a normal exit, rolls back on an exception."""
        return Epoch(self)

    def begin(self, epoch: Epoch) -> dict[int, DirtyBitmap]:
        """Take everything written since the last take, for ``epoch``. No other epoch of this consumer may be open."""
        with self._lock:
            if self._open is not None:
                raise InvalidArgumentError(f"consumer {self.name!r} has an epoch open; commit it or roll it back first")
            self._drain()
            dirty = self.pending.take()
            self._open = epoch
            return dirty

    def more(self, epoch: Epoch) -> dict[int, DirtyBitmap]:
        """Take what was written since, for the open epoch too."""
        with self._lock:
            if self._open is not epoch:
                raise InvalidArgumentError(f"this epoch of consumer {self.name!r} is not open", remedy="take more before it ends")
            self._drain()
            return self.pending.take_more()

    def end(self, epoch: Epoch, *, commit: bool) -> None:
        """End ``epoch``; does nothing if it is not the open one."""
        with self._lock:
            if self._open is not epoch:
                return
            if commit:
                self.pending.commit()
            else:
                self.pending.give_back()
            self._open = None

    def close(self) -> None:
        """Leave the log: nothing is kept for this consumer any more. One that is asked for by its name is a new one."""
        self._forget(self)

    def __repr__(self) -> str:
        return f"Consumer({self.name!r})"


class Epoch:
    """What one consumer takes at once: ``dirty`` maps the id of each logged slot to its :class:`DirtyBitmap`.

    The bitmaps are the consumer's own: changing them changes nothing that a rollback gives back. After one of
    :meth:`commit` and :meth:`rollback`, both do nothing.
    """

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        self.dirty: dict[int, DirtyBitmap] = {}

    def __enter__(self) -> Self:
        try:
            self.dirty = self.consumer.begin(self)
        except BaseException:
            self.rollback()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.consumer.end(self, commit=kind is None)

    def more(self) -> dict[int, DirtyBitmap]:
        """Take what was written since the epoch began, or since the last call, and return just that. A rollback gives all back."""
        return self.consumer.more(self)

    def commit(self) -> None:
        """Forget the pages: they are safe."""
        self.consumer.end(self, commit=True)

    def rollback(self) -> None:
        """Give the pages back: the consumer's next epoch has them again."""
        self.consumer.end(self, commit=False)

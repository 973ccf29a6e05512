"""DirtyLog: the waist of the hourglass, between every source of writes and every consumer of them."""

from __future__ import annotations

import os
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, Self

from dirtylog.bitmap import DirtyBitmap
from dirtylog.epoch import Consumer, PendingPages
from dirtylog.errors import InvalidArgumentError, UnsupportedError
from dirtylog.log import (
    clear_dirty_log_protect,
    fetch_dirty_log,
    get_dirty_log,
    get_dirty_log_protect,
    read_dirty_log,
    start_logging,
    stop_logging,
)
from dirtylog.port import KernelPort, ProtectPort
from dirtylog.words import PAGES_PER_WORD, DirtyWords

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from dirtylog.memory import Memory
    from dirtylog.memslot import MemorySlot
    from dirtylog.port import Port


class DirtyLog:
    """The dirty log of one memory: which pages were written since I last asked.

    A context manager: entering starts the log, if it is not on, and leaving stops it. The memory stays open, unless
    ``closes_memory`` is set. All methods may be called from several threads.

    The slots of a process come and go with its mappings. :meth:`update` takes account of that, and every epoch begins with it: of a
    new slot the first get reports every page that may hold something.

    By default a get takes the dirty pages and re-arms them in one step. With ``manual_protect`` a get only reads, and
    :meth:`clear` re-arms just the pages that the caller has taken; ``initially_all_set`` then starts with every page dirty
    and none protected, so that a large memory is protected piece by piece (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).
    """

    def __init__(self, memory: Memory, *, manual_protect: bool = False, initially_all_set: bool = False) -> None:
        if initially_all_set and not manual_protect:
            raise InvalidArgumentError(
                "initially_all_set goes only with manual_protect, as in KVM: without it nothing would protect the pages"
            )
        if manual_protect and not isinstance(memory.port, ProtectPort):
            raise UnsupportedError(f"the {memory.port.name} port has no manual protect", remedy="leave manual_protect out")
        self.memory = memory
        self.manual_protect = manual_protect
        self.initially_all_set = initially_all_set
        # Taken before slots_lock, which comes before mmu_lock.
        self._lock = threading.RLock()
        self._consumers: dict[str, Consumer] = {}
        # Pages that were taken from the port and get has not returned yet.
        self._unread = PendingPages()
        self.closes_memory = False
        self._on = False
        self._stopped = False
        self._take = _generic_get(memory.port)
        _logs.add(self)

    @property
    def on(self) -> bool:
        """Whether it logs."""
        return self._on

    def start(self, *, contents: bool = False) -> None:
        """Begin to log every slot. Consumers from before a :meth:`stop` find all pages dirty: nobody saw what was written since.

        With ``contents`` the pages that hold something already count as written: for consumers that copy the memory.
        """
        with self._lock, self.memory.slots.lock:
            for slot in self.memory.slots:
                if slot.dirty_bitmap is not None:
                    raise InvalidArgumentError(
                        f"slot {slot.id} is being logged already",
                        slot=slot.id,
                        remedy="share one DirtyLog and give each user a consumer",
                    )
            started: list[int] = []
            try:
                for slot in self.memory.slots:
                    started.append(slot.id)
                    start_logging(self.memory, slot.id, initially_all_set=self.initially_all_set, contents=contents)
            except BaseException:
                for slot_id in started:
                    stop_logging(self.memory, slot_id)
                raise
            self._on = True
            if not self._stopped:
                for consumer in self._consumers.values():
                    consumer.pending.begin(self.memory.slots)

    def update(self) -> None:
        """Bring the slots up to date with the memory, and begin to log those that are new: all that they hold counts as written.

        For a guest, whose slots change by calls only, it does nothing. :class:`TargetGoneError` when there is no memory any more.
        """
        with self._lock, self.memory.slots.lock:
            if self._on:
                for slot in self.memory.update_slots():
                    start_logging(self.memory, slot.id, contents=True)
                    for consumer in self._consumers.values():
                        consumer.pending.begin([slot])

    def stop(self) -> None:
        """Stop logging. The bits that nobody took are gone, and so are those that consumers hold pending."""
        with self._lock, self.memory.slots.lock:
            # First, so that a stop that is interrupted leaves no consumer that takes the gap in the log for quiet.
            self._stopped = True
            self._on = False
            for consumer in self._consumers.values():
                consumer.pending = PendingPages()
            for slot in self.memory.slots:
                stop_logging(self.memory, slot.id)
            self._unread = PendingPages()

    def get(self, slot: int, out: DirtyBitmap | None = None) -> DirtyBitmap:
        """Return the pages of a slot that were written since the last get, and re-arm them.

        With ``out`` its content is replaced, and it is returned; its length must be the slot's. With ``manual_protect`` the
        call changes nothing: it reads. A page may be reported that was not written, where the memory's exactness is SUPERSET.

        Raises :class:`BadSlotError` (EINVAL), :class:`LoggingOffError` (ENOENT), :class:`UnsupportedError` (ENXIO),
        :class:`CopyFaultError` (EFAULT), in this order of checks. On any of them no bit is lost.
        """
        with self._lock, self.memory.slots.lock:
            memslot, _ = self.memory.slots.logged(slot)
            if out is not None and out.npages != memslot.npages:
                raise InvalidArgumentError(f"a bitmap of {out.npages} pages for slot {slot}, which has {memslot.npages}", slot=slot)
            if self.manual_protect:
                result = DirtyBitmap(memslot.npages) if out is None else out
                read_dirty_log(self.memory, slot, partial(self._read, memslot, result))
                return result
            self._take(self.memory, slot, partial(self._deliver, memslot, out=out))
            # Last: until here an interrupt leaves the pages to the next get.
            unread = self._unread.pop(memslot)
            return unread if out is None else out

    def clear(self, slot: int, first_page: int, mask: DirtyBitmap) -> None:
        """Clear and re-arm the pages of ``mask``, whose page 0 is the slot's ``first_page``: manual protect's second half.

        ``first_page`` must be a multiple of 64, and so must the mask's length unless it ends at the slot's last page. Clear
        before you copy the pages, and never a bit that you have not taken down: it would be lost.
        """
        with self._lock, self.memory.slots.lock:
            memslot, _ = self.memory.slots.logged(slot)

            def deliver(cleared: DirtyBitmap) -> None:
                for consumer in self._consumers.values():
                    consumer.pending.add(memslot, cleared)

            clear_dirty_log_protect(self.memory, slot, first_page, mask, deliver)
            index, values = mask.nonzero_words()
            taken = DirtyBitmap.from_words(memslot.npages, DirtyWords(index + first_page // PAGES_PER_WORD, values))
            unread = self._unread[memslot]
            unread.assign(unread - taken)

    def consumer(self, name: str) -> Consumer:
        """Return the consumer of this name, made at the first call."""
        with self._lock:
            if name not in self._consumers:
                self._consumers[name] = consumer = Consumer(name, self._lock, self._drain, self._forget)
                consumer.pending.begin(self._logged())
            return self._consumers[name]

    def mark_for_others(self, slot: MemorySlot, pages: DirtyBitmap, consumer: Consumer) -> None:
        """Make pages of a slot dirty for ``get`` and for every consumer but this one, which has written them itself."""
        with self._lock:
            unread = self._unread[slot]
            unread |= pages
            for other in self._consumers.values():
                if other is not consumer:
                    other.pending.add(slot, pages)

    def _forget(self, consumer: Consumer) -> None:
        with self._lock:
            if self._consumers.get(consumer.name) is consumer:
                del self._consumers[consumer.name]

    def _drain(self) -> None:
        """Move the dirty pages of every slot from the port to every consumer, and to get."""
        with self.memory.slots.lock:
            self.update()
            logged = self._logged()
            self._unread.keep(logged)
            for consumer in self._consumers.values():
                consumer.pending.keep(logged)
            for slot in logged:
                self._take(self.memory, slot.id, partial(self._deliver, slot))

    def _read(self, slot: MemorySlot, result: DirtyBitmap, snapshot: DirtyBitmap) -> None:
        result.assign(self._unread[slot])
        result |= snapshot

    def _deliver(self, slot: MemorySlot, snapshot: DirtyBitmap, out: DirtyBitmap | None = None) -> None:
        """Give pages taken from the port to everybody: to get, and to every consumer; and copy what get has to ``out``."""
        unread = self._unread[slot]
        unread |= snapshot
        for consumer in self._consumers.values():
            consumer.pending.add(slot, snapshot)
        if out is not None:
            out.assign(unread)

    def _logged(self) -> list[MemorySlot]:
        return [slot for slot in self.memory.slots if slot.dirty_bitmap is not None]

    def close(self) -> None:
        """Stop the log and close the memory. A second call does nothing."""
        self.stop()
        self.memory.close()

    def __enter__(self) -> Self:
        if not self._on:
            self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()
        if self.closes_memory:
            self.memory.close()


_logs: weakref.WeakSet[DirtyLog] = weakref.WeakSet()


def _unlock_all() -> None:
    """Free the locks in a forked child, which other threads of the parent may have held: those threads are not in it.

    What the locks guard may be half done; but the child has no part in its parent's log, and only has to be told so.
    """
    for log in list(_logs):
        for lock in (log._lock, log.memory.slots.lock, log.memory.port.mmu_lock):  # noqa: SLF001 - of this module's class
            lock._at_fork_reinit()  # type: ignore[attr-defined]  # noqa: SLF001 - as the standard library does with its own


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_all)


def _generic_get(port: Port) -> Callable[[Memory, int, Callable[[DirtyBitmap], None]], None]:
    """Return the generic function that takes a slot's dirty pages through this kind of port."""
    if isinstance(port, KernelPort):
        return fetch_dirty_log
    return get_dirty_log_protect if isinstance(port, ProtectPort) else get_dirty_log

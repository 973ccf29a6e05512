"""The generic dirty log: one get-dirty-log for everything whose writes can be logged.

The functions here know slots and bitmaps. What differs between sources stands behind the hooks of :mod:`dirtylog.port`;
slots_lock is the slot table's lock, mmu_lock the port's. :class:`~dirtylog.dirty_log.DirtyLog` is the way in for users.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from dirtylog.bitmap import DirtyBitmap
from dirtylog.errors import CopyFaultError, InvalidArgumentError, UnsupportedError
from dirtylog.memslot import SlotFlags
from dirtylog.port import KernelPort, ProtectPort, SyncPort
from dirtylog.slotbitmap import SlotBitmap
from dirtylog.words import PAGES_PER_WORD, DirtyWords

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from dirtylog.memory import Memory
    from dirtylog.memslot import MemorySlot
    from dirtylog.port import Port


def get_dirty_log_protect(memory: Memory, slot_id: int, copy: Callable[[DirtyBitmap], None]) -> None:
    """Get and clear the dirty log of a slot, for a port that logs a page by protecting it.

    ``copy`` receives the dirty pages and must copy what it keeps. If it raises, nothing is lost: the snapshot is merged
    into the bitmap again, the TLBs are flushed all the same, and the error is a :class:`CopyFaultError`.

    Why this order. *1 before 2*: a write that faults between them finds its page not yet protected or sets the bit again;
    the other way round it would set a bit that is then cleared, and leave a page both writable and clean (KVM edde99ce0529).
    *1 and 2 under mmu_lock*, which every marker holds too: the exchange is atomic. *3 and 4 in either order*: a write
    through a stale translation hits a page that is already in the snapshot, and the caller reads the page only after the
    return. *4 before the return and before slots_lock is let go*: a second caller would find the page clean and protected,
    skip its flush, and miss writes through the stale translation.
    """
    port, slots = memory.port, memory.slots
    assert isinstance(port, ProtectPort)  # noqa: S101 - a wrong pairing of function and port is a bug of the caller
    with slots.lock:
        slot, bitmap = slots.logged(slot_id)
        _check_has_bitmap(port, slot)
        with _NothingLost(port, slot, bitmap):
            port.sync_dirty_log(slot)
            with port.mmu_lock:
                words = bitmap.exchange()  # 1. take a snapshot and clear it
                port.enable_log_dirty(slot, words)  # 2. write-protect those pages
            _copy_to_caller(slot, DirtyBitmap.from_words(slot.npages, words), copy)  # 3. copy the snapshot
            if words:
                port.flush_tlbs(slot)  # 4. flush TLBs


def get_dirty_log(memory: Memory, slot_id: int, copy: Callable[[DirtyBitmap], None]) -> None:
    """Get and clear the dirty log of a slot, for a port whose hardware or log area already holds the answer.

    The sync re-arms the pages that it moves into the bitmap; the rest is as in :func:`get_dirty_log_protect`.
    """
    port, slots = memory.port, memory.slots
    assert isinstance(port, SyncPort)  # noqa: S101 - as above
    with slots.lock:
        slot, bitmap = slots.logged(slot_id)
        _check_has_bitmap(port, slot)
        with _NothingLost(port, slot, bitmap):
            port.sync_dirty_log(slot)
            with port.mmu_lock:
                words = bitmap.exchange()
            _copy_to_caller(slot, DirtyBitmap.from_words(slot.npages, words), copy)
            if words:
                port.flush_tlbs(slot)


def fetch_dirty_log(memory: Memory, slot_id: int, copy: Callable[[DirtyBitmap], None]) -> None:
    """Get and clear the dirty log of a slot, for a port behind which a kernel keeps the bitmap and runs the four steps itself.

    What it hands over lies in the slot's snapshot until it has been copied; what this process marked is added to it.
    """
    port, slots = memory.port, memory.slots
    assert isinstance(port, KernelPort)  # noqa: S101 - as above
    with slots.lock:
        slot, bitmap = slots.logged(slot_id)
        with _NothingLost(port, slot, bitmap):
            with port.mmu_lock:
                snapshot = bitmap.receive(slot, port.fetch_dirty_log)
            _copy_to_caller(slot, snapshot, copy)


def read_dirty_log(memory: Memory, slot_id: int, copy: Callable[[DirtyBitmap], None]) -> None:
    """Get the dirty log of a slot and change nothing: the get of manual protect."""
    port, slots = memory.port, memory.slots
    assert isinstance(port, ProtectPort)  # noqa: S101 - as above
    with slots.lock:
        slot, bitmap = slots.logged(slot_id)
        _check_has_bitmap(port, slot)
        port.sync_dirty_log(slot)
        with port.mmu_lock:
            words = bitmap.read()
        _copy_to_caller(slot, DirtyBitmap.from_words(slot.npages, words), copy)


def clear_dirty_log_protect(
    memory: Memory, slot_id: int, first_page: int, mask: DirtyBitmap, copy: Callable[[DirtyBitmap], None]
) -> None:
    """Clear and re-protect the pages of ``mask``, whose page 0 is the slot's ``first_page`` (KVM_CLEAR_DIRTY_LOG).

    ``first_page`` is a multiple of 64, and so is the mask's length, unless it ends at the slot's last page. Pages that are
    not dirty, and bits past the end, do nothing: only what was really set is cleared, and handed to ``copy``.
    """
    port, slots = memory.port, memory.slots
    with slots.lock:
        slot, bitmap = slots.logged(slot_id)
        _check_has_bitmap(port, slot)
        if not isinstance(port, ProtectPort):
            raise UnsupportedError(
                f"the {port.name} port has no manual protect", slot=slot_id, remedy="get takes and re-arms in one step"
            )
        _check_clear_range(slot, first_page, mask.npages)
        index, values = mask.nonzero_words()
        with _NothingLost(port, slot, bitmap):
            port.sync_dirty_log(slot)
            with port.mmu_lock:
                words = bitmap.exchange_masked(DirtyWords(index + first_page // PAGES_PER_WORD, values))
                port.enable_log_dirty(slot, words)
            _copy_to_caller(slot, DirtyBitmap.from_words(slot.npages, words), copy)
            if words:
                port.flush_tlbs(slot)


def start_logging(memory: Memory, slot_id: int, *, initially_all_set: bool = False, contents: bool = False) -> None:
    """Begin to log a slot. With ``initially_all_set`` every bit is set and no page is protected until it is cleared.

    With ``contents`` the pages that hold something count as written: for a slot that its readers have not met.

    The flush is unconditional: that a page needs no change now does not prove that no stale translation exists (KVM b64d740ea7dd).
    """
    port, slots = memory.port, memory.slots
    with slots.lock:
        slot = slots[slot_id]
        bitmap = SlotBitmap(slot.npages, all_set=initially_all_set)
        with port.mmu_lock:
            slot.dirty_bitmap = bitmap
            slot.flags |= SlotFlags.LOG_DIRTY_PAGES
            try:
                if initially_all_set and isinstance(port, ProtectPort):
                    port.start_logging_all_set(slot)
                else:
                    port.start_logging(slot)
                if contents:
                    port.mark_contents(slot)
            except BaseException:
                # Whole or not at all: a slot that is logged, but whose contents nobody was told of, would be a loss.
                _stop(port, slot)
                raise
        port.flush_tlbs(slot)


def stop_logging(memory: Memory, slot_id: int) -> None:
    """Stop logging a slot; its bitmap is freed. Does nothing when it is not being logged."""
    port, slots = memory.port, memory.slots
    with slots.lock:
        slot = slots[slot_id]
        if slot.dirty_bitmap is None:
            return
        with port.mmu_lock:
            _stop(port, slot)
        port.flush_tlbs(slot)


def _stop(port: Port, slot: MemorySlot) -> None:
    slot.dirty_bitmap = None
    slot.flags &= ~SlotFlags.LOG_DIRTY_PAGES
    port.stop_logging(slot)


class _NothingLost:
    """Commit the snapshot taken inside, or on any failure merge it into the bitmap again and flush all the same."""

    __slots__ = ("_bitmap", "_port", "_slot")

    def __init__(self, port: Port, slot: MemorySlot, bitmap: SlotBitmap) -> None:
        self._port = port
        self._slot = slot
        self._bitmap = bitmap

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._bitmap.commit()
            return
        with self._port.mmu_lock:
            self._bitmap.give_back()
        self._port.flush_tlbs(self._slot)


def _copy_to_caller(slot: MemorySlot, snapshot: DirtyBitmap, copy: Callable[[DirtyBitmap], None]) -> None:
    try:
        copy(snapshot)
    except Exception as error:
        raise CopyFaultError(
            f"the dirty log of slot {slot.id} could not be copied to the caller",
            slot=slot.id,
            reason=f"{type(error).__name__}: {error}",
            remedy="nothing is lost: the next get returns these pages",
        ) from error


def _check_has_bitmap(port: Port, slot: MemorySlot) -> None:
    if not port.has_bitmap:
        raise UnsupportedError(
            f"slot {slot.id} is logged in a ring without a bitmap",
            errno=errno.ENXIO,
            slot=slot.id,
            remedy="harvest the ring instead",
        )


def _check_clear_range(slot: MemorySlot, first_page: int, npages: int) -> None:
    # By subtraction, as KVM does since 98938aa8edd6: its sum could wrap.
    if first_page < 0 or first_page > slot.npages or npages > slot.npages - first_page:
        rule = f"must lie within its {slot.npages} pages"
    elif first_page % PAGES_PER_WORD:
        rule = "must start at a multiple of 64"
    elif npages < slot.npages - first_page and npages % PAGES_PER_WORD:
        rule = f"must be a multiple of 64 pages long, or end at the slot's last page ({slot.npages - 1})"
    else:
        return
    raise InvalidArgumentError(f"clearing {npages} pages from page {first_page} of slot {slot.id}: the range {rule}", slot=slot.id)

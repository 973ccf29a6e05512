"""Writes found by comparing with a copy: works on any memory that can be read, wherever Python runs, and costs all of it each time.

It sees contents, not writes. Each sync copies the memory piece by piece and compares *that copy* with the one before, which it then
replaces: a store that comes in between differs from the new copy, and the next sync finds it. A memory's ``read`` gives that copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from dirtylog.errors import UnsupportedError
from dirtylog.guests.host import host_memory
from dirtylog.port import Exactness, SyncPort
from dirtylog.words import words_of_pages

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dirtylog.errors import DirtyLogError
    from dirtylog.memslot import MemorySlot

# What is copied at once; it should stay in the processor's cache.
_PIECE_BYTES = 1 << 19


class ReadRange(Protocol):
    """How the port reads memory."""

    def __call__(self, slot: MemorySlot, first: int, out: NDArray[np.uint8]) -> None:
        """Fill ``out``, uint8[k, page_size], with the slot's pages from ``first`` on."""


class ComparePort(SyncPort):
    """A shadow copy of each slot. It takes as much memory again as is logged."""

    name = "compare"
    how = "a copy of the contents, compared"
    exactness: ClassVar[Exactness] = Exactness.EXACT
    """Reported is what has changed. A write that changes nothing is not seen: see the blind spots."""
    blind_spots: ClassVar[tuple[str, ...]] = (
        "writes that leave a page's contents as they were at the get before; copy pages with read, which gives what was compared",
    )

    def __init__(self, read: ReadRange) -> None:
        super().__init__()
        self._read = read
        self._shadows: dict[MemorySlot, NDArray[np.uint8]] = {}
        self._scratch: dict[int, NDArray[np.uint8]] = {}

    def start_logging(self, slot: MemorySlot) -> None:
        """Copy the slot."""
        shadow = np.empty((slot.npages, slot.page_size), np.uint8)
        step = self._piece(slot)
        for first in range(0, slot.npages, step):
            self._read(slot, first, shadow[first : first + step])
        self._shadows[slot] = shadow

    def compared(self, slot: MemorySlot) -> NDArray[np.uint8] | None:
        """Return the contents as they were when they were compared, uint8[npages, page_size]; None of a slot that is not logged.

        Who copies what a get reports must copy *this*: of what is there later, a page could be copied that is back to what it was
        at the next get, and then it would not be reported.
        """
        return self._shadows.get(slot)

    def stop_logging(self, slot: MemorySlot) -> None:
        """Forget the copy."""
        self._shadows.pop(slot, None)

    def sync_dirty_log(self, slot: MemorySlot) -> None:
        """Compare, set the bits of what differs, and keep the new copy."""
        shadow, step = self._shadows[slot], self._piece(slot)
        scratch = self._scratch.setdefault(slot.page_size, np.empty((step, slot.page_size), np.uint8))
        for first in range(0, slot.npages, step):
            before = shadow[first : first + step]
            now = scratch[: len(before)]
            self._read(slot, first, now)
            differs = (now.view(np.uint64) != before.view(np.uint64)).any(axis=1)
            if differs.any():
                with self.mmu_lock:
                    if slot.dirty_bitmap is not None:
                        slot.dirty_bitmap.merge(words_of_pages(np.flatnonzero(differs) + first))
                # After the bits: an interrupt between the two reports these pages again.
                before[differs] = now[differs]

    def refuses(self, start: int, nbytes: int) -> DirtyLogError | None:  # noqa: ARG002 - where it lies does not matter
        """Return why memory cannot be logged: there is no room for a copy."""
        total = host_memory()
        if total is not None and nbytes > total // 2:
            return UnsupportedError("there is no room for a copy", reason=f"{nbytes} bytes, and this host has {total}")
        return None

    def close(self) -> None:
        """Forget all copies."""
        self._shadows.clear()

    def flush_tlbs(self, slot: MemorySlot) -> None:
        """Do nothing: there is nothing to protect."""

    def _piece(self, slot: MemorySlot) -> int:
        return max(1, _PIECE_BYTES // slot.page_size)

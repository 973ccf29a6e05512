"""A memory that is nothing but its slot and its bitmap: what the generic part costs by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dirtylog.memslot import MemorySlot, SlotTable
from dirtylog.port import Exactness, ProtectPort

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from dirtylog.words import DirtyWords


class NullPort(ProtectPort):
    """Hooks that do nothing."""

    name = "null"

    def start_logging(self, slot: MemorySlot) -> None:
        """Protect nothing."""

    def stop_logging(self, slot: MemorySlot) -> None:
        """Protect nothing."""

    def flush_tlbs(self, slot: MemorySlot) -> None:
        """Flush nothing."""

    def enable_log_dirty(self, slot: MemorySlot, words: DirtyWords) -> None:
        """Protect nothing."""


class NullMemory:
    """One slot of ``npages`` pages that have no contents, so that it can be as large as one likes."""

    exactness = Exactness.EXACT
    blind_spots: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()
    faults: int | None = None
    held = 0
    paused = True

    def __init__(self, npages: int) -> None:
        self.slots = SlotTable()
        self.slots.add(MemorySlot(0, 0, npages))
        self.port = NullPort()

    def mark(self, words: DirtyWords) -> None:
        """Set these bits, as a port's miss path would."""
        _, bitmap = self.slots.logged(0)
        with self.port.mmu_lock:
            bitmap.merge(words)

    def update_slots(self) -> list[MemorySlot]:
        """Return no new slots."""
        return []

    def read(self, slot: int, pages: ArrayLike, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Refuse: there are no contents."""
        raise NotImplementedError

    def write(self, slot: int, pages: ArrayLike, data: ArrayLike) -> None:
        """Refuse: there are no contents."""
        raise NotImplementedError

    def ending(self, seconds: float) -> bool:
        """Nothing runs."""
        raise NotImplementedError

    def pause(self) -> None:
        """Nothing runs."""

    def resume(self) -> None:
        """Nothing runs."""

    def close(self) -> None:
        """Nothing is open."""

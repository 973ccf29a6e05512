"""The least that a log asks of a memory: slots and a port."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dirtylog import MemorySlot, SlotTable

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dirtylog import Port

PAGE = 4096


class ModelMemory:
    """A memory without contents. Its slots are rows of (number, first page, number of pages)."""

    def __init__(self, port: Port, slots: Iterable[tuple[int, int, int]], page_size: int = PAGE) -> None:
        self.port: Any = port
        self.slots = SlotTable()
        self.slots.change(
            (), [MemorySlot(number, first, npages, page_size, host_address=first * page_size) for number, first, npages in slots]
        )
        self.exactness, self.blind_spots, self.incomplete = port.exactness, port.blind_spots, ()
        self.faults: int | None = None
        self.paused = True
        self.held = sum(slot.nbytes for slot in self.slots)

    def update_slots(self) -> Any:
        """Return no new slots."""
        return []

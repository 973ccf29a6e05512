"""The oracle: what one reader of a dirty log has who copies only what is reported to it, held against the memory itself.

A page that differs, although the reader has taken everything and nobody stores, was written and not reported: it is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from dirtylog import MemorySlot


class Lost(NamedTuple):
    """A page that a reader was not told of."""

    reader: str
    slot: MemorySlot
    page: int
    differs_from: int
    """The first byte in which the page and the copy of it differ."""
    there: int
    copied: int

    def __str__(self) -> str:
        slot = self.slot
        return (
            f"{self.reader}: page {self.page} of the {slot.npages} of slot {slot.id} ({slot.name or hex(slot.base_gfn)}) "
            f"is not what was reported: byte {self.differs_from} is {self.there:#04x}, copied {self.copied:#04x}"
        )


class Copy:
    """A reader's copy of a memory, slot by slot.

    ``false_positives`` counts the reported pages whose contents were what the copy had. A page that is stored to between a get
    and the read of its contents is copied then already, and the next get reports it once more: that counts as one too.
    """

    def __init__(self, reader: str) -> None:
        self._reader = reader
        self._pages: dict[MemorySlot, NDArray[np.uint8]] = {}
        self.reports = 0
        self.false_positives = 0
        self.compared = 0
        self.lost: list[Lost] = []

    def begin(self, slot: MemorySlot, contents: NDArray[np.uint8], first: int = 0) -> None:
        """Take over contents of a slot from page ``first`` on, which no report is needed for."""
        self._of(slot)[first : first + len(contents)] = contents

    def keep(self, slots: Iterable[MemorySlot]) -> None:
        """Forget every slot but these."""
        self._pages = {slot: self._pages[slot] for slot in slots if slot in self._pages}

    def take(self, slot: MemorySlot, pages: NDArray[np.int64], contents: NDArray[np.uint8]) -> None:
        """Copy pages that were reported."""
        copied = self._of(slot)
        self.reports += len(pages)
        self.false_positives += int((copied[pages] == contents).all(axis=1).sum())
        copied[pages] = contents

    def compare(self, slot: MemorySlot, first: int, there: NDArray[np.uint8]) -> None:
        """Hold what is there from page ``first`` on against the copy. A lost page is copied, so that it is counted once."""
        copied = self._of(slot)[first : first + len(there)]
        self.compared += len(there)
        if np.array_equal(copied, there):
            return
        for row in np.flatnonzero((copied != there).any(axis=1)).tolist():
            byte = int(np.flatnonzero(copied[row] != there[row])[0])
            self.lost.append(Lost(self._reader, slot, first + row, byte, int(there[row, byte]), int(copied[row, byte])))
            copied[row] = there[row]

    def _of(self, slot: MemorySlot) -> NDArray[np.uint8]:
        """Return the copy of a slot; one that was never met begins with zeros, as its memory does."""
        copied = self._pages.get(slot)
        if copied is None:
            copied = self._pages[slot] = np.zeros((slot.npages, slot.page_size), np.uint8)
        return copied

"""A copy of another process's memory that is made of nothing but what a log reports; and whether it is what the memory is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from address_space import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dirtylog import DirtyLog, MemorySlot
    from dirtylog.linux.process import ProcessMemory

_PRESENT = np.uint64(1 << 63)
_PIECE = 1 << 14


class Lost(NamedTuple):
    """A page that is not what the copy has."""

    slot: MemorySlot
    page: int
    there: bytes
    copied: bytes

    def __str__(self) -> str:
        slot = self.slot
        where = slot.host_address + self.page * slot.page_size
        differ = [offset for offset, (one, other) in enumerate(zip(self.there, self.copied, strict=True)) if one != other]
        return (
            f"page {where:#x} of slot {slot.id} ({slot.name} {slot.permissions} {slot.host_address:#x}+{slot.npages}) differs in "
            f"{len(differ)} bytes from {differ[0]} on: {self.there[differ[0]]:#x}, copied {self.copied[differ[0]]:#x}"
        )


class Shadow:
    """The copy. What is there at the start is read once; then only what is reported. :meth:`compare` finds lost pages."""

    def __init__(self, memory: ProcessMemory, log: DirtyLog) -> None:
        self._memory = memory
        self._log = log
        self.reports = 0
        self.rounds = 0
        self.compares = 0
        self.compared = 0
        self.slots_seen = 0
        self.lost: list[Lost] = []
        self._copies: dict[MemorySlot, NDArray[np.uint8]] = {}
        for slot in memory.slots:
            self._copies[slot] = copy = np.zeros((slot.npages, slot.page_size), np.uint8)
            pages = np.arange(slot.npages)
            if slot.anonymous:
                pages = pages[self._present(slot)]
            copy[pages] = memory.read(slot.id, pages)

    def follow(self) -> None:
        """Take a round."""
        self._log.update()
        slots = list(self._memory.slots)
        self._copies = {slot: self._copies[slot] for slot in slots if slot in self._copies}
        for slot in slots:
            dirty = self._log.get(slot.id)
            copy = self._copies.get(slot)
            if copy is None:
                assert slot.anonymous or dirty.count() == slot.npages, f"{slot} is new, and not reported as a whole"
                self._copies[slot] = copy = np.zeros((slot.npages, slot.page_size), np.uint8)
                self.slots_seen += 1
            if dirty:
                pages = dirty.pages()
                copy[pages] = self._memory.read(slot.id, pages)
                self.reports += len(pages)
        self.rounds += 1

    def compare(self) -> Self:
        """Compare with the memory itself, which stands still: byte for byte, past the library."""
        self.compares += 1
        fd = os.open(f"/proc/{self._memory.pid}/mem", os.O_RDONLY)
        try:
            for slot, copy in self._copies.items():
                for first, there in self._contents(fd, slot):
                    copied = copy[first : first + len(there)]
                    self.compared += len(there)
                    if not np.array_equal(there, copied):
                        for row in np.flatnonzero((there != copied).any(axis=1)).tolist():
                            self.lost.append(Lost(slot, first + row, there[row].tobytes(), copied[row].tobytes()))
        finally:
            os.close(fd)
        return self

    def octets(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        """Return what the copy has of some memory, which may lie in several slots."""
        found = np.zeros(nbytes, np.uint8)
        for slot, copy in self._copies.items():
            first, end = max(address, slot.host_address), min(address + nbytes, slot.host_address + slot.nbytes)
            if first < end:
                found[first - address : end - address] = copy.reshape(-1)[first - slot.host_address : end - slot.host_address]
        return found

    def _present(self, slot: MemorySlot) -> NDArray[np.bool_]:
        """Return which pages are there; a private page without a file that is not reads as zeros."""
        each = slot.page_size // PAGE
        with Path(f"/proc/{self._memory.pid}/pagemap").open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), slot.npages * each * 8, slot.host_address // PAGE * 8)
        entries = np.frombuffer(data, np.uint64)
        return ((entries & _PRESENT) != 0).reshape(-1, each).any(axis=1)  # type: ignore[no-any-return]  # NumPy's

    def _contents(self, fd: int, slot: MemorySlot) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield the contents of a slot in pieces. To read a page that is not there would make it be there."""
        present = self._present(slot) if slot.anonymous else np.ones(slot.npages, np.bool_)
        for first in range(0, slot.npages, _PIECE):
            here = present[first : first + _PIECE]
            contents = np.zeros((len(here), slot.page_size), np.uint8)
            edges = np.flatnonzero(np.diff(here, prepend=False, append=False))
            for start, end in edges.reshape(-1, 2).tolist():
                _read(fd, slot.host_address + (first + start) * slot.page_size, contents[start:end].reshape(-1))
            yield first, contents


def _read(fd: int, address: int, out: NDArray[np.uint8]) -> None:
    done = 0
    while done < len(out):
        try:
            done += os.preadv(fd, [out[done:]], address + done)  # type: ignore[list-item]  # NumPy's array is a buffer
        except OSError:
            done += PAGE  # not mapped


def no_swap() -> bool:
    """Return whether there is no swap: what was swapped out would be taken for not there."""
    return len(Path("/proc/swaps").read_text(encoding="ascii").splitlines()) <= 1

"""A vCPU's dirty ring, as memory: what is in it, and what has been harvested from it.

An entry is free (flags 0), dirty (the kernel has set its slot and offset, and after them the flag), or harvested (the flag RESET,
which only user space sets and KVM_RESET_DIRTY_RINGS takes back to free once it has protected the page again). The kernel writes
entries in order, and resets them in order up to the first that is not harvested: so they are harvested in order, none left out.

*Read order.* The flag is read before what it publishes. That takes an acquire on most machines and nothing on x86, whose loads are
not reordered with one another; NumPy's passes over the flags and over the entries are separate calls, so no compiler merges them.

*Overflow.* The kernel keeps some entries in reserve above the limit at which a vCPU has to leave the guest. Some hosts run on
far past that limit (seen on one that runs guests without hardware virtualization: up to 450 entries too many), and then the kernel
writes over entries that it has not reset. The pages that were there are lost for the ring: neither known nor protected again.

*How an overflow shows.* Entries are used in order, so the entry before the next one to be harvested is the last of the ring to be
used. While it is free, the kernel has not come round: nothing has been written over since it was last seen free. Where it is not,
something may have been.

*After one* the kernel's place for the next entry is ahead of where its reset has come to, by entries that are free already, for
they were reset once: a gap, for whose reset the kernel waits. How long it is shows when the next entry is written behind it.
"""

from __future__ import annotations

import enum
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.kvm import abi

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

PIECE = 8192
"""Entries to look at together: what NumPy makes of more lies in memory that is new each time, and every page of it is a fault."""
_FIRST_PIECE = 64
# No slot has this id: the kernel skips such an entry, and takes it into no batch with another.
_NO_SLOT = 0xFFFF_FFFF


class Place(enum.Enum):
    """What is known of the kernel's place for its next entry."""

    KNOWN = "known"
    """It is behind the entries that follow one another from the next to be harvested."""
    GAP = "gap"
    """There may be a gap before it. When an entry has been written behind the gap, that is the last one in use."""
    LOST = "lost"
    """The kernel may have come round: it may be behind entries that were written over, and then reset for what was there before."""


class DirtyRing:
    """One ring over its memory, an array of DIRTY_GFN whose length is a power of two. Whoever calls holds mmu_lock.

    ``hold`` keeps the ring's vCPU out of the guest. ``next`` counts the entries that the kernel has reset: the first that it
    has not is at ``next % size``. ``given`` of them are harvested.
    """

    def __init__(self, entries: NDArray[np.void], hold: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        self.size = len(entries)
        self.hold = hold
        self.next = 0
        self.given = 0
        self.place = Place.KNOWN
        self._entries = entries
        self._octets = entries.view(np.uint8).reshape(self.size, abi.DIRTY_GFN.itemsize)
        self._flags: NDArray[np.uint32] = entries["flags"]

    def reaches(self, count: int) -> bool:
        """Return whether at least ``count`` entries wait to be harvested, by one look."""
        return bool(self._flags[(self.next + count - 1) % self.size])

    def came_round(self) -> bool:
        """Return whether the kernel may have come round to the entry at ``next``."""
        return bool(self._flags[(self.next - 1) % self.size])

    def waiting(self) -> int:
        """Return how many entries follow one another from ``next`` on. The cost goes with their number, not with the ring."""
        count, length = 0, _FIRST_PIECE
        while count < self.size:
            start = (self.next + count) % self.size
            flags = self._flags[start : start + min(length, self.size - count)]
            free = np.flatnonzero(flags == 0)
            if len(free):
                return count + int(free[0])
            count, length = count + len(flags), min(2 * length, PIECE)
        return count

    def in_use(self) -> int:
        """Return how many entries from ``next`` on the kernel has in use for sure, those of a gap before others included.

        Only while the vCPU is held.
        """
        if self.came_round():
            return self.size
        used = np.flatnonzero(self._flags_ahead(self.size))
        return int(used[-1]) + 1 if len(used) else 0

    def ahead(self, count: int, start: int = 0) -> NDArray[np.void]:
        """Return a copy of ``count`` entries, from the ``start``-th after ``next`` on."""
        # As plain bytes: NumPy copies structs field by field, which takes fifteen times as long.
        return np.concatenate([self._octets[part] for part in self._parts(count, start)]).view(abi.DIRTY_GFN)[:, 0]

    def fill(self, count: int) -> None:
        """Make dirty entries that hold no page of those of a gap that are among the next ``count``: the kernel has them in use."""
        for part in self._parts(count):
            entries = self._entries[part]
            free = entries["flags"] == 0
            entries["slot"][free] = _NO_SLOT
            entries["flags"][free] = abi.GFN_DIRTY

    def give(self, count: int) -> None:
        """Give the next ``count`` entries, whose pages are marked, to the kernel, to be reset."""
        self.given = count
        for part in self._parts(count):
            self._flags[part] = abi.GFN_RESET

    def taken(self, count: int) -> None:
        """Learn that the kernel has reset so many of the entries that it was given."""
        self.next, self.given = self.next + count, self.given - count

    def take_back(self) -> None:
        """Find out what of the given entries the kernel has reset, and take the rest back.

        After an interrupt only where the kernel has not come round; after a whole account (:meth:`taken`) always.
        """
        left = np.flatnonzero(self._flags_ahead(self.given))
        self.taken(int(left[0]) if len(left) else self.given)
        for part in self._parts(self.given):
            self._flags[part] = abi.GFN_DIRTY
        self.given = 0

    def _flags_ahead(self, count: int) -> NDArray[np.uint32]:
        """Return a copy of the flags of the next ``count`` entries."""
        return np.concatenate([self._flags[part] for part in self._parts(count)])

    def _parts(self, count: int, start: int = 0) -> Iterator[slice]:
        """Yield where ``count`` items lie: in one piece, or in two where the ring ends between them."""
        first = (self.next + start) % self.size
        yield slice(first, min(first + count, self.size))
        if first + count > self.size:
            yield slice(0, first + count - self.size)

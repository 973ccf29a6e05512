"""A vCPU's dirty ring, as memory: what is in it, and what has been harvested from it.

An entry is free (flags 0), dirty (the kernel has set its slot and offset, and after them the flag), or harvested (the flag RESET,
which only user space sets and KVM_RESET_DIRTY_RINGS takes back to free once it has protected the page again). The kernel writes
entries in order, and resets them in order up to the first that is not harvested: so they are harvested in order, none left out.

*Read order.* The flag is read before what it publishes. That takes an acquire on most machines and nothing on x86, whose loads are
not reordered with one another; NumPy's passes over the flags and over the entries are separate calls, so no compiler merges them.

*Overflow.* The kernel keeps some entries in reserve above the limit at which a vCPU has to leave the guest. Some hosts run on
far past that limit (seen on one that runs guests without hardware virtualization: up to 450 entries too many), and then the kernel
writes over entries that nobody has harvested. Those pages are lost for the ring: neither known nor protected again. Such a ring
is one in which no entry is free, which a kernel that keeps its reserve never lets happen. After it the kernel's place of the next
entry is some way ahead of where its own reset has come to, and it waits for the entries in between, which are free already: a gap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dirtylog.kvm import abi

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_FIRST_PROBE = 64


class DirtyRing:
    """One ring over its memory, an array of DIRTY_GFN whose length is a power of two.

    ``fetch`` is the number of entries harvested so far; the next is at ``fetch % size``. Whoever calls holds mmu_lock.
    """

    def __init__(self, entries: NDArray[np.void]) -> None:
        self.size = len(entries)
        self.fetch = 0
        self.overflowed = False
        """Whether entries have been lost, so that there may be a gap of free entries before the next dirty one."""
        self._entries = entries
        self._flags: NDArray[np.uint32] = entries["flags"]

    def reaches(self, count: int) -> bool:
        """Return whether at least ``count`` entries wait to be harvested, by one look."""
        return bool(self._flags[(self.fetch + count - 1) % self.size])

    def waiting(self) -> NDArray[np.void]:
        """Return a copy of the entries that wait to be harvested, in order; after a rewind, those that wait for the reset too.

        After an overflow those of a gap are, too: they hold pages from before, and a page reported again is legal.
        """
        start = 0
        if self.overflowed and not self._flags[self.fetch % self.size]:
            ahead = np.flatnonzero(np.concatenate(list(self._spans(self._flags, self.size))))
            if not len(ahead):
                return self._entries[:0]
            start = int(ahead[0])
        # The flags of more and more entries, until one is free: so the cost goes with what is dirty, not with the ring.
        count = min(start + _FIRST_PROBE, self.size)
        while count < self.size and self._flags[(self.fetch + count - 1) % self.size]:
            count = min(2 * count, self.size)
        flags = np.concatenate(list(self._spans(self._flags, count)))
        free = np.flatnonzero(flags[start:] == 0)
        count = start + int(free[0]) if len(free) else count
        # Over the gap: from here on entries follow one another again. With none free, there is a gap to come.
        self.overflowed = count == self.size or (self.overflowed and not start)
        return self.ahead(count)

    def ahead(self, count: int) -> NDArray[np.void]:
        """Return a copy of the next ``count`` entries, whatever their flags."""
        return np.concatenate(list(self._spans(self._entries, count)))

    def harvest(self, count: int) -> None:
        """Give the next ``count`` entries to the kernel, to be reset. Their pages are marked before.

        In this order, so that an interrupt leaves entries behind ``fetch`` that :meth:`rewind` finds.
        """
        spans = list(self._spans(self._flags, count))
        self.fetch += count
        for span in spans:
            span[:] = abi.GFN_RESET

    def rewind(self) -> bool:
        """Go back to the first entry that the kernel has not reset; return whether it has written over such entries.

        A harvest that was interrupted leaves them with the flag that it gave them, from the first on.
        """
        flags = np.concatenate(list(self._spans(self._flags, self.size)))
        free = np.flatnonzero(flags == 0)
        left = self.size - 1 - int(free[-1]) if len(free) else self.size
        self.fetch -= left
        written_over = left > 0 and not self._flags[self.fetch % self.size] & abi.GFN_RESET
        self.overflowed |= written_over
        return written_over

    def _spans(self, array: NDArray[np.generic], count: int) -> Iterator[NDArray[np.generic]]:
        """Yield views of the next ``count`` items: one, or two where the ring ends between them."""
        start = self.fetch % self.size
        yield array[start : start + count]
        if start + count > self.size:
            yield array[: start + count - self.size]

"""The dirty bitmap that a slot keeps while it is being logged."""

from __future__ import annotations

import numpy as np

from dirtylog.words import DirtyWords, word_count, words_of_range


class SlotBitmap:
    """The current bitmap of a slot, and the snapshot that a get has taken of it and not yet delivered.

    As in KVM the words are allocated twice: the first half is the current bitmap, the second half receives the snapshot, so
    that a get allocates nothing that grows with the slot. Beside each word of the first half stands a flag that the word is
    not zero: a get of a terabyte reads the flags, an eighth of the bitmap, and after that only dirty words.

    The snapshot is recorded before the current words are cleared and stays until :meth:`commit`, so that at every instant
    each bit is in one of the two halves. Whatever ends a get early, an error or a Ctrl-C, :meth:`give_back` merges it again.

    **Every method wants the port's mmu_lock held.** That makes the exchange atomic against every marker.
    """

    def __init__(self, npages: int, *, all_set: bool = False) -> None:
        nwords = word_count(npages)
        storage = np.zeros(2 * nwords, np.uint64)
        self._current = storage[:nwords]
        self._snapshot = storage[nwords:]
        self._flags = np.zeros(nwords, np.bool_)
        self._taken: np.ndarray[tuple[int], np.dtype[np.int64]] | None = None
        # A memoryview reads and writes one word several times as fast as NumPy: this is the miss handler's way in.
        self._current_view = self._current.data
        self._flags_view = self._flags.data
        if all_set:
            self.merge(words_of_range(0, npages))

    def mark(self, page: int) -> None:
        """Set the bit of one page."""
        word = page >> 6
        self._current_view[word] |= 1 << (page & 63)
        self._flags_view[word] = True

    def merge(self, words: DirtyWords) -> None:
        """Set every bit of ``words``."""
        self._current[words.offsets] |= words.values
        self._flags[words.offsets] = True

    def read(self) -> DirtyWords:
        """Return a copy of the non-zero words and change nothing."""
        self.give_back()
        index = np.flatnonzero(self._flags)
        return DirtyWords(index, self._current[index])

    def exchange(self) -> DirtyWords:
        """Take the snapshot of every non-zero word and clear it. The values are good until :meth:`commit`."""
        self.give_back()
        index = np.flatnonzero(self._flags)
        values = self._snapshot[: len(index)]
        self._current.take(index, out=values, mode="clip")
        self._taken = index
        self._current[index] = 0
        self._flags[index] = False
        return DirtyWords(index, values)

    def exchange_masked(self, mask: DirtyWords) -> DirtyWords:
        """Take the snapshot of the set bits that are in ``mask`` too, and clear just those (fetch_andnot in KVM)."""
        self.give_back()
        values = self._current[mask.offsets] & mask.values
        chosen = np.flatnonzero(values)
        index = mask.offsets[chosen]
        snapshot = self._snapshot[: len(index)]
        snapshot[:] = values[chosen]
        self._taken = index
        self._current[index] &= ~snapshot
        self._flags[index] = self._current[index] != 0
        return DirtyWords(index, snapshot)

    def give_back(self) -> None:
        """Merge a snapshot that was not committed into the current bitmap again."""
        if self._taken is not None:
            self.merge(DirtyWords(self._taken, self._snapshot[: len(self._taken)]))
            self._taken = None

    def commit(self) -> None:
        """Forget the snapshot: it has been delivered."""
        self._taken = None

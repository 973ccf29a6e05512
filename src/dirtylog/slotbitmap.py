"""The dirty bitmap that a slot keeps while it is being logged."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

from dirtylog.bitmap import DirtyBitmap
from dirtylog.words import PAGES_PER_WORD, DirtyWords, word_count, words_of_range, words_of_runs

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

S = TypeVar("S")

_WHOLE = slice(None)
_LINE_BYTES = 64
_LINE_WORDS = 8
_ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


class SlotBitmap:
    """The current bitmap of a slot, and the snapshot that a get has taken of it and not yet delivered.

    As in KVM the words are allocated twice: the first half is the current bitmap, the second half receives the snapshot, so
    that a get allocates nothing that grows with the slot. Beside each word of the first half stands a flag that the word is
    not zero: a get of a terabyte reads the flags, an eighth of the bitmap, and after that only dirty words.

    The snapshot is recorded before the current words are cleared and stays until :meth:`commit`, so that at every instant
    each bit is in one of the two halves. Whatever ends a get early, an error or a Ctrl-C, :meth:`give_back` merges it again.

    **Every method but** :meth:`commit` **wants the port's mmu_lock held.** That makes the exchange atomic against every marker. A
    snapshot is its getter's alone, who holds slots_lock until it is committed.
    """

    def __init__(self, npages: int, *, all_set: bool = False) -> None:
        nwords = word_count(npages)
        self._current = np.zeros(nwords, np.uint64)
        self._snapshot = _aligned(nwords)
        self._flags = np.zeros(nwords, np.bool_)
        # Where the words of the snapshot belong: their numbers, or _WHOLE when it has every word. None: no snapshot.
        self._taken: NDArray[np.int64] | slice | None = None
        self._npages = npages
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

    def merge_runs(self, first: NDArray[np.int64], end: NDArray[np.int64]) -> None:
        """Set the bits of runs of pages: ``first`` up to but not ``end``, ascending, none overlapping."""
        # What lacks of each run to 64 pages; those that go on in the next word have their part in the first one here.
        lack, bit = PAGES_PER_WORD - end, first & 63
        lack += first
        longer = np.flatnonzero(lack < bit)
        if len(longer):
            lack[longer] = bit[longer]
        index = first >> 6
        bits = _ALL >> lack.view(np.uint64)
        bits <<= bit.view(np.uint64)
        # Of the words, not of the flags: an interrupt can come between the two, and then the same runs come again.
        if np.count_nonzero(self._current[index]):
            np.bitwise_or.at(self._current, index, bits)
        else:
            # The runs have no bit in common, so that their sum is their union; and to add is several times as fast.
            np.add.at(self._current, index, bits)
        self._flags[index] = True
        if len(longer):
            self.merge(words_of_runs((index[longer] + 1) << 6, end[longer]))

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

    def receive(self, slot: S, fetch: Callable[[S, NDArray[np.uint64]], None]) -> DirtyBitmap:
        """Let ``fetch(slot, words)`` write the whole snapshot, and add what is marked here. Good until :meth:`commit`.

        For a port behind which a kernel keeps the bitmap: here are only the marks of this process. A fetch that is interrupted
        may leave bits of the snapshot before it, which are then reported again.
        """
        self.give_back()
        self._taken = _WHOLE
        # Before the fetch, for nobody marks meanwhile: what comes after a kernel's walk of its tables finds cold caches.
        marked = np.count_nonzero(self._flags)
        fetch(slot, self._snapshot)
        if marked:
            index = np.flatnonzero(self._flags)
            self._snapshot[index] |= self._current[index]
            self._current[index] = 0
            self._flags[index] = False
        return DirtyBitmap.over(self._npages, self._snapshot)

    def merge_all(self, words: NDArray[np.uint64]) -> None:
        """Set every bit of a whole bitmap."""
        self._current |= words
        np.not_equal(self._current, 0, out=self._flags)

    def give_back(self) -> None:
        """Merge a snapshot that was not committed into the current bitmap again."""
        if isinstance(self._taken, slice):
            self.merge_all(self._snapshot)
        elif self._taken is not None:
            self.merge(DirtyWords(self._taken, self._snapshot[: len(self._taken)]))
        self._taken = None

    def commit(self) -> None:
        """Forget the snapshot: it has been delivered."""
        self._taken = None


def _aligned(nwords: int) -> NDArray[np.uint64]:
    """Return words that begin at a cache line.

    A kernel copies whole pages' worth of bitmap to them, and a copy whose destination lies 1 to 31 bytes further on in its page
    than the source in its own takes three times as long on some processors: stores seem to hit what is loaded next.
    """
    words = np.zeros(nwords + _LINE_WORDS, np.uint64)
    start = -words.ctypes.data % _LINE_BYTES // words.itemsize
    return words[start : start + nwords]

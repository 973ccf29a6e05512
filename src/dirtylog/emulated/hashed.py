"""A hashed page table: groups of eight entries of two words each, found by a hash of the page, or by its complement."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

GROUP = 8


class HashedTable:
    """Entries of two big-endian words; the first identifies the page and says whether it is valid. Guard it with mmu_lock.

    ``tag(gfn)`` gives the first word of a page's entry in its primary group, ``hash_of(gfn)`` its hash; ``secondary`` is the
    bit that marks an entry in the other group. ``frames[i]`` is the frame that entry ``i`` maps, -1 for none: the reverse map.
    """

    def __init__(
        self, word_bytes: int, ngroups: int, *, tag: Callable[[int], int], hash_of: Callable[[int], int], secondary: int
    ) -> None:
        self.word_bytes = word_bytes
        self._tag, self._hash_of, self._secondary = tag, hash_of, secondary
        letter = {4: "I", 8: "Q"}[word_bytes]
        self._word_codec = struct.Struct(f">{letter}")
        self.entry_bytes = 2 * word_bytes
        self.group_bytes = GROUP * self.entry_bytes
        self._allocate(ngroups)

    def _allocate(self, ngroups: int) -> None:
        self.ngroups = ngroups
        self._secondary_used = False
        self.buffer = bytearray(ngroups * self.group_bytes)  # of all types it has the fastest search
        self.octets = np.frombuffer(self.buffer, np.uint8)
        self.words = self.octets.view(f">u{self.word_bytes}").reshape(-1, 2)
        self.frames = np.full(ngroups * GROUP, -1, np.int64)
        self._frames_view = self.frames.data

    def primary(self, gfn: int) -> tuple[int, int]:
        """Return (group, first word) of a page's entry in its primary group."""
        return self._hash_of(gfn) & self.ngroups - 1, self._tag(gfn)

    def find(self, gfn: int) -> tuple[int, int] | None:
        """Return (entry number, second word) of the valid entry of a page, as the hardware searches for it."""
        tag, group = self._tag(gfn), self._hash_of(gfn) & self.ngroups - 1
        place = self._place(group, tag)
        if place is None:
            if not self._secondary_used:  # the hardware would look all the same; this finds as little, sooner
                return None
            tag, group = tag | self._secondary, group ^ self.ngroups - 1
            place = self._place(group, tag)
            if place is None:
                return None
        entry = group * GROUP + place
        return entry, self._word_codec.unpack_from(self.buffer, entry * self.entry_bytes + self.word_bytes)[0]

    def _place(self, group: int, first_word: int) -> int | None:
        """Return the place in a group of an entry with this first word. The search in bytes is the fastest that Python has."""
        start = group * self.group_bytes
        end = start + self.group_bytes
        wanted = self._word_codec.pack(first_word)
        found = self.buffer.find(wanted, start, end)
        while found >= 0:
            if not found % self.entry_bytes:
                return (found - start) // self.entry_bytes
            found = self.buffer.find(wanted, found + 1, end)
        return None

    def set_second(self, entry: int, word: int) -> None:
        """Write the second word of an entry."""
        self._word_codec.pack_into(self.buffer, entry * self.entry_bytes + self.word_bytes, word)

    def insert(self, gfn: int, second: int) -> int | None:
        """Make a valid entry in a free place and return its number, or None if both groups are full."""
        tag, group = self._tag(gfn), self._hash_of(gfn) & self.ngroups - 1
        place = self._place(group, 0)
        if place is None:
            self._secondary_used = True
            tag, group = tag | self._secondary, group ^ self.ngroups - 1
            place = self._place(group, 0)
            if place is None:
                return None
        entry = group * GROUP + place
        self.write(entry, gfn, tag, second)
        return entry

    def write(self, entry: int, gfn: int, tag: int, second: int) -> None:
        """Make ``entry`` the valid entry of a page; the second word is written before the one that makes it valid."""
        self.set_second(entry, second)
        self._word_codec.pack_into(self.buffer, entry * self.entry_bytes, tag)
        self._frames_view[entry] = gfn

    def invalidate(self, entries: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        """Make these entries free."""
        self.words[entries] = 0
        self.frames[entries] = -1

    def clear(self) -> None:
        """Make every entry free."""
        self.octets[:] = 0
        self.frames[:] = -1

    def of_range(self, base_gfn: int, npages: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return the numbers of the entries that map a page of a range."""
        # One comparison does for both ends: what lies before the range wraps to a large number.
        return np.flatnonzero((self.frames - base_gfn).view(np.uint64) < npages)

    def grow(self) -> None:
        """Double the table, keeping every entry's second word."""
        frames, words = self.frames, self.words
        used = np.flatnonzero(frames >= 0)
        ngroups = self.ngroups
        placed = False
        while not placed:
            ngroups *= 2
            self._allocate(ngroups)
            pairs = zip(frames[used].tolist(), words[used, 1].tolist(), strict=True)
            placed = all(self.insert(gfn, second) is not None for gfn, second in pairs)

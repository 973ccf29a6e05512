"""A set of pages of one slot, in KVM's layout.

Page ``p`` is bit ``p % 64`` of 64-bit word ``p // 64`` (Documentation/virt/kvm/api.rst, KVM_GET_DIRTY_LOG), and a bitmap of
``npages`` pages has ``ceil(npages / 64)`` words; the bits past ``npages`` are never set.

A fresh bitmap holds only its non-zero words, so that what a get returns for a terabyte of mostly clean memory costs what is
dirty. The first use of :attr:`DirtyBitmap.words` lays all words out, and from then on they are the truth.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

import numpy as np

from dirtylog.errors import InvalidArgumentError
from dirtylog.words import LITTLE_ENDIAN, PAGES_PER_WORD, DirtyWords, word_count, words_of_pages, words_of_range

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_WORD_BYTES = 8
_ONE = np.uint64(1)
_TOP = np.uint64(63)
_NOTHING = DirtyWords(np.empty(0, np.int64), np.empty(0, np.uint64))
# A bitmap keeps only its non-zero words while they are fewer than one in so many.
_SPARSE = 8
# Up to so many words it is not worth to look for the zeros.
_SMALL = 512


class DirtyBitmap:
    """A set of page offsets ``0 <= page < npages``.

    ``|``, ``&``, ``-``, ``==`` and ``|=`` take a bitmap of the same length; any other length is an
    :class:`InvalidArgumentError`. A bitmap is true when it has a page. It is not hashable,
    and not safe to change from two threads at once.
    """

    __hash__ = None  # type: ignore[assignment]  # mutable, and typeshed has no other way to say so
    __slots__ = ("_sparse", "_words", "npages")

    def __init__(self, npages: int) -> None:
        npages = operator.index(npages)
        if npages < 0:
            raise InvalidArgumentError(f"a bitmap of {npages} pages: the length must not be negative")
        self.npages = npages
        self._words: NDArray[np.uint64] | None = None
        self._sparse = _NOTHING

    # --- construction and conversion

    @classmethod
    def from_pages(cls, npages: int, pages: ArrayLike | Iterable[int]) -> Self:
        """Return a bitmap of ``npages`` pages in which ``pages`` are set; any order, repeats allowed."""
        bitmap = cls(npages)
        bitmap.set_pages(pages)
        return bitmap

    @classmethod
    def from_words(cls, npages: int, words: DirtyWords) -> Self:
        """Return a bitmap with these non-zero words. The arrays are kept, not copied: give them away."""
        bitmap = cls(npages)
        bitmap._sparse = words
        return bitmap

    @classmethod
    def over(cls, npages: int, words: NDArray[np.uint64]) -> Self:
        """Return a bitmap over all its words, uint64[ceil(npages / 64)], which are not copied unless few of them are not zero."""
        bitmap = cls(npages)
        if len(words) <= _SMALL or (nonzero := np.count_nonzero(words)) * _SPARSE >= len(words):
            bitmap._words = words
        elif nonzero:
            bitmap._sparse = _nonzero_of(words)
        return bitmap

    @classmethod
    def from_bytes(cls, npages: int, data: bytes | bytearray | memoryview) -> Self:
        """Return a copy of a bitmap in KVM's format: little-endian words, ``8 * ceil(npages / 64)`` bytes.

        A wrong length, or a bit past ``npages``, is an :class:`InvalidArgumentError`.
        """
        bitmap = cls(npages)
        try:
            octets = np.frombuffer(data, np.uint8)
        except BufferError as error:
            raise InvalidArgumentError("a bitmap's bytes must lie one after the other", reason=str(error)) from error
        wanted = word_count(npages) * _WORD_BYTES
        if len(octets) != wanted:
            raise InvalidArgumentError(
                f"a bitmap of {npages} pages has {wanted} bytes (whole 64-bit words), but {len(octets)} were given"
            )
        words = octets.view(LITTLE_ENDIAN).astype(np.uint64)
        if npages % PAGES_PER_WORD and words[-1] >> np.uint64(npages % PAGES_PER_WORD):
            raise InvalidArgumentError(f"bits past the end: page {npages} or later is set, but the bitmap has {npages} pages")
        bitmap._words = words
        return bitmap

    def to_bytes(self) -> bytes:
        """Return the bitmap in KVM's format: little-endian words, ``8 * ceil(npages / 64)`` bytes."""
        words = self._words
        if words is None:
            words = np.zeros(word_count(self.npages), np.uint64)
            words[self._sparse.offsets] = self._sparse.values
        return words.astype(LITTLE_ENDIAN).tobytes()

    def copy(self) -> DirtyBitmap:
        """Return an independent copy."""
        twin = DirtyBitmap(self.npages)
        if self._words is not None:
            twin._words = self._words.copy()
        else:
            twin._sparse = DirtyWords(self._sparse.offsets.copy(), self._sparse.values.copy())
        return twin

    @property
    def words(self) -> NDArray[np.uint64]:
        """All words, uint64[ceil(npages / 64)], in native byte order; a view: what is written to it is in the bitmap.

        The first use allocates them, which costs 1/8 byte a page. Bits past ``npages`` must stay 0.
        """
        if self._words is None:
            words = np.zeros(word_count(self.npages), np.uint64)
            words[self._sparse.offsets] = self._sparse.values
            self._words = words
        return self._words

    def nonzero_words(self) -> DirtyWords:
        """Return the non-zero words. Do not write to the arrays: they may be the bitmap's own."""
        if self._words is None:
            return self._sparse
        return _nonzero_of(self._words)

    # --- questions

    def count(self) -> int:
        """Return the number of set pages."""
        values = self._sparse.values if self._words is None else self._words
        return int(np.bitwise_count(values).sum(dtype=np.int64))

    def any(self) -> bool:
        """Return whether any page is set."""
        return bool(len(self._sparse.offsets)) if self._words is None else bool(self._words.any())

    def pages(self) -> NDArray[np.int64]:
        """Return the offsets of the set pages, ascending.

        Shape ``(count(),)``, in pages from the slot's first page. Costs one pass over the words (none for a bitmap fresh
        from a get) plus the dirty words' bits. The array is fresh; changing it does not change the bitmap.
        """
        return self.nonzero_words().pages()

    def runs(self) -> NDArray[np.int64]:
        """Return the maximal runs of set pages as rows of (first page, number of pages), ascending.

        Shape ``(m, 2)``. Costs the same as :meth:`pages` but grows with the number of runs, not of pages.
        """
        index, values = self.nonzero_words()
        follows = np.zeros(len(index), np.bool_)
        np.equal(index[1:], index[:-1] + 1, out=follows[1:])
        before = np.zeros(len(index), np.uint64)
        before[1:] = (values[:-1] >> _TOP) * follows[1:]
        after = np.zeros(len(index), np.uint64)
        after[:-1] = (values[1:] & _ONE) * follows[1:]
        first = _nonzero(index, values & ~((values << _ONE) | before)).pages()
        last = _nonzero(index, values & ~((values >> _ONE) | (after << _TOP))).pages()
        return np.stack((first, last - first + 1), axis=1)

    def __contains__(self, page: object) -> bool:
        if not isinstance(page, (int, np.integer)) or not 0 <= page < self.npages:
            return False
        word = self._at(np.array([int(page) >> 6]))[0]
        return bool(word >> np.uint64(int(page) & 63) & _ONE)

    def __bool__(self) -> bool:
        return self.any()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DirtyBitmap):
            return NotImplemented
        if self.npages != other.npages:
            return False
        (index, values), (other_index, other_values) = self.nonzero_words(), other.nonzero_words()
        return np.array_equal(index, other_index) and np.array_equal(values, other_values)

    # --- changes

    def set_pages(self, pages: ArrayLike | Iterable[int]) -> None:
        """Set ``pages``; any order, repeats allowed. One out of range is an :class:`InvalidArgumentError`, and nothing changes."""
        self.set_words(words_of_pages(checked_pages(pages, self.npages)))

    def set_range(self, first: int, npages: int) -> None:
        """Set the pages ``first`` to ``first + npages - 1``, all within the bitmap."""
        first, npages = operator.index(first), operator.index(npages)
        if not (0 <= first <= self.npages and 0 <= npages <= self.npages - first):
            raise InvalidArgumentError(
                f"the range of {npages} pages from page {first} does not lie within a bitmap of {self.npages} pages"
            )
        self.set_words(words_of_range(first, npages))

    def set_words(self, words: DirtyWords) -> None:
        """Set every bit of ``words``."""
        if not words:
            return
        if self._words is not None:
            self._words[words.offsets] |= words.values
        elif not self._sparse:
            self._sparse = DirtyWords(words.offsets.copy(), words.values.copy())
        else:
            # Two ascending rows: a stable sort merges them, where union1d takes twenty times as long.
            index = np.sort(np.concatenate((self._sparse.offsets, words.offsets)), kind="stable")
            index = index[np.concatenate(([True], index[1:] != index[:-1]))]
            values = self._at(index)
            values[np.searchsorted(index, words.offsets)] |= words.values
            self._sparse = DirtyWords(index, values)

    def assign(self, other: DirtyBitmap) -> None:
        """Become equal to ``other``, of the same length. Where :attr:`words` is laid out, it is written in place."""
        if other is not self:
            self.clear()
            self |= other

    def clear(self) -> None:
        """Unset every page."""
        self._sparse = _NOTHING
        if self._words is not None:
            self._words[:] = 0

    def __ior__(self, other: DirtyBitmap) -> Self:
        self._check_length(other)
        if other._words is None:
            self.set_words(other._sparse)
        elif self._words is not None:
            self._words |= other._words
        else:
            mine, self._words = self._sparse, other._words.copy()
            if mine:
                self._words[mine.offsets] |= mine.values
        return self

    def __or__(self, other: DirtyBitmap) -> DirtyBitmap:
        union = self.copy()
        union |= other
        return union

    def __and__(self, other: DirtyBitmap) -> DirtyBitmap:
        self._check_length(other)
        index, values = self.nonzero_words()
        return DirtyBitmap.from_words(self.npages, _nonzero(index, values & other._at(index)))

    def __sub__(self, other: DirtyBitmap) -> DirtyBitmap:
        self._check_length(other)
        index, values = self.nonzero_words()
        return DirtyBitmap.from_words(self.npages, _nonzero(index.copy(), values & ~other._at(index)))

    def __repr__(self) -> str:
        return f"DirtyBitmap(npages={self.npages}, dirty={self.count()})"

    def _at(self, index: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return the words at ``index``, a fresh array."""
        if self._words is not None:
            return self._words[index]
        own_index, own_values = self._sparse
        values = np.zeros(len(index), np.uint64)
        if len(own_index):
            place = np.minimum(np.searchsorted(own_index, index), len(own_index) - 1)
            here = own_index[place] == index
            values[here] = own_values[place[here]]
        return values

    def _check_length(self, other: DirtyBitmap) -> None:
        if self.npages != other.npages:
            raise InvalidArgumentError(f"bitmaps of {self.npages} and of {other.npages} pages: the lengths must be equal")


def checked_pages(pages: ArrayLike | Iterable[int], npages: int) -> NDArray[np.int64]:
    """Return ``pages`` as int64[k], every one within a slot of ``npages`` pages, or raise :class:`InvalidArgumentError`."""
    rows = list(pages) if isinstance(pages, Iterable) and not isinstance(pages, np.ndarray) else pages
    try:
        array = np.asarray(rows)
    except ValueError as error:
        raise InvalidArgumentError("pages must be one row of integers", reason=str(error)) from error
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidArgumentError(f"pages must be one row of integers, not {array.dtype} of shape {array.shape}")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= npages:
        raise InvalidArgumentError(f"page {low if low < 0 else high} is out of range: the pages are 0 to {npages - 1}")
    return array.astype(np.int64, copy=False)


def _nonzero_of(words: NDArray[np.uint64]) -> DirtyWords:
    # Comparing first is three times as fast as flatnonzero on integers.
    index = np.flatnonzero(words != 0)
    return DirtyWords(index, words[index])


def _nonzero(index: NDArray[np.int64], values: NDArray[np.uint64]) -> DirtyWords:
    keep = values != 0
    return DirtyWords(index[keep], values[keep])

"""D(t): how much memory is written at least once within a time t. docs/rate.md has the formulas.

One log in rounds gives D at 1, 2, 4, 8, ... rounds at once. Round ``r`` finds a page dirty that was dirty in round ``p`` before. In
a window of ``2**k`` rounds that begins at a multiple of that, the page is new in round ``r`` if ``p`` lies before the window: if
``p >> k != r >> k``, which is to say that ``p ^ r`` has more than ``k`` bits. So one number for a page in a round, the bits of
``p ^ r``, says for every such window whether the page counts: no window keeps a set of pages of its own.

How D runs between these windows is known from the gaps ``r - p``. Of all windows of ``w`` rounds, ``r - p - w`` lie in a gap and
lack the page. Others lie before its first round or after its last: it is taken that these are as many as those.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from dirtylog.bitmap import DirtyBitmap
    from dirtylog.memslot import MemorySlot

# Rounds are numbered from here, so that a page never seen before, whose last round is 0, differs from every round in this bit.
_FIRST_ROUND = 1 << 31
_NEW = 32
_GAP_SHIFT = 19
_GAP_BASE = 127 << 4
_GAP_CLASSES = 32 << 4
"""A gap's class is the exponent of its float32 and four bits of the fraction: sixteen to an octave. Short gaps have one each."""
_TENTHS = (0.1, 0.9)
_CHUNK_BITS = 12
"""Last rounds are kept for 4096 pages at once, where one of them was ever dirty."""


@dataclass(frozen=True, slots=True)
class Curve:
    """D(t) at some times, ascending.

    ``seconds`` is float64[k], ``nbytes`` float64[k] the mean of D over ``windows``, int64[k], that do not overlap, and ``error``
    float64[k] the standard error of that mean, NaN of a single window. ``capacity`` is the size of the memory in bytes.
    ``tenths``, float64[2, k], are what a tenth of the windows does not reach, and what a tenth exceeds. ``shape``, float64[2, m],
    has more times, and how D grows from one to the next. Either is None where only the means are known.
    """

    seconds: NDArray[np.float64]
    nbytes: NDArray[np.float64]
    error: NDArray[np.float64]
    windows: NDArray[np.int64]
    capacity: int
    tenths: NDArray[np.float64] | None = None
    shape: NDArray[np.float64] | None = None

    def at(self, seconds: float) -> float:
        """Return D(t) in bytes: between the times measured by ``shape``, or a power law; beyond them by that of the two nearest."""
        if not len(self.seconds) or seconds <= 0:
            return 0.0
        if len(self.seconds) == 1:
            return min(float(self.nbytes[0] * seconds / self.seconds[0]), float(self.capacity))
        after = int(np.clip(np.searchsorted(self.seconds, seconds), 1, len(self.seconds) - 1))
        (time0, time1), (low, high) = self.seconds[after - 1 : after + 1], self.nbytes[after - 1 : after + 1]
        if self.shape is not None and time0 < seconds < time1:
            before, here, behind = np.interp((time0, seconds, time1), *self.shape)
            if before < behind:
                return min(float(low + (high - low) * (here - before) / (behind - before)), float(self.capacity))
        if low <= 0:
            # No power law begins at nothing: in proportion to the time.
            value = high * max(0.0, seconds - time0) / (time1 - time0)
        else:
            # A set of pages does not shrink, and does not grow faster than time.
            power = min(1.0, max(0.0, float(np.log(high / low) / np.log(time1 / time0))))
            value = low * (seconds / time0) ** power
        return min(float(value), float(self.capacity))

    def rate(self, seconds: float) -> float:
        """Return the dirty rate as a window of this length measures it, in bytes a second: D(t) / t."""
        return self.at(seconds) / seconds

    def bounds(self) -> tuple[Curve, Curve]:
        """Return the curves of the quieter windows and of the busier: of ten, one each is quieter still and busier still.

        The mean says what comes on average. What begins at some time may find the memory written as in either of these.
        """
        if self.tenths is None:
            return self, self
        low, high = (replace(self, nbytes=np.maximum.accumulate(nbytes)) for nbytes in self.tenths)
        return low, high

    def shifted(self, errors: float) -> Curve:
        """Return the curve so many standard errors higher."""
        moved = np.maximum(self.nbytes + errors * np.nan_to_num(self.error), 0)
        return replace(self, nbytes=np.maximum.accumulate(moved))


class Footprint:
    """Gathers D(t) from a log in rounds; it costs 4 bytes a page that was ever dirty, in chunks of 4096."""

    def __init__(self) -> None:
        self._base: dict[MemorySlot, int] = {}
        self._end = 0
        self._row_of = np.empty(0, np.int64)
        self._rows = 0
        self._last = np.empty(0, np.uint32)
        self._seconds: list[float] = []
        self._bytes: list[NDArray[np.int64]] = []
        # By class of gap, with those before the first rounds: bytes, and bytes times gap.
        self._gaps = np.zeros((2, _GAP_CLASSES))
        self.nbytes = 0
        """Distinct bytes written since the first round: the working set."""

    def add(self, seconds: float, dirty: Mapping[MemorySlot, DirtyBitmap]) -> None:
        """Add a round that gathered writes for so long."""
        bases = {slot: self.base_of(slot) for slot in dirty}
        pages = {slot: bitmap.pages() for slot, bitmap in dirty.items() if bitmap}
        found = [bases[slot] + offsets for slot, offsets in pages.items()]
        sizes = {slot.page_size for slot in pages}
        if len(sizes) < 2:  # noqa: PLR2004 - one size for all, as nearly always
            self.add_pages(seconds, np.concatenate(found) if found else np.empty(0, np.int64), sizes.pop() if sizes else 0)
            return
        weights = np.repeat([slot.page_size for slot in pages], [len(offsets) for offsets in pages.values()])
        self.add_pages(seconds, np.concatenate(found), weights)

    def base_of(self, slot: MemorySlot) -> int:
        """Return where the slot's pages begin among those of all slots, one after the other."""
        base = self._base.get(slot)
        if base is None:
            base = self._base[slot] = self._end
            self._end += slot.npages
            chunks = (self._end >> _CHUNK_BITS) + 1
            if chunks > len(self._row_of):
                grown = np.full(max(chunks, 2 * len(self._row_of)), -1, np.int64)
                grown[: len(self._row_of)] = self._row_of
                self._row_of = grown
        return base

    def add_pages(self, seconds: float, pages: NDArray[np.int64], page_size: int | NDArray[np.int64]) -> None:
        """Add a round by its pages, int64[k], numbered from :meth:`base_of`, all of one size in bytes or each of its own."""
        number = np.uint32(_FIRST_ROUND + len(self._seconds))
        places = self._places(pages)
        last = self._last[places]
        self._last[places] = number
        bits = np.frexp(number ^ last)[1]
        gaps = (number - np.maximum(last, _FIRST_ROUND - 1)).astype(np.float32)
        classes = _class_of(gaps)
        if isinstance(page_size, int):
            nbytes = np.bincount(bits, minlength=_NEW + 1) * page_size
            self._gaps[0] += np.bincount(classes, minlength=_GAP_CLASSES) * page_size
            self._gaps[1] += np.bincount(classes, gaps, minlength=_GAP_CLASSES) * page_size
        else:
            nbytes = np.bincount(bits, page_size, minlength=_NEW + 1).astype(np.int64)
            self._gaps[0] += np.bincount(classes, page_size, minlength=_GAP_CLASSES)
            self._gaps[1] += np.bincount(classes, gaps * page_size, minlength=_GAP_CLASSES)
        self._bytes.append(nbytes)
        self._seconds.append(seconds)
        self.nbytes += int(nbytes[_NEW])

    def _places(self, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the last rounds of pages are kept, and make room for those of chunks never met."""
        chunks = pages >> _CHUNK_BITS
        rows = self._row_of[chunks]
        if len(rows) and rows.min() < 0:
            fresh = np.unique(chunks[rows < 0])
            self._row_of[fresh] = np.arange(self._rows, self._rows + len(fresh))
            self._rows += len(fresh)
            if self._rows << _CHUNK_BITS > len(self._last):
                grown = np.zeros(max(self._rows << _CHUNK_BITS, 2 * len(self._last)), np.uint32)
                grown[: len(self._last)] = self._last
                self._last = grown
            rows = self._row_of[chunks]
        return np.asarray((rows << _CHUNK_BITS) + (pages & ((1 << _CHUNK_BITS) - 1)))

    def curve(self, capacity: int | None = None) -> Curve:
        """Return D(t) at 1, 2, 4, ... rounds and at all of them. ``capacity`` is the memory's size; by default the slots' met."""
        count = len(self._seconds)
        seconds = np.array(self._seconds)
        # [r, k]: what round r has that is new in its window of 2**k rounds; the last column: what was never there before.
        new = np.cumsum(np.array(self._bytes, np.int64).reshape(count, _NEW + 1)[:, ::-1], axis=1)[:, -2::-1]
        points: list[tuple[float, ...]] = []
        for scale in range(count.bit_length()):
            windows, length = count >> scale, 1 << scale
            found = new[: windows * length, scale].reshape(windows, length).sum(axis=1)
            error = float(found.std(ddof=1)) / windows**0.5 if windows > 1 else np.nan
            mean_length = float(seconds[: windows * length].sum()) / windows
            points.append((mean_length, float(found.mean()), error, windows, *np.quantile(found, _TENTHS).tolist()))
        if count & (count - 1):
            points.append((float(seconds.sum()), float(self.nbytes), np.nan, 1, float(self.nbytes), float(self.nbytes)))
        times, means, errors, windows_of, *tenths = np.array(points).reshape(-1, 4 + len(_TENTHS)).T
        size = sum(slot.nbytes for slot in self._base) if capacity is None else capacity
        # Windows of different lengths are not the same writes: a longer one may hold less by chance.
        means = np.maximum.accumulate(means)
        return Curve(times, means, errors, windows_of.astype(np.int64), size, np.array(tenths), self._shape())

    def _shape(self) -> NDArray[np.float64]:
        """Return the mean of D over all windows, at as many lengths as there are classes of gaps, up to all rounds."""
        count = len(self._seconds)
        firsts = np.arange(1, count + 1, dtype=np.float32)
        new = np.array([nbytes[_NEW] for nbytes in self._bytes], np.float64)
        nbytes = self._gaps[0] + np.bincount(_class_of(firsts), new, minlength=_GAP_CLASSES)
        sums = self._gaps[1] + np.bincount(_class_of(firsts), new * firsts, minlength=_GAP_CLASSES)
        # A class begins at the gap whose float32 its number is.
        length = ((np.arange(_GAP_CLASSES, dtype=np.int32) + _GAP_BASE) << _GAP_SHIFT).view(np.float32).astype(np.float64)
        lacking = np.cumsum(sums[::-1])[::-1] - length * np.cumsum(nbytes[::-1])[::-1]
        inside = length <= count
        mean = self.nbytes - lacking[inside] / (count + 1 - length[inside])
        return np.stack((length[inside] * sum(self._seconds) / max(1, count), np.maximum.accumulate(mean)))


def _class_of(gaps: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return the class of each gap."""
    return (gaps.view(np.int32) >> _GAP_SHIFT) - _GAP_BASE

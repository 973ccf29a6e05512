"""How runs of pages are packed: unsigned LEB128 numbers, deflated; docs/recording.md describes the format.

A round is a row of numbers: for each slot its number in the file and how many runs it has; then of every run the gap to the end of
the one before in its slot; then of every run its length less one. The lengths stand together since most are equal.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dirtylog import varint
from dirtylog.errors import CorruptDataError
from dirtylog.words import pages_of_runs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

_LEVEL = 1


class Runs(NamedTuple):
    """Runs of pages, by columns of equal length: int64 each. ``round`` and ``slot`` are numbers in the file."""

    round: NDArray[np.int64]
    slot: NDArray[np.int64]
    first: NDArray[np.int64]
    npages: NDArray[np.int64]


class Packed(NamedTuple):
    """A packed round."""

    slots: int
    runs: int
    data: bytes


def pack(slots: Mapping[int, NDArray[np.int64]]) -> Packed:
    """Pack the runs of a round: by number of the slot, rows of (first page, number of pages), ascending."""
    rows = np.concatenate(list(slots.values())) if slots else np.empty((0, 2), np.int64)
    ends = rows.sum(axis=1)
    gaps = rows[:, 0].copy()
    gaps[1:] -= ends[:-1]
    counts = [len(one) for one in slots.values()]
    # Where a slot begins nothing came before.
    begins = np.cumsum([0, *counts])[:-1]
    gaps[begins] = rows[begins, 0]
    head = np.array(list(zip(slots, counts, strict=True)), np.int64).reshape(-1)
    numbers = np.concatenate((head, gaps, rows[:, 1] - 1))
    return Packed(len(slots), len(rows), zlib.compress(varint.encode(numbers), _LEVEL))


def unpack(rounds: NDArray[np.int64], packed: Sequence[Packed]) -> Runs:
    """Unpack many rounds at once; ``rounds`` are their numbers. :class:`CorruptDataError` if they cannot be what was packed."""
    slots = np.array([one.slots for one in packed], np.int64)
    runs = np.array([one.runs for one in packed], np.int64)
    lengths = 2 * (slots + runs)
    numbers = varint.decode(b"".join(_inflate(one, length) for one, length in zip(packed, lengths.tolist(), strict=True)))
    if len(numbers) != lengths.sum():
        raise CorruptDataError(f"a round of this recording has {len(numbers)} numbers where {lengths.sum()} are due")
    begins = np.cumsum(lengths) - lengths
    heads = pages_of_runs(begins, 2 * slots).reshape(-1, 2)
    numbers_of_slots, counts = numbers[heads[:, 0]], numbers[heads[:, 1]]
    # Of hostile numbers the sum may wrap: each is looked at first.
    if counts.max(initial=0) > runs.max(initial=0) or not np.array_equal(_sums(counts, slots), runs):
        raise CorruptDataError("the slots of a round have other runs than the round")
    gaps = numbers[pages_of_runs(begins + 2 * slots, runs)]
    npages = numbers[pages_of_runs(begins + 2 * slots + runs, runs)] + 1
    ends = np.cumsum(gaps + npages)
    # The sum goes on from slot to slot: less what it was where the slot begins.
    before = np.concatenate(([0], ends))[np.cumsum(counts) - counts]
    first = ends - npages - np.repeat(before, counts)
    return Runs(np.repeat(rounds, runs), np.repeat(numbers_of_slots, counts), first, npages)


def _sums(values: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sums of stretches of ``values`` that are so long."""
    ends = np.concatenate(([0], np.cumsum(values)))
    stops = np.cumsum(lengths)
    return np.asarray(ends[stops] - ends[stops - lengths])


def _inflate(packed: Packed, length: int) -> bytes:
    """Return the numbers' octets, and no more than so many numbers can have."""
    stream = zlib.decompressobj()
    try:
        data = stream.decompress(packed.data, varint.LONGEST * length + 1)
    except zlib.error as error:
        raise CorruptDataError("a round of this recording does not inflate", reason=str(error)) from error
    if not stream.eof:
        raise CorruptDataError("a round of this recording is longer than it says, or ends early")
    return data

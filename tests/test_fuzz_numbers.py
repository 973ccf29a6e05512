"""Packed numbers, runs of rounds and maps of pages: any octets are numbers, or are told to be damaged."""

from __future__ import annotations

import zlib

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from dirtylog import CorruptDataError, varint
from dirtylog.checkpoint import pages
from dirtylog.recording import runs
from test_fuzz_bounds import FUZZED, MIB, bounded

numbers = st.lists(st.integers(0, 9) | st.integers(0, (1 << 63) - 1), max_size=40)


@FUZZED
@given(st.binary(max_size=200))
@example(b"\x80" * 9 + b"\x01")
@example(b"\xff" * 8 + b"\x7f")
def test_octets_are_numbers_or_damaged(data: bytes) -> None:
    with bounded(MIB):
        try:
            found = varint.decode(data)
        except CorruptDataError:
            return
    assert found.min(initial=0) >= 0
    assert np.array_equal(varint.decode(varint.encode(found)), found)


@FUZZED
@given(numbers)
def test_numbers_come_back(values: list[int]) -> None:
    assert varint.decode(varint.encode(np.array(values, np.int64))).tolist() == values


@FUZZED
@given(numbers)
@example([1, 0, 1, 0, (1 << 63) - 1, 0])
@example([1, 0, 1 << 62, 0, 0, 0])
@example([3, 0, 0])
def test_numbers_are_a_map_of_pages_or_damaged(values: list[int]) -> None:
    with bounded(MIB):
        try:
            maps = pages.unpack(zlib.compress(varint.encode(np.array(values, np.int64))))
        except CorruptDataError:
            return
    assert sum(2 + 3 * len(one.first) for one in maps.values()) <= max(0, len(values) - 1)


@FUZZED
@given(numbers, st.integers(0, 5), st.integers(0, 1 << 40) | st.integers(0, 9))
@example([0, 1, 5, 0], 1, 1)
@example([0, (1 << 63) - 1, 5, 0], 1, 1)
def test_numbers_are_a_round_or_damaged(values: list[int], slots: int, count: int) -> None:
    packed = runs.Packed(slots, count, zlib.compress(varint.encode(np.array(values, np.int64))))
    with bounded(MIB):
        try:
            found = runs.unpack(np.array([7]), [packed])
        except CorruptDataError:
            return
    assert len(found.first) == len(found.slot) == count

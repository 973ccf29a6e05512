"""The packing of runs: every round comes back, and what was not packed is told from it, within bounds."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtylog import CorruptDataError, DirtyBitmap
from dirtylog.recording.runs import Packed, pack, unpack

if TYPE_CHECKING:
    from numpy.typing import NDArray

LAST = (1 << 31) - 2


@st.composite
def runs_of_a_slot(draw: st.DrawFn) -> NDArray[np.int64]:
    edges = sorted(draw(st.sets(st.integers(0, LAST + 1) | st.integers(0, 300), min_size=2, max_size=20)))
    return np.array([(edges[at], edges[at + 1] - edges[at]) for at in range(0, len(edges) - 1, 2)], np.int64).reshape(-1, 2)


rounds_of_runs = st.lists(st.dictionaries(st.integers(0, 5000), runs_of_a_slot(), max_size=4), max_size=6)


@given(rounds_of_runs)
def test_rounds_come_back_as_they_were_packed(rounds: list[dict[int, NDArray[np.int64]]]) -> None:
    found = unpack(np.arange(10, 10 + len(rounds)), [pack(slots) for slots in rounds])
    expected = [
        (number, slot, first, npages)
        for number, slots in enumerate(rounds, 10)
        for slot, rows in slots.items()
        for first, npages in rows.tolist()
    ]
    assert list(zip(*(column.tolist() for column in found), strict=True)) == expected


@given(rounds_of_runs.filter(any), st.data())
def test_a_changed_octet_is_noticed_or_gives_runs_of_that_many(
    rounds: list[dict[int, NDArray[np.int64]]], data: st.DataObject
) -> None:
    packed = [pack(slots) for slots in rounds]
    which = data.draw(st.sampled_from([index for index, slots in enumerate(rounds) if slots]))
    numbers = bytearray(zlib.decompress(packed[which].data))
    at = data.draw(st.integers(0, len(numbers) - 1))
    numbers[at] ^= data.draw(st.integers(1, 255))
    packed[which] = packed[which]._replace(data=zlib.compress(bytes(numbers)))
    try:
        found = unpack(np.arange(len(rounds)), packed)
    except CorruptDataError:
        return
    assert len(found.first) == sum(one.runs for one in packed)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "ends early"),
        (b"no deflate", "does not inflate"),
        (zlib.compress(b"\0" * 1000), "longer than it says"),
        (zlib.compress(b"\0\1\5"), "numbers where"),
        (zlib.compress(b"\0\1\5\x80"), "end early"),
        (zlib.compress(b"\0\2\5\0"), "other runs"),
        (zlib.compress(b"\x80" * 9 + b"\1\1\5\0"), "too long"),
        (pack({0: np.array([[5, 1]])}).data[:-2], "ends early"),
    ],
)
def test_what_was_not_packed_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(CorruptDataError, match=why):
        unpack(np.array([0]), [Packed(1, 1, data)])


def test_a_round_that_inflates_without_end_is_not_inflated() -> None:
    bomb = zlib.compress(b"\0" * (100 << 20), 9)
    with pytest.raises(CorruptDataError, match="longer"):
        unpack(np.array([0]), [Packed(1, 1, bomb)])


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1])
def test_random_pages_take_less_than_three_octets_a_run(share: float) -> None:
    pages = np.random.default_rng(1).integers(0, 1 << 18, int(share * (1 << 18)))
    packed = pack({0: DirtyBitmap.from_pages(1 << 18, pages).runs()})
    assert len(packed.data) <= 3 * packed.runs

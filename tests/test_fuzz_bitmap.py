"""Bitmaps from bytes: just the bits that an integer of the same bytes has, or a typed error, in no more memory than they."""

from __future__ import annotations

from typing import Literal, get_args

from hypothesis import example, given
from hypothesis import strategies as st

from dirtylog import DirtyBitmap, InvalidArgumentError
from test_fuzz_bounds import FUZZED, KIB, U64, bounded

CONSTANT = 16 * KIB
Kind = Literal["B", "b", "H", "I", "Q"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@st.composite
def nearly_bitmaps(draw: st.DrawFn) -> tuple[int, bytes]:
    """Draw a length and bytes for it: mostly whole words, with the last one full, empty, or with one bit too many."""
    npages = draw(st.integers(0, 700))
    words = draw(st.lists(U64, min_size=-(-npages // 64), max_size=-(-npages // 64)))
    data = b"".join(word.to_bytes(8, "little") for word in words)
    over = npages % 64
    if over and draw(st.booleans()):
        kept = words[-1] & ((1 << over) - 1) | draw(st.sampled_from([0, 0, 1 << over, 1 << 63]))
        data = data[:-8] + kept.to_bytes(8, "little")
    return npages, data[: len(data) - draw(st.sampled_from([0, 0, 0, 1, 8]))] + bytes(draw(st.sampled_from([0, 0, 0, 1, 8])))


@FUZZED
@given(given_=nearly_bitmaps())
def test_a_bitmap_from_bytes_has_their_bits_or_is_refused(given_: tuple[int, bytes]) -> None:
    npages, data = given_
    number = int.from_bytes(data, "little")
    with bounded(len(data) + CONSTANT):
        try:
            bitmap = DirtyBitmap.from_bytes(npages, data)
        except InvalidArgumentError:
            bitmap = None
    assert (bitmap is not None) == (len(data) == 8 * -(-npages // 64) and not number >> npages)
    if bitmap is not None:
        assert bitmap.pages().tolist() == [page for page in range(npages) if number >> page & 1]
        assert bitmap.to_bytes() == data


@FUZZED
@given(npages=U64 | st.integers(-(1 << 70), 1 << 70), data=st.binary(max_size=64))
@example(npages=1 << 60, data=b"")
@example(npages=(1 << 64) - 1, data=b"\xff" * 8)
def test_a_length_that_lies_allocates_nothing(npages: int, data: bytes) -> None:
    with bounded(len(data) + CONSTANT):
        try:
            bitmap = DirtyBitmap.from_bytes(npages, data)
        except InvalidArgumentError:
            return
    assert len(data) == 8 * -(-npages // 64)
    assert bitmap.count() == int.from_bytes(data, "little").bit_count()


@FUZZED
@given(data=st.binary(max_size=64), kind=st.sampled_from(KINDS), writable=st.booleans())
def test_a_view_of_any_items_is_its_bytes(data: bytes, kind: Kind, writable: bool) -> None:
    whole = data[: len(data) // 8 * 8]
    view = memoryview(bytearray(whole) if writable else whole).cast("B").cast(kind)
    assert DirtyBitmap.from_bytes(8 * len(whole), view).to_bytes() == whole


@FUZZED
@given(data=st.binary(min_size=16, max_size=64), step=st.sampled_from([-1, 2, 3]))
@example(data=bytes(16), step=2)
def test_a_view_with_gaps_is_a_bitmap_or_refused(data: bytes, step: int) -> None:
    view = memoryview(data)[::step]
    try:
        bitmap = DirtyBitmap.from_bytes(8 * len(view), view)
    except InvalidArgumentError:
        return
    assert bitmap.to_bytes() == bytes(view)

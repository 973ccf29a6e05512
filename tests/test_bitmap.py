from __future__ import annotations

import operator
import pickle
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from dirtylog.bitmap import DirtyBitmap
from dirtylog.errors import InvalidArgumentError
from dirtylog.words import DirtyWords, words_of_pages, words_of_range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Make = Callable[[int, set[int]], DirtyBitmap]

# Every remainder that matters, with no whole word, with one, and with several.
LENGTHS = [64 * words + rest for words in (0, 1, 4) for rest in (0, 1, 3, 16, 63)]

# Any page of any bitmap: the machine below takes it modulo the length.
PAGES = st.lists(st.integers(0, 8 * 64), max_size=20)


def bytes_of(npages: int, pages: set[int]) -> bytes:
    return sum(1 << page for page in pages).to_bytes((npages + 63) // 64 * 8, "little")


def runs_of(pages: set[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for page in sorted(pages):
        if runs and page == sum(runs[-1]):
            runs[-1][1] += 1
        else:
            runs.append([page, 1])
    return runs


def take_in(bitmap: DirtyBitmap, other: DirtyBitmap) -> DirtyBitmap:
    bitmap |= other
    return bitmap


@pytest.fixture(params=["sparse", "laid out"])
def make(request: pytest.FixtureRequest) -> Make:
    """Make bitmaps in each of the two forms that a bitmap takes."""

    def make_bitmap(npages: int, pages: set[int]) -> DirtyBitmap:
        bitmap = DirtyBitmap.from_pages(npages, pages)
        if request.param == "laid out":
            assert len(bitmap.words) == (npages + 63) // 64
        return bitmap

    return make_bitmap


def assert_same(bitmap: DirtyBitmap, npages: int, pages: set[int]) -> None:
    assert bitmap.npages == npages
    assert bitmap.pages().tolist() == sorted(pages)
    assert bitmap.runs().tolist() == runs_of(pages)
    assert bitmap.count() == len(pages)
    assert bitmap.any() is bool(bitmap) is bool(pages)
    assert [page for page in range(-1, npages + 65) if page in bitmap] == sorted(pages)
    assert bitmap.to_bytes() == bytes_of(npages, pages)
    assert np.all(bitmap.nonzero_words().values)


class Bitmaps(RuleBasedStateMachine):
    """Bitmaps of one length beside sets, each laid out or not at random moments."""

    pairs: Bundle[tuple[DirtyBitmap, set[int]]] = Bundle("pairs")

    def __init__(self) -> None:
        super().__init__()
        self.npages = 0
        self.made: list[tuple[DirtyBitmap, set[int]]] = []

    def keep(self, bitmap: DirtyBitmap, pages: set[int]) -> tuple[DirtyBitmap, set[int]]:
        self.made.append((bitmap, pages))
        return self.made[-1]

    def fold(self, pages: list[int]) -> list[int]:
        return [page % self.npages for page in pages] if self.npages else []

    @initialize(npages=st.sampled_from(LENGTHS), target=pairs)
    def begin(self, npages: int) -> Any:
        self.npages = npages
        return multiple(self.keep(DirtyBitmap(npages), set()), self.keep(DirtyBitmap(npages), set()))

    @rule(pages=PAGES, target=pairs)
    def from_pages(self, pages: list[int]) -> tuple[DirtyBitmap, set[int]]:
        folded = self.fold(pages)
        return self.keep(DirtyBitmap.from_pages(self.npages, folded), set(folded))

    @rule(pair=pairs)
    def lay_out(self, pair: tuple[DirtyBitmap, set[int]]) -> None:
        words = pair[0].words
        assert words.dtype == np.uint64
        assert words.astype("<u8").tobytes() == bytes_of(self.npages, pair[1])

    @rule(pair=pairs, pages=PAGES)
    def write_to_words(self, pair: tuple[DirtyBitmap, set[int]], pages: list[int]) -> None:
        for page in self.fold(pages):
            pair[0].words[page // 64] |= np.uint64(1 << page % 64)
            pair[1].add(page)

    @rule(pair=pairs, pages=PAGES)
    def set_pages(self, pair: tuple[DirtyBitmap, set[int]], pages: list[int]) -> None:
        pair[0].set_pages(self.fold(pages))
        pair[1].update(self.fold(pages))

    @rule(pair=pairs, first=st.integers(0, 8 * 64), npages=st.integers(0, 200))
    def set_range(self, pair: tuple[DirtyBitmap, set[int]], first: int, npages: int) -> None:
        first %= self.npages + 1
        npages = min(npages, self.npages - first)
        pair[0].set_range(first, npages)
        pair[1].update(range(first, first + npages))

    @rule(pair=pairs)
    def clear(self, pair: tuple[DirtyBitmap, set[int]]) -> None:
        pair[0].clear()
        pair[1].clear()

    @rule(pair=pairs, other=pairs)
    def take_in(self, pair: tuple[DirtyBitmap, set[int]], other: tuple[DirtyBitmap, set[int]]) -> None:
        assert take_in(pair[0], other[0]) is pair[0]
        pair[1].update(other[1])

    @rule(pair=pairs, other=pairs)
    def assign(self, pair: tuple[DirtyBitmap, set[int]], other: tuple[DirtyBitmap, set[int]]) -> None:
        pair[0].assign(other[0])
        pages = set(other[1])
        pair[1].clear()
        pair[1].update(pages)

    @rule(pair=pairs, other=pairs, operation=st.sampled_from([operator.or_, operator.and_, operator.sub]), target=pairs)
    def combine(
        self,
        pair: tuple[DirtyBitmap, set[int]],
        other: tuple[DirtyBitmap, set[int]],
        operation: Callable[[Any, Any], Any],
    ) -> tuple[DirtyBitmap, set[int]]:
        return self.keep(operation(pair[0], other[0]), operation(pair[1], other[1]))

    @rule(pair=pairs, target=pairs)
    def copy(self, pair: tuple[DirtyBitmap, set[int]]) -> tuple[DirtyBitmap, set[int]]:
        return self.keep(pair[0].copy(), set(pair[1]))

    @rule(pair=pairs, target=pairs)
    def through_bytes(self, pair: tuple[DirtyBitmap, set[int]]) -> tuple[DirtyBitmap, set[int]]:
        return self.keep(DirtyBitmap.from_bytes(self.npages, pair[0].to_bytes()), set(pair[1]))

    @rule(pair=pairs, other=pairs)
    def compare(self, pair: tuple[DirtyBitmap, set[int]], other: tuple[DirtyBitmap, set[int]]) -> None:
        assert (pair[0] == other[0]) is (pair[1] == other[1])
        assert (pair[0] != other[0]) is (pair[1] != other[1])

    @invariant()
    def every_bitmap_is_its_set(self) -> None:
        for bitmap, pages in self.made:
            assert_same(bitmap, self.npages, pages)


TestBitmapsAgainstSets = Bitmaps.TestCase
TestBitmapsAgainstSets.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


# --- KVM's layout


def test_bytes_are_little_endian_words_as_kvm_writes_them(make: Make) -> None:
    bitmap = make(70, {0, 9, 63, 64, 69})

    assert bitmap.to_bytes() == bytes.fromhex("0102000000000080 2100000000000000")


@pytest.mark.parametrize(("npages", "nbytes"), [(0, 0), (1, 8), (63, 8), (64, 8), (65, 16), (128, 16), (129, 24)])
def test_bytes_are_whole_words(npages: int, nbytes: int) -> None:
    assert DirtyBitmap(npages).to_bytes() == bytes(nbytes)
    assert len(DirtyBitmap(npages).words) * 8 == nbytes


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_from_bytes_copies_any_buffer(kind: Callable[[bytes], bytes | bytearray | memoryview]) -> None:
    data = kind(bytes.fromhex("0300000000000000 0100000000000000"))

    bitmap = DirtyBitmap.from_bytes(65, data)
    if isinstance(data, bytearray):
        data[0] = 0

    assert bitmap.pages().tolist() == [0, 1, 64]


def test_from_bytes_reads_at_any_alignment() -> None:
    assert DirtyBitmap.from_bytes(64, memoryview(b"?" + bytes.fromhex("0000000000000080"))[1:]).pages().tolist() == [63]


# --- questions


@pytest.mark.parametrize(
    ("pages", "runs"),
    [
        ({62, 63, 64, 65}, [[62, 4]]),
        ({63, 65}, [[63, 1], [65, 1]]),
        (set(range(60, 260)), [[60, 200]]),
        (set(range(64, 128)), [[64, 64]]),
        ({63, 128}, [[63, 1], [128, 1]]),
        ({0, 63, 64, 127, 128, 299}, [[0, 1], [63, 2], [127, 2], [299, 1]]),
        (set(range(300)), [[0, 300]]),
        (set(), []),
    ],
)
def test_runs_join_across_word_boundaries(pages: set[int], runs: list[list[int]], make: Make) -> None:
    found = make(300, pages).runs()

    assert found.tolist() == runs
    assert found.shape == (len(runs), 2)
    assert found.dtype == np.int64


def test_pages_are_a_fresh_array(make: Make) -> None:
    bitmap = make(100, {5, 70})

    bitmap.pages()[:] = 0

    assert bitmap.pages().dtype == np.int64
    assert bitmap.pages().tolist() == [5, 70]


def test_only_pages_of_the_bitmap_are_in_it(make: Make) -> None:
    bitmap = make(66, {1, 65})

    assert 65 in bitmap
    assert np.int64(65) in bitmap
    assert np.uint8(1) in bitmap
    for stranger in (-1, -63, 66, 129, 1 << 70, 1.0, "1", None):
        assert stranger not in bitmap


def test_bitmaps_of_unequal_length_differ_and_so_does_anything_else() -> None:
    assert DirtyBitmap(64) != DirtyBitmap(65)
    assert DirtyBitmap(64) != "DirtyBitmap"
    assert DirtyBitmap(3) != {0, 1, 2}


def test_a_bitmap_has_no_hash() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(DirtyBitmap(1))


def test_repr_gives_length_and_count() -> None:
    assert repr(DirtyBitmap.from_pages(10, [1, 2])) == "DirtyBitmap(npages=10, dirty=2)"


def test_a_bitmap_pickles(make: Make) -> None:
    bitmap = make(100, {1, 99})

    assert pickle.loads(pickle.dumps(bitmap)) == bitmap  # noqa: S301 - our own


# --- changes


INTEGERS: dict[str, Callable[[], Any]] = {
    "a list with repeats": lambda: [70, 3, 3, 70],
    "a tuple": lambda: (3, 70),
    "a set": lambda: {3, 70},
    "a range": lambda: range(3, 71, 67),
    "an iterator": lambda: iter([70, 3]),
    "uint8": lambda: np.array([3, 70], np.uint8),
    "uint64": lambda: np.array([70, 3], np.uint64),
    "NumPy scalars": lambda: [np.int32(3), np.int64(70)],
}


@pytest.mark.parametrize("pages", INTEGERS.values(), ids=INTEGERS.keys())
def test_set_pages_takes_any_integers(pages: Callable[[], Any], make: Make) -> None:
    bitmap = make(100, {5})

    bitmap.set_pages(pages())

    assert bitmap.pages().tolist() == [3, 5, 70]


@pytest.mark.parametrize("nothing", [[], (), np.array([]), range(0)], ids=["list", "tuple", "array", "range"])
def test_set_pages_takes_no_pages(nothing: Any, make: Make) -> None:
    bitmap = make(100, {5})

    bitmap.set_pages(nothing)

    assert bitmap.pages().tolist() == [5]


def test_words_is_a_view_and_stays_the_same_array() -> None:
    bitmap = DirtyBitmap.from_pages(130, [1])
    words = bitmap.words

    bitmap.set_pages([2])
    bitmap.set_range(64, 2)
    assert words.tolist() == [6, 3, 0]
    words[2] = 1
    assert bitmap.pages().tolist() == [1, 2, 64, 65, 128]
    bitmap.clear()

    assert bitmap.words is words
    assert words.tolist() == [0, 0, 0]


def test_assign_copies_what_it_is_given(make: Make) -> None:
    given = make(100, {3, 64})
    bitmap = make(100, {50})

    bitmap.assign(given)
    given.clear()

    assert bitmap.pages().tolist() == [3, 64]


# --- words


@given(pages=st.lists(st.integers(0, 1000)))
@settings(deadline=None)
def test_words_of_pages_are_ascending_and_never_zero(pages: list[int]) -> None:
    words = words_of_pages(np.array(pages, np.int64))

    assert np.all(np.diff(words.offsets) > 0)
    assert np.all(words.values)
    assert bool(words) is bool(pages)
    assert words.pages().tolist() == sorted(set(pages))


@given(first=st.integers(0, 300), npages=st.integers(0, 300))
@settings(deadline=None)
def test_words_of_range_hold_the_range(first: int, npages: int) -> None:
    assert words_of_range(first, npages).pages().tolist() == list(range(first, first + npages))


def test_pages_of_more_words_than_one_block_come_whole() -> None:
    # Words are expanded 2^17 at a time: here a whole block, and part of a second.
    offsets = np.arange(0, 3 << 17, 2, dtype=np.int64)
    words = DirtyWords(offsets, np.full(len(offsets), 1 << 63 | 1, np.uint64))

    assert np.array_equal(words.pages(), np.sort(np.concatenate((offsets * 64, offsets * 64 + 63))))


# --- errors

NPAGES = 100


def _broken() -> Iterator[int]:
    yield 3
    raise OSError


BAD_CHANGES: dict[str, Callable[[DirtyBitmap], object]] = {
    "a negative page": lambda bitmap: bitmap.set_pages([3, -1]),
    "page npages": lambda bitmap: bitmap.set_pages([3, NPAGES]),
    "a page of the last word, past the end": lambda bitmap: bitmap.set_pages([127]),
    "a page past 64 bits": lambda bitmap: bitmap.set_pages([3, 1 << 70]),
    "a page past 63 bits": lambda bitmap: bitmap.set_pages(np.array([3, 1 << 63], np.uint64)),
    "fractions": lambda bitmap: bitmap.set_pages([3.0, 4.0]),
    "truth values": lambda bitmap: bitmap.set_pages([True]),
    "text": lambda bitmap: bitmap.set_pages("34"),
    "nothing at all": lambda bitmap: bitmap.set_pages([3, None]),  # type: ignore[arg-type]  # the point
    "one number": lambda bitmap: bitmap.set_pages(3),
    "two dimensions": lambda bitmap: bitmap.set_pages([[3, 4]]),
    "rows of unequal length": lambda bitmap: bitmap.set_pages([[3], [4, 5]]),
    "a range past the end": lambda bitmap: bitmap.set_range(NPAGES - 1, 2),
    "an empty range past the end": lambda bitmap: bitmap.set_range(NPAGES + 1, 0),
    "a range before the start": lambda bitmap: bitmap.set_range(-1, 2),
    "a range of negative length": lambda bitmap: bitmap.set_range(5, -1),
    "|= of another length": lambda bitmap: take_in(bitmap, DirtyBitmap(NPAGES + 1)),
    "| of another length": lambda bitmap: bitmap | DirtyBitmap(NPAGES - 1),
    "& of another length": lambda bitmap: bitmap & DirtyBitmap(128),
    "- of another length": lambda bitmap: bitmap - DirtyBitmap(0),
}


@pytest.mark.parametrize("change", BAD_CHANGES.values(), ids=BAD_CHANGES.keys())
def test_a_refused_change_changes_nothing(change: Callable[[DirtyBitmap], object], make: Make) -> None:
    bitmap = make(NPAGES, {0, 64, 99})

    with pytest.raises(InvalidArgumentError):
        change(bitmap)

    assert_same(bitmap, NPAGES, {0, 64, 99})


def test_pages_that_cannot_be_listed_change_nothing(make: Make) -> None:
    bitmap = make(NPAGES, {1})

    with pytest.raises(OSError):  # noqa: PT011 - raised bare above
        bitmap.set_pages(_broken())

    assert_same(bitmap, NPAGES, {1})


@pytest.mark.parametrize(
    ("npages", "data"),
    [(100, bytes(13)), (100, bytes(15)), (100, bytes(24)), (100, b""), (64, bytes(16)), (0, bytes(8)), (1, bytes(1))],
)
def test_from_bytes_refuses_any_other_length(npages: int, data: bytes) -> None:
    with pytest.raises(InvalidArgumentError, match=f"bitmap of {npages} pages has .* {len(data)} were given"):
        DirtyBitmap.from_bytes(npages, data)


@pytest.mark.parametrize(("npages", "page"), [(1, 1), (1, 63), (63, 63), (65, 65), (65, 127), (80, 80), (127, 127)])
def test_from_bytes_refuses_bits_past_the_end(npages: int, page: int) -> None:
    with pytest.raises(InvalidArgumentError, match="past the end"):
        DirtyBitmap.from_bytes(npages, bytes_of(npages, {0, page}))


def test_a_negative_length_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="-1"):
        DirtyBitmap(-1)


def test_lengths_and_ranges_are_whole_numbers() -> None:
    fraction: Any = 1.5

    with pytest.raises(TypeError):
        DirtyBitmap(fraction)
    with pytest.raises(TypeError):
        DirtyBitmap(10).set_range(fraction, 1)
    with pytest.raises(TypeError):
        DirtyBitmap(10).set_range(1, fraction)


def test_an_error_names_the_page_and_the_rule() -> None:
    with pytest.raises(InvalidArgumentError, match="page -7 is out of range: the pages are 0 to 9"):
        DirtyBitmap(10).set_pages([3, -7, 12])


# --- memory


def test_a_terabyte_with_few_dirty_pages_costs_what_is_dirty() -> None:
    npages = 1 << 28  # 1 TiB of 4 KiB pages; its words would take 32 MiB
    pages = {0, 63, 64, 1 << 20, npages - 1}
    tracemalloc.start()
    try:
        bitmap = DirtyBitmap.from_pages(npages, pages)
        bitmap.set_range(1 << 27, 1000)
        other = bitmap.copy()
        other.set_pages([7])
        other |= bitmap
        difference = (other - bitmap) | (bitmap & other)
        assert difference == other
        assert difference.count() == len(pages) + 1001
        assert len(difference.pages()) == difference.count()
        assert difference.runs().tolist()[0] == [0, 1]
        assert npages - 1 in difference
        difference.clear()
        assert not difference
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 1 << 18

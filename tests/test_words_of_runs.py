"""Runs of pages as words, and pages in holes, against ``set[int]``."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dirtylog.linux.holes import words_in_holes
from dirtylog.slotbitmap import SlotBitmap
from dirtylog.words import PAGES_PER_WORD, DirtyWords, words_of_pages, words_of_range, words_of_runs
from interrupts import interrupt

Runs = list[tuple[int, int]]
"""(first, end), ascending, none overlapping; they may touch."""

_gaps = st.one_of(st.integers(0, 3), st.integers(0, 200), st.sampled_from([63, 64, 65, 127, 128, 4096]))
_lengths = st.one_of(st.integers(1, 3), st.integers(1, 300), st.sampled_from([63, 64, 65, 128, 192, 5000]))


@st.composite
def runs(draw: st.DrawFn, *, least: int = 1, base: int = 0) -> Runs:
    found, at = [], base
    for gap, length in draw(st.lists(st.tuples(_gaps, _lengths), min_size=least, max_size=12)):
        found.append((at + gap, at + gap + length))
        at += gap + length
    return found


def arrays(given_runs: Runs) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], np.ndarray[tuple[int], np.dtype[np.int64]]]:
    first = np.array([first for first, _ in given_runs], np.int64)
    end = np.array([end for _, end in given_runs], np.int64)
    return first, end


def pages_of(given_runs: Runs) -> set[int]:
    return {page for first, end in given_runs for page in range(first, end)}


def checked(words: DirtyWords) -> set[int]:
    """Return the pages of words that keep the rules of DirtyWords."""
    assert words.offsets.dtype == np.int64
    assert words.values.dtype == np.uint64
    assert len(words.offsets) == len(words.values)
    assert (np.diff(words.offsets) > 0).all(), "ascending, without repeats"
    assert (words.values != 0).all(), "none of them zero"
    return set(words.pages().tolist())


@settings(deadline=None)
@given(runs())
def test_the_words_of_runs_have_just_their_pages(given_runs: Runs) -> None:
    assert checked(words_of_runs(*arrays(given_runs))) == pages_of(given_runs)


@settings(deadline=None)
@given(runs(base=1 << 40))
def test_runs_may_lie_far_out(given_runs: Runs) -> None:
    assert checked(words_of_runs(*arrays(given_runs))) == pages_of(given_runs)


@settings(deadline=None)
@given(runs())
def test_the_arrays_that_are_given_stay_as_they_are(given_runs: Runs) -> None:
    first, end = arrays(given_runs)
    words_of_runs(first, end)
    assert (first.tolist(), end.tolist()) == tuple(map(list, zip(*given_runs, strict=True)))


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(1, 1000))
def test_one_run_is_a_range(first: int, npages: int) -> None:
    words = words_of_runs(np.array([first]), np.array([first + npages]))
    range_words = words_of_range(first, npages)
    assert words.offsets.tolist() == range_words.offsets.tolist()
    assert words.values.tolist() == range_words.values.tolist()


def test_no_runs_have_no_words() -> None:
    nothing = np.empty(0, np.int64)
    assert checked(words_of_runs(nothing, nothing)) == set()


def test_a_million_alternate_pages() -> None:
    first = np.arange(0, 2_000_000, 2)
    words = words_of_runs(first, first + 1)
    assert len(words.offsets) == 2_000_000 // PAGES_PER_WORD
    assert set(words.values.tolist()) == {0x5555_5555_5555_5555}


# --- runs into a slot's bitmap


@given(st.lists(runs(), min_size=1, max_size=4), st.booleans())
@settings(deadline=None)
def test_runs_that_are_merged_are_all_there(several: list[Runs], marked: bool) -> None:
    npages = max(end for each in several for _, end in each)
    bitmap, expected = SlotBitmap(npages), set[int]()
    if marked:
        bitmap.mark(npages // 2)
        expected.add(npages // 2)
    for each in several:
        bitmap.merge_runs(*arrays(each))
        expected |= pages_of(each)
    assert checked(bitmap.read()) == expected
    assert checked(bitmap.exchange()) == expected


@pytest.mark.parametrize(
    "given_runs", [[(0, 1), (3, 4), (64, 65), (129, 130)], [(60, 70), (100, 200)], [(0, 200)], [(5, 7), (7, 9)]]
)
def test_a_merge_that_is_interrupted_anywhere_and_done_again_is_exact(given_runs: Runs) -> None:
    """What an interrupted get leaves in the vector is delivered again: to add a bit that is set already would carry."""
    first, end = arrays(given_runs)
    for step in itertools.count():
        bitmap = SlotBitmap(200)
        reached = interrupt(partial(bitmap.merge_runs, first, end), step)
        bitmap.merge_runs(first, end)
        assert checked(bitmap.exchange()) == pages_of(given_runs), f"interrupted at point {step}"
        bitmap.commit()
        assert checked(bitmap.read()) == set()
        if not reached:
            break
    assert step > 3, "the points were not seen"


# --- holes

_pages = st.sets(st.one_of(st.integers(0, 400), st.integers(0, 6000), st.sampled_from([63, 64, 127, 128, 191, 192])), max_size=60)


def dense(given_runs: Runs) -> DirtyWords:
    return words_of_runs(*arrays(given_runs))


@settings(deadline=None)
@given(_pages, runs(least=0))
def test_the_pages_in_holes_are_found(pages: set[int], holes: Runs) -> None:
    words = words_of_pages(np.array(sorted(pages), np.int64))
    assert checked(words_in_holes(words, *arrays(holes))) == pages & pages_of(holes)


@settings(deadline=None)
@given(runs(), runs(least=0))
def test_runs_of_pages_in_holes_are_found(populated: Runs, holes: Runs) -> None:
    found = words_in_holes(dense(populated), *arrays(holes))
    assert checked(found) == pages_of(populated) & pages_of(holes)


@settings(deadline=None)
@given(runs())
def test_a_set_in_holes_that_cover_it_is_itself(populated: Runs) -> None:
    words = dense(populated)
    end = int(words.offsets[-1] + 1) * PAGES_PER_WORD
    found = words_in_holes(words, np.array([0]), np.array([end]))
    assert found.offsets.tolist() == words.offsets.tolist()
    assert found.values.tolist() == words.values.tolist()


@pytest.mark.parametrize("holes", [[(0, 1)], [(63, 64)], [(64, 65)], [(0, 64)], [(63, 65)], [(0, 63), (64, 128)], [(1000, 2000)]])
def test_holes_at_the_edges_of_words(holes: Runs) -> None:
    words = words_of_range(0, 128)
    assert checked(words_in_holes(words, *arrays(holes))) == set(range(128)) & pages_of(holes)


@settings(deadline=None)
@given(_pages, runs())
def test_the_set_that_is_given_stays_as_it_is(pages: set[int], holes: Runs) -> None:
    words = words_of_pages(np.array(sorted(pages), np.int64))
    found = words_in_holes(words, *arrays(holes))
    found.values[:] = 0
    assert set(words.pages().tolist()) == pages

from __future__ import annotations

import itertools
import sys
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dirtylog import slotbitmap
from dirtylog.slotbitmap import SlotBitmap
from dirtylog.words import DirtyWords, words_of_pages, words_of_range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType


def words_of(pages: Iterable[int]) -> DirtyWords:
    return words_of_pages(np.array(sorted(pages), np.int64))


def pages_of(words: DirtyWords) -> set[int]:
    """Return the pages of what an exchange gave, which must be ascending words, none of them zero."""
    assert np.all(np.diff(words.offsets) > 0)
    assert np.all(words.values)
    return set(words.pages().tolist())


class OneSlot(RuleBasedStateMachine):
    """A slot's bitmap beside two sets: what is current, and what a get took and has not delivered."""

    @initialize(npages=st.sampled_from([1, 3, 63, 64, 65, 127, 128, 400]), all_set=st.booleans())
    def begin(self, npages: int, all_set: bool) -> None:
        self.npages = npages
        self.bitmap = SlotBitmap(npages, all_set=all_set)
        self.current = set(range(npages)) if all_set else set()
        self.taken: set[int] = set()

    def merge_taken(self) -> None:
        self.current |= self.taken
        self.taken = set()

    @rule(page=st.integers(0, 399))
    def mark(self, page: int) -> None:
        self.bitmap.mark(page % self.npages)
        self.current.add(page % self.npages)

    @rule(pages=st.sets(st.integers(0, 399)))
    def merge(self, pages: set[int]) -> None:
        folded = {page % self.npages for page in pages}
        self.bitmap.merge(words_of(folded))
        self.current |= folded

    @rule()
    def exchange(self) -> None:
        self.merge_taken()
        assert pages_of(self.bitmap.exchange()) == self.current
        self.taken, self.current = self.current, set()

    @rule(pages=st.sets(st.integers(0, 399)))
    def exchange_masked(self, pages: set[int]) -> None:
        self.merge_taken()
        mask = {page % self.npages for page in pages}
        # Only what is both set and asked for goes.
        assert pages_of(self.bitmap.exchange_masked(words_of(mask))) == self.current & mask
        self.taken, self.current = self.current & mask, self.current - mask

    @rule()
    def commit(self) -> None:
        self.bitmap.commit()
        self.taken = set()

    @rule()
    def give_back(self) -> None:
        self.bitmap.give_back()
        self.merge_taken()

    @rule()
    def read(self) -> None:
        self.merge_taken()
        assert pages_of(self.bitmap.read()) == self.current

    @invariant()
    def a_flag_stands_beside_each_word_that_is_not_zero(self) -> None:
        assert set(np.flatnonzero(self.bitmap._flags).tolist()) == {page // 64 for page in self.current}


TestOneSlotAgainstSets = OneSlot.TestCase
TestOneSlotAgainstSets.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)


@pytest.fixture
def bitmap() -> SlotBitmap:
    """A slot of 200 pages, four of them dirty, in three words."""
    bitmap = SlotBitmap(200)
    bitmap.merge(words_of({0, 63, 64, 199}))
    return bitmap


DIRTY = {0, 63, 64, 199}


@pytest.mark.parametrize("npages", [1, 63, 64, 65, 200])
def test_all_set_sets_every_page_and_none_past_the_end(npages: int) -> None:
    assert pages_of(SlotBitmap(npages, all_set=True).exchange()) == set(range(npages))


def test_a_committed_exchange_is_gone(bitmap: SlotBitmap) -> None:
    assert pages_of(bitmap.exchange()) == DIRTY
    bitmap.commit()

    assert pages_of(bitmap.read()) == set()


def test_the_next_exchange_gives_back_one_that_was_not_committed(bitmap: SlotBitmap) -> None:
    bitmap.exchange()
    bitmap.mark(100)

    assert pages_of(bitmap.exchange()) == DIRTY | {100}


def test_the_next_masked_exchange_gives_back_one_that_was_not_committed(bitmap: SlotBitmap) -> None:
    bitmap.exchange()

    assert pages_of(bitmap.exchange_masked(words_of({0, 1, 199}))) == {0, 199}
    bitmap.commit()
    assert pages_of(bitmap.read()) == {63, 64}


def test_the_next_read_gives_back_an_exchange_that_was_not_committed(bitmap: SlotBitmap) -> None:
    bitmap.exchange_masked(words_of({63}))

    assert pages_of(bitmap.read()) == DIRTY


def test_a_page_marked_while_a_snapshot_is_out_outlives_the_commit(bitmap: SlotBitmap) -> None:
    bitmap.exchange()
    bitmap.mark(63)
    bitmap.commit()

    assert pages_of(bitmap.read()) == {63}


def test_what_an_exchange_gave_does_not_change_before_the_commit(bitmap: SlotBitmap) -> None:
    words = bitmap.exchange()
    for page in range(200):
        bitmap.mark(page)

    assert pages_of(words) == DIRTY


def test_read_gives_a_copy(bitmap: SlotBitmap) -> None:
    bitmap.read().values[:] = 0

    assert pages_of(bitmap.read()) == DIRTY


# --- interrupts


class _InterruptError(BaseException):
    """As a Ctrl-C: no `except Exception` stops it."""


def interrupt(action: Callable[[], object], step: int) -> bool:
    """Run ``action`` and raise before step number ``step`` that it makes in slotbitmap.py; return whether it got that far.

    A step is a bytecode or, where Python does not trace those, a line.
    """
    left = step

    def trace(frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != slotbitmap.__file__:
            return None
        frame.f_trace_opcodes = True
        if event in ("line", "opcode"):
            left -= 1
            if left < 0:
                raise _InterruptError
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except _InterruptError:
        return True
    finally:
        sys.settrace(before)
    return False


def get(bitmap: SlotBitmap, delivered: set[int]) -> None:
    delivered |= pages_of(bitmap.exchange())
    bitmap.commit()


def clear(bitmap: SlotBitmap, delivered: set[int]) -> None:
    delivered |= pages_of(bitmap.exchange_masked(words_of({1, 63, 64})))
    bitmap.commit()


def fail(bitmap: SlotBitmap, _delivered: set[int]) -> None:
    bitmap.exchange()
    bitmap.give_back()


def fail_and_get(bitmap: SlotBitmap, delivered: set[int]) -> None:
    bitmap.exchange()
    bitmap.mark(63)
    delivered |= pages_of(bitmap.exchange())
    bitmap.commit()


def fail_and_read(bitmap: SlotBitmap, _delivered: set[int]) -> None:
    bitmap.exchange_masked(words_of({0, 64}))
    bitmap.read()


@pytest.mark.parametrize("action", [get, clear, fail, fail_and_get, fail_and_read], ids=lambda action: action.__name__)
def test_an_interrupt_at_any_step_loses_no_bit(action: Callable[[SlotBitmap, set[int]], None]) -> None:
    for step in itertools.count():
        bitmap, delivered = SlotBitmap(200), set[int]()
        bitmap.merge(words_of(DIRTY))

        interrupted = interrupt(lambda b=bitmap, d=delivered: action(b, d), step)  # type: ignore[misc]  # bound early

        assert pages_of(bitmap.read()) | delivered == DIRTY, f"interrupted before step {step}"
        if not interrupted:
            break
    assert step > 10, "the steps were not seen"


def test_an_interrupt_in_a_mark_or_a_merge_loses_no_other_bit() -> None:
    for add in (lambda bitmap: bitmap.mark(64), lambda bitmap: bitmap.merge(words_of_range(60, 10))):
        for step in itertools.count():
            bitmap = SlotBitmap(200)
            bitmap.merge(words_of(DIRTY))

            interrupted = interrupt(lambda b=bitmap, a=add: a(b), step)  # type: ignore[misc]  # bound early

            assert pages_of(bitmap.read()) >= DIRTY, f"interrupted before step {step}"
            if not interrupted:
                break
        assert step > 10, "the steps were not seen"


# --- memory


def test_a_get_allocates_nothing_that_grows_with_the_slot() -> None:
    npages = 1 << 24  # 64 GiB of 4 KiB pages: 2 MiB of words, 256 KiB of flags
    bitmap = SlotBitmap(npages)
    dirty = {0, 63, 1 << 20, npages - 1}
    mask = words_of({0, npages - 1})
    bitmap.merge(words_of(dirty))
    tracemalloc.start()
    try:
        assert len(bitmap.read().offsets) == 3
        assert len(bitmap.exchange().offsets) == 3
        bitmap.give_back()
        assert len(bitmap.exchange_masked(mask).offsets) == 2
        bitmap.commit()
        bitmap.mark(npages - 1)
        assert len(bitmap.exchange().offsets) == 3
        bitmap.commit()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 1 << 14
    assert pages_of(bitmap.read()) == set()

"""The port of soft-dirty bits against a model of the kernel, step by step."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dirtylog
from dirtylog import DirtyLog, DirtyLogError
from dirtylog.linux import soft_dirty
from dirtylog.linux.soft_dirty import SoftDirtyPort
from interrupts import interrupt
from model_memory import ModelMemory

if TYPE_CHECKING:
    from collections.abc import Callable


class Model:
    """The bits of one process, and whether it stands still; a freezer, too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dirty: set[int] = set()
        self.frozen = False
        self.before_clear: Callable[[], None] = lambda: None
        monkeypatch.setattr(soft_dirty, "soft_dirty_pages", self.pages)
        monkeypatch.setattr(soft_dirty, "clear_soft_dirty", self.clear)

    def freeze(self) -> None:
        self.frozen = True

    def thaw(self) -> None:
        self.frozen = False

    def pages(self, _pid: int, start: int, npages: int, page_size: int) -> np.ndarray[Any, Any]:
        assert self.frozen, "what is written between the reading and the clearing would be lost"
        first = start // page_size
        return np.array(sorted(page - first for page in self.dirty if first <= page < first + npages), np.int64)

    def clear(self, _pid: int) -> None:
        assert self.frozen
        self.before_clear()
        self.dirty.clear()


SLOTS = (0, 10, 300), (1, 1000, 70), (2, 1 << 20, 1 << 18)
"""Number, first page and number of pages; the last is read in two pieces."""


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    return Model(monkeypatch)


@pytest.fixture
def log(model: Model) -> DirtyLog:
    memory: Any = ModelMemory(SoftDirtyPort(1, model), SLOTS)  # type: ignore[arg-type]  # all of a freezer that it uses
    return DirtyLog(memory)


def reported(log: DirtyLog) -> set[int]:
    return {first + page for number, first, _ in SLOTS for page in log.get(number).pages().tolist()}


def test_a_get_of_one_slot_keeps_the_bits_of_the_others(model: Model, log: DirtyLog) -> None:
    with log:
        model.dirty = {10, 309, 1000, 1069, 1 << 20, (1 << 20) + (1 << 18) - 1, 999, 1070}
        assert log.get(1).pages().tolist() == [0, 69]
        assert not model.dirty
        assert log.get(0).pages().tolist() == [0, 299]
        assert log.get(2).pages().tolist() == [0, (1 << 18) - 1]
        assert not reported(log)
        assert not model.frozen


def test_what_was_written_before_the_log_is_not_reported(model: Model, log: DirtyLog) -> None:
    model.dirty = {10, 1000, 1 << 20}
    with log:
        assert not reported(log)


def test_one_that_is_paused_stays_so(model: Model, log: DirtyLog) -> None:
    with log:
        model.freeze()
        reported(log)
        assert model.frozen


def test_a_get_that_fails_loses_nothing_and_lets_the_target_go(model: Model, log: DirtyLog) -> None:
    def fail() -> None:
        raise DirtyLogError("no")

    with log:
        model.dirty = {12, 1003}
        model.before_clear = fail
        with pytest.raises(DirtyLogError, match="no"):
            log.get(1)
        assert not model.frozen
        model.before_clear = lambda: None
        assert reported(log) == {12, 1003}


def test_an_interrupt_while_it_is_being_stopped_lets_it_go(model: Model, log: DirtyLog) -> None:
    def stop_and_raise() -> None:
        model.frozen = True
        raise KeyboardInterrupt

    with log:
        model.dirty = {12}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "freeze", stop_and_raise)
            with pytest.raises(KeyboardInterrupt):
                log.get(1)
        assert not model.frozen
        assert reported(log) == {12}


def test_interrupted_anywhere_a_get_loses_nothing(model: Model, log: DirtyLog) -> None:
    for step in itertools.count():
        with log:
            model.dirty = {10, 70, 1003, (1 << 20) + 5}
            out = dirtylog.DirtyBitmap(70)
            reached = interrupt(partial(log.get, 1, out), step)
            assert reported(log) | {1000 + page for page in out.pages().tolist()} == {10, 70, 1003, (1 << 20) + 5}, step
        model.thaw()
        if not reached:
            break
    assert step > 20, "the points were not seen"

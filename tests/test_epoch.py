from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from dirtylog.bitmap import DirtyBitmap
from dirtylog.dirty_log import DirtyLog
from dirtylog.emulated.arch import PORTS
from dirtylog.emulated.machine import EmulatedMemory
from dirtylog.epoch import Epoch
from dirtylog.errors import CopyFaultError, InvalidArgumentError, LoggingOffError
from dirtylog.memslot import SlotFlags
from interrupts import interrupt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dirtylog.epoch import Consumer
    from dirtylog.memory import Memory

NPAGES = {0: 130, 1: 64, 2: 7}
"""The slots of these tests."""


def make_memory(slots: Iterable[int] = (0, 1)) -> EmulatedMemory:
    memory = EmulatedMemory(PORTS["x86"])
    for slot in slots:
        memory.add_slot(slot, slot << 10, NPAGES[slot])
    return memory


def write(memory: EmulatedMemory, slot: int, pages: Iterable[int], value: int = 1) -> None:
    offsets = list(pages)
    memory.write(slot, offsets, np.full((len(offsets), 4096), value, np.uint8))


def pages_of(dirty: dict[int, DirtyBitmap]) -> dict[int, set[int]]:
    """Return the pages of the slots that have any."""
    return {slot: set(bitmap.pages().tolist()) for slot, bitmap in dirty.items() if bitmap}


def take(consumer: Consumer) -> dict[int, set[int]]:
    with consumer.epoch() as epoch:
        return pages_of(epoch.dirty)


def got(log: DirtyLog, slot: int) -> set[int]:
    return set(log.get(slot).pages().tolist())


ALL = {slot: set(range(npages)) for slot, npages in NPAGES.items()}


class Reader:
    """What one consumer should have: by slot, what it has not taken, and what its open epoch took."""

    def __init__(self, slots: Iterable[int]) -> None:
        self.pending: dict[int, set[int]] = {slot: set() for slot in slots}
        self.taken: dict[int, set[int]] = {}
        self.epoch: Epoch | None = None


class Consumers(RuleBasedStateMachine):
    """Three consumers and get over one log, each beside its own sets."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = make_memory()
        self.log = DirtyLog(self.memory)
        self.log.start()
        self.port: dict[int, set[int]] = {0: set(), 1: set()}
        self.unread: dict[int, set[int]] = {0: set(), 1: set()}
        self.readers: dict[str, Reader] = {}

    def drain(self, slot: int) -> None:
        """Every reader gets what the port has; a slot that a consumer meets for the first time is all news to it."""
        for reader in self.readers.values():
            reader.pending.setdefault(slot, set(ALL[slot])).update(self.port[slot])
        self.unread[slot] |= self.port[slot]
        self.port[slot] = set()

    @rule(slot=st.sampled_from(sorted(NPAGES)), pages=st.sets(st.integers(0, 129), min_size=1, max_size=10))
    def write(self, slot: int, pages: set[int]) -> None:
        if slot in self.port:
            folded = {page % NPAGES[slot] for page in pages}
            write(self.memory, slot, folded)
            self.port[slot] |= folded

    @rule(slot=st.sampled_from(sorted(NPAGES)))
    def get(self, slot: int) -> None:
        if slot in self.port:
            self.drain(slot)
            assert got(self.log, slot) == self.unread[slot]
            self.unread[slot] = set()
        else:
            with pytest.raises(LoggingOffError):
                self.log.get(slot)

    @rule(name=st.sampled_from("abc"))
    def consumer(self, name: str) -> None:
        consumer = self.log.consumer(name)
        assert self.log.consumer(name) is consumer
        self.readers.setdefault(name, Reader(self.port))

    def reader(self, name: str) -> Reader:
        self.consumer(name)
        return self.readers[name]

    @rule(name=st.sampled_from("abc"), scribble=st.booleans())
    def take(self, name: str, scribble: bool) -> None:
        reader = self.reader(name)
        epoch = self.log.consumer(name).epoch()
        if reader.epoch is not None:
            with pytest.raises(InvalidArgumentError, match=f"'{name}' has an epoch open"):
                epoch.__enter__()
            return
        epoch.__enter__()
        for slot in self.port:
            self.drain(slot)
        assert epoch.dirty.keys() == self.port.keys()
        assert pages_of(epoch.dirty) == {slot: pages for slot, pages in reader.pending.items() if pages}
        reader.epoch, reader.taken = epoch, reader.pending
        reader.pending = {slot: set() for slot in reader.taken}
        if scribble:
            for bitmap in epoch.dirty.values():
                bitmap.set_range(0, bitmap.npages // 2)
                bitmap.words[bitmap.npages // 128 :] = 0

    def opened(self) -> list[Reader]:
        return [reader for reader in self.readers.values() if reader.epoch is not None]

    @precondition(lambda self: bool(self.opened()))
    @rule(which=st.integers(0, 2), explicit=st.booleans())
    def commit(self, which: int, explicit: bool) -> None:
        reader = self.opened()[which % len(self.opened())]
        assert reader.epoch is not None
        if explicit:
            reader.epoch.commit()
            # Too late: it has been committed.
            reader.epoch.rollback()
        else:
            reader.epoch.__exit__(None, None, None)
        reader.taken, reader.epoch = {}, None

    @precondition(lambda self: bool(self.opened()))
    @rule(which=st.integers(0, 2), explicit=st.booleans())
    def roll_back(self, which: int, explicit: bool) -> None:
        reader = self.opened()[which % len(self.opened())]
        assert reader.epoch is not None
        if explicit:
            reader.epoch.rollback()
            # Too late: it has been given back.
            reader.epoch.commit()
        else:
            reader.epoch.__exit__(OSError, OSError(), None)
        for slot, pages in reader.taken.items():
            if slot in reader.pending:
                reader.pending[slot] |= pages
        reader.taken, reader.epoch = {}, None

    def teardown(self) -> None:
        self.log.stop()
        self.memory.close()


class ConsumersOverChanges(Consumers):
    """The same, while slots come and go and the log restarts."""

    @precondition(lambda self: 2 not in self.port)
    @rule()
    def add_logged_slot(self) -> None:
        self.memory.add_slot(2, 2 << 10, NPAGES[2], SlotFlags.LOG_DIRTY_PAGES)
        self.port[2], self.unread[2] = set(), set()

    @rule(slot=st.sampled_from([1, 2]))
    def remove_slot(self, slot: int) -> None:
        if slot in self.port:
            self.memory.remove_slot(slot)
            for mine in (self.port, self.unread, *(reader.pending for reader in self.readers.values())):
                mine.pop(slot, None)
            for reader in self.readers.values():
                reader.taken.pop(slot, None)

    @rule(pages=st.sets(st.integers(0, 129)))
    def restart(self, pages: set[int]) -> None:
        self.log.stop()
        write(self.memory, 0, pages)
        self.log.start()
        self.port = {slot: set() for slot in self.port}
        self.unread = {slot: set() for slot in self.port}
        for reader in self.readers.values():
            reader.pending, reader.taken = {}, {}


TestConsumersAgainstSets = Consumers.TestCase
TestConsumersAgainstSets.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
TestConsumersOverChangesAgainstSets = ConsumersOverChanges.TestCase
TestConsumersOverChangesAgainstSets.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)


# --- epochs of one consumer


def test_consecutive_epochs_have_each_page_once() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        consumer = log.consumer("a")
        write(memory, 0, [0, 129])
        assert take(consumer) == {0: {0, 129}}
        write(memory, 1, [5])
        assert take(consumer) == {1: {5}}
        assert take(consumer) == {}


def test_an_epoch_has_a_bitmap_for_each_logged_slot() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        memory.add_slot(2, 2 << 10, NPAGES[2])
        with log.consumer("a").epoch() as epoch:
            assert {slot: bitmap.npages for slot, bitmap in epoch.dirty.items()} == {0: 130, 1: 64}


def test_an_exception_rolls_back_and_goes_on() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        consumer = log.consumer("a")
        write(memory, 0, [3])
        for failure in (OSError("disk full"), KeyboardInterrupt(), GeneratorExit()):
            with pytest.raises(type(failure)), consumer.epoch():
                raise failure
        write(memory, 0, [4])

        assert take(consumer) == {0: {3, 4}}
        assert take(consumer) == {}


def test_pages_written_while_an_epoch_is_open_are_in_the_next() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        consumer = log.consumer("a")
        write(memory, 0, [3, 4])
        with consumer.epoch() as epoch:
            write(memory, 0, [4, 5])
            assert pages_of(epoch.dirty) == {0: {3, 4}}

        assert take(consumer) == {0: {4, 5}}


def test_a_rollback_keeps_what_was_written_since() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        consumer = log.consumer("a")
        write(memory, 0, [3, 4])
        with consumer.epoch() as epoch:
            write(memory, 0, [4, 5])
            epoch.rollback()

        assert take(consumer) == {0: {3, 4, 5}}


def test_a_rollback_keeps_what_another_reader_drained_since() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        consumer, other = log.consumer("a"), log.consumer("b")
        write(memory, 0, [3, 4])
        with consumer.epoch() as epoch:
            write(memory, 0, [4, 5])
            take(other)
            write(memory, 0, [6])
            got(log, 0)
            epoch.rollback()

        assert take(consumer) == {0: {3, 4, 5, 6}}


def test_only_the_first_of_commit_and_rollback_counts() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        consumer = log.consumer("a")
        write(memory, 0, [3])
        with suppress(OSError), consumer.epoch() as epoch:
            epoch.commit()
            epoch.commit()
            epoch.rollback()
            raise OSError
        assert take(consumer) == {}

        write(memory, 0, [4])
        with consumer.epoch() as epoch:
            epoch.rollback()
            epoch.rollback()
            epoch.commit()
        assert take(consumer) == {0: {4}}


def test_an_ended_epoch_has_no_say_in_the_next() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        consumer = log.consumer("a")
        with consumer.epoch() as first:
            pass
        write(memory, 0, [3])
        with suppress(OSError), consumer.epoch():
            first.commit()
            raise OSError
        assert take(consumer) == {0: {3}}
        write(memory, 0, [4])
        with consumer.epoch():
            first.rollback()
        assert take(consumer) == {}


def test_an_epoch_that_was_never_entered_takes_and_gives_nothing() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        consumer = log.consumer("a")
        epoch = consumer.epoch()
        write(memory, 0, [3])
        epoch.rollback()
        epoch.commit()

        assert epoch.dirty == {}
        assert take(consumer) == {0: {3}}


def test_a_consumer_has_one_epoch_open_at_a_time() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        consumer, other = log.consumer("a"), log.consumer("b")
        write(memory, 0, [3])
        with consumer.epoch() as epoch:
            with pytest.raises(InvalidArgumentError, match="consumer 'a' has an epoch open"):
                consumer.epoch().__enter__()
            assert take(other) == {0: {3}}
            # The refusal did not end the epoch that is open.
            epoch.rollback()

        assert take(consumer) == {0: {3}}


def test_an_ended_epoch_makes_room_at_once() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        consumer = log.consumer("a")
        with consumer.epoch() as epoch:
            write(memory, 0, [3])
            epoch.commit()
            assert take(consumer) == {0: {3}}


def test_changing_what_an_epoch_gave_changes_nothing_that_a_rollback_gives_back() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        consumer = log.consumer("a")
        write(memory, 0, [3, 70])
        for _ in range(2):
            with consumer.epoch() as epoch:
                assert pages_of(epoch.dirty) == {0: {3, 70}}
                epoch.dirty[0].clear()
                epoch.dirty[1].set_pages([9])
                epoch.dirty[0].words[1] = 1
                del epoch.dirty[1]
                epoch.rollback()

        assert take(consumer) == {0: {3, 70}}


# --- several readers


def test_neither_consumers_nor_get_steal_from_each_other() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        first, second = log.consumer("a"), log.consumer("b")
        write(memory, 0, [1])
        assert take(first) == {0: {1}}
        write(memory, 0, [2])
        assert got(log, 0) == {1, 2}
        write(memory, 0, [3])

        assert take(second) == {0: {1, 2, 3}}
        assert take(first) == {0: {2, 3}}
        assert got(log, 0) == {3}
        assert take(first) == take(second) == {}
        assert got(log, 0) == set()


def test_get_into_a_bitmap_replaces_what_was_there_also_when_consumers_drained_the_port() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        write(memory, 0, [1])
        take(log.consumer("a"))
        write(memory, 0, [2])
        out = DirtyBitmap.from_pages(130, [99])

        assert log.get(0, out) is out
        assert out.pages().tolist() == [1, 2]


def test_a_get_that_fails_takes_from_nobody() -> None:
    class Broken(DirtyBitmap):
        def assign(self, other: DirtyBitmap) -> None:
            raise MemoryError(other)

    memory = make_memory()
    with DirtyLog(memory) as log:
        first, second = log.consumer("a"), log.consumer("b")
        write(memory, 0, [1])
        take(first)
        write(memory, 0, [2])
        with pytest.raises(CopyFaultError):
            log.get(0, Broken(130))

        assert take(first) == {0: {2}}
        assert take(second) == {0: {1, 2}}
        assert got(log, 0) == {1, 2}


def test_a_name_is_one_consumer() -> None:
    with make_memory() as memory:
        log = DirtyLog(memory)

        assert log.consumer("a") is log.consumer("a")
        assert log.consumer("a") is not log.consumer("b")
        assert DirtyLog(memory).consumer("a") is not log.consumer("a")
        assert log.consumer("a").name == "a"
        assert repr(log.consumer("a")) == "Consumer('a')"


def test_a_late_consumer_begins_with_what_nobody_had_taken() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        write(memory, 0, [1])
        take(log.consumer("early"))
        write(memory, 0, [2])
        got(log, 0)
        write(memory, 0, [3])

        late = log.consumer("late")
        write(memory, 0, [4])

        assert take(late) == {0: {3, 4}}


# --- starts and stops


def test_a_consumer_from_before_the_first_start_begins_clean() -> None:
    memory = make_memory()
    log = DirtyLog(memory)
    consumer = log.consumer("a")
    write(memory, 0, [1])
    with log:
        write(memory, 0, [2])
        assert take(consumer) == {0: {2}}


def test_while_nothing_is_logged_an_epoch_is_empty() -> None:
    log = DirtyLog(make_memory())
    with log.consumer("a").epoch() as epoch:
        assert epoch.dirty == {}


def test_after_a_restart_an_older_consumer_finds_every_page_dirty_once() -> None:
    memory = make_memory()
    log = DirtyLog(memory)
    with log:
        consumer = log.consumer("a")
        take(consumer)
    write(memory, 0, [1])
    with log:
        assert take(consumer) == {0: ALL[0], 1: ALL[1]}
        write(memory, 0, [2])
        assert take(consumer) == {0: {2}}


def test_after_a_restart_a_get_before_the_epoch_hides_no_page_of_it() -> None:
    memory = make_memory()
    log = DirtyLog(memory)
    with log:
        consumer = log.consumer("a")
    write(memory, 0, [1])
    with log:
        write(memory, 0, [2])
        assert got(log, 0) == {2}

        assert take(consumer) == {0: ALL[0], 1: ALL[1]}


def test_a_consumer_made_after_the_restart_begins_clean() -> None:
    memory = make_memory()
    log = DirtyLog(memory)
    with log:
        log.consumer("old")
    with log:
        consumer = log.consumer("new")
        write(memory, 1, [2])

        assert take(consumer) == {1: {2}}


@pytest.mark.parametrize("end", [Epoch.commit, Epoch.rollback], ids=lambda end: end.__name__)
def test_an_epoch_that_is_open_over_a_restart_takes_nothing_from_the_next(end: Callable[[Epoch], None]) -> None:
    memory = make_memory()
    log = DirtyLog(memory)
    with log:
        consumer = log.consumer("a")
        write(memory, 0, [1])
        epoch = consumer.epoch().__enter__()
    with log:
        end(epoch)
        assert take(consumer) == {0: ALL[0], 1: ALL[1]}


def test_after_a_restart_get_begins_clean() -> None:
    memory = make_memory()
    log = DirtyLog(memory)
    with log:
        write(memory, 0, [1])
        take(log.consumer("a"))
    with log:
        write(memory, 0, [2])
        assert got(log, 0) == {2}


# --- slots that come and go


def test_a_slot_added_later_is_all_dirty_once() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        consumer = log.consumer("a")
        take(consumer)
        memory.add_slot(2, 2 << 10, NPAGES[2], SlotFlags.LOG_DIRTY_PAGES)

        assert take(consumer) == {2: ALL[2]}
        write(memory, 2, [6])
        assert take(consumer) == {2: {6}}


def test_a_get_of_a_slot_added_later_hides_no_page_of_it() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        consumer = log.consumer("a")
        memory.add_slot(2, 2 << 10, NPAGES[2], SlotFlags.LOG_DIRTY_PAGES)
        write(memory, 2, [6])
        assert got(log, 2) == {6}

        assert take(consumer) == {2: ALL[2]}


def test_a_clear_in_a_slot_added_later_hides_no_page_of_it() -> None:
    memory = make_memory()
    with DirtyLog(memory, manual_protect=True) as log:
        consumer = log.consumer("a")
        memory.add_slot(2, 2 << 10, NPAGES[2], SlotFlags.LOG_DIRTY_PAGES)
        write(memory, 2, [6])
        log.clear(2, 0, log.get(2))

        assert take(consumer) == {2: ALL[2]}


def test_a_consumer_made_after_the_slot_finds_only_what_is_written() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        memory.add_slot(2, 2 << 10, NPAGES[2], SlotFlags.LOG_DIRTY_PAGES)
        consumer = log.consumer("a")
        write(memory, 2, [6])

        assert take(consumer) == {2: {6}}


def test_a_removed_slot_is_gone_for_everybody() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        consumer = log.consumer("a")
        write(memory, 0, [3])
        write(memory, 1, [5])
        take(log.consumer("b"))
        memory.remove_slot(1)

        with consumer.epoch() as epoch:
            assert epoch.dirty.keys() == {0}
            assert pages_of(epoch.dirty) == {0: {3}}
        with pytest.raises(LoggingOffError):
            log.get(1)


def test_a_rollback_leaves_out_a_slot_that_went_meanwhile() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        consumer = log.consumer("a")
        write(memory, 0, [3])
        write(memory, 1, [5])
        with consumer.epoch() as epoch:
            memory.remove_slot(1)
            epoch.rollback()

        assert take(consumer) == {0: {3}}


def test_a_slot_removed_and_added_again_is_another_slot() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        consumer = log.consumer("a")
        write(memory, 1, [5])
        with consumer.epoch() as epoch:
            memory.remove_slot(1)
            memory.add_slot(1, 1 << 10, 9, SlotFlags.LOG_DIRTY_PAGES)
            epoch.rollback()

        assert take(consumer) == {1: set(range(9))}
        assert got(log, 1) == set()


def test_a_slot_that_moved_keeps_its_pages() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        consumer = log.consumer("a")
        write(memory, 1, [5])
        memory.move_slot(1, 5 << 10)
        write(memory, 1, [6])

        assert take(consumer) == {1: {5, 6}}


@pytest.mark.parametrize("read", ["an epoch", "a get"])
def test_a_slot_is_not_replaced_in_the_middle_of(read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = make_memory()
    with DirtyLog(memory) as log, ThreadPoolExecutor(1) as other_thread:
        consumer = log.consumer("a")
        write(memory, 1, [63])
        take_from_port = log._take

        def replace_slot() -> None:
            # Whoever holds slots_lock has the slot to itself; waiting for it here would wait for ever.
            if memory.slots.lock.acquire(blocking=False):
                memory.remove_slot(1)
                memory.add_slot(1, 1 << 10, 200, SlotFlags.LOG_DIRTY_PAGES)
                write(memory, 1, [199])
                memory.slots.lock.release()

        def take_late(memory: Memory, slot: int, copy: Callable[[DirtyBitmap], None]) -> None:
            other_thread.submit(replace_slot).result()
            take_from_port(memory, slot, copy)

        monkeypatch.setattr(log, "_take", take_late)
        if read == "a get":
            assert got(log, 1) == {63}
        assert take(consumer) == {1: {63}}


# --- manual protect


def test_with_manual_protect_epochs_take_and_get_goes_on_reading() -> None:
    memory = make_memory()
    with DirtyLog(memory, manual_protect=True) as log:
        first, second = log.consumer("a"), log.consumer("b")
        write(memory, 0, [3, 70])
        assert got(log, 0) == got(log, 0) == {3, 70}
        assert take(first) == {0: {3, 70}}
        write(memory, 0, [4])

        assert got(log, 0) == {3, 4, 70}
        assert take(second) == {0: {3, 4, 70}}
        assert take(first) == {0: {4}}
        assert got(log, 0) == {3, 4, 70}


def test_with_manual_protect_a_clear_takes_from_get_and_from_no_consumer() -> None:
    memory = make_memory()
    with DirtyLog(memory, manual_protect=True) as log:
        first, second = log.consumer("a"), log.consumer("b")
        write(memory, 0, [3, 70])
        take(first)
        write(memory, 0, [4, 129])
        # Page 5 was never dirty, and 70 only in what was drained.
        log.clear(0, 64, DirtyBitmap.from_pages(66, [70 - 64, 129 - 64]))
        log.clear(0, 0, DirtyBitmap.from_pages(64, [4, 5]))

        assert got(log, 0) == {3}
        assert take(first) == {0: {4, 129}}
        assert take(second) == {0: {3, 4, 70, 129}}
        assert got(log, 0) == {3}


def test_a_refused_clear_takes_from_nobody() -> None:
    memory = make_memory()
    with DirtyLog(memory, manual_protect=True) as log:
        consumer = log.consumer("a")
        write(memory, 0, [3])
        take(log.consumer("b"))
        with pytest.raises(InvalidArgumentError, match="multiple of 64"):
            log.clear(0, 1, DirtyBitmap.from_pages(129, [2]))

        assert got(log, 0) == {3}
        assert take(consumer) == {0: {3}}


def test_initially_all_set_is_all_dirty_for_every_reader() -> None:
    memory = make_memory()
    log = DirtyLog(memory, manual_protect=True, initially_all_set=True)
    early = log.consumer("early")
    with log:
        late = log.consumer("late")

        assert take(early) == {0: ALL[0], 1: ALL[1]}
        assert take(late) == {0: ALL[0], 1: ALL[1]}
        assert got(log, 0) == ALL[0]


# --- interrupts


def test_an_interrupt_at_any_point_of_an_epoch_loses_no_page() -> None:
    for step in itertools.count():
        memory = make_memory()
        log = DirtyLog(memory)
        log.start()
        consumer, other = log.consumer("a"), log.consumer("b")
        write(memory, 0, [1, 70])
        write(memory, 1, [2])
        epoch, saved = consumer.epoch(), set[int]()

        def run(epoch: Epoch = epoch, saved: set[int] = saved) -> None:
            with epoch:
                saved.update(epoch.dirty[0].pages().tolist())

        interrupted = interrupt(run, step)
        # An interrupt at the first instruction of __exit__ leaves the epoch open.
        epoch.rollback()

        assert take(consumer).get(0, set()) | saved == {1, 70}, f"interrupted at point {step}"
        assert take(other) == {0: {1, 70}, 1: {2}}, f"interrupted at point {step}"
        assert got(log, 0) == {1, 70}, f"interrupted at point {step}"
        log.stop()
        if not interrupted:
            break
    assert step > 50, "the points were not seen"


def test_an_interrupt_at_any_point_of_a_get_loses_no_page() -> None:
    for step in itertools.count():
        memory = make_memory()
        log = DirtyLog(memory)
        log.start()
        consumer = log.consumer("a")
        write(memory, 0, [1])
        take(log.consumer("b"))
        write(memory, 0, [2, 70])
        out = DirtyBitmap(130)

        interrupted = interrupt(lambda log=log, out=out: log.get(0, out), step)  # type: ignore[misc]  # bound early

        assert got(log, 0) | set(out.pages().tolist()) == {1, 2, 70}, f"interrupted at point {step}"
        assert take(consumer) == {0: {1, 2, 70}}, f"interrupted at point {step}"
        assert {2, 70} <= take(log.consumer("b"))[0] <= {1, 2, 70}, f"interrupted at point {step}"
        log.stop()
        if not interrupted:
            break
    assert step > 20, "the points were not seen"


def test_an_interrupt_at_any_point_of_a_stop_hides_nothing_from_older_consumers() -> None:
    for step in itertools.count():
        memory = make_memory()
        log = DirtyLog(memory)
        log.start()
        consumer = log.consumer("a")
        write(memory, 0, [1])

        interrupted = interrupt(log.stop, step)
        write(memory, 0, [2])
        try:
            log.start()
        except InvalidArgumentError:  # it had not got to the last slot
            log.stop()
            log.start()

        assert take(consumer) == {0: ALL[0], 1: ALL[1]}, f"interrupted at point {step}"
        log.stop()
        if not interrupted:
            break
    assert step > 20, "the points were not seen"


# --- threads


def test_every_one_of_many_threads_sees_everything_written() -> None:
    memory = EmulatedMemory(PORTS["x86"])
    npages, rounds = 512, 300
    memory.add_slot(0, 0, npages)
    writing = threading.Event()
    writing.set()

    with DirtyLog(memory) as log, ThreadPoolExecutor() as threads:
        consumers = [log.consumer(f"consumer {number}") for number in range(4)]

        def write_all() -> set[int]:
            random = np.random.default_rng(0)
            written: set[int] = set()
            try:
                for value in range(rounds):
                    pages = random.choice(npages, 8, replace=False)
                    memory.write(0, pages, np.full((8, 4096), value % 251 + 1, np.uint8))
                    written.update(pages.tolist())
            finally:
                writing.clear()
            return written

        def follow(consumer: Consumer, fail_every: int) -> tuple[set[int], list[int]]:
            """Return all pages that came, and what the first byte of each page was when it came last."""
            seen: set[int] = set()
            mirror = np.zeros(npages, np.uint8)
            for number in itertools.count():
                last = not writing.is_set()
                with suppress(OSError), consumer.epoch() as epoch:
                    if not last and fail_every and number % fail_every == 0:
                        raise OSError
                    pages = epoch.dirty[0].pages()
                    mirror[pages] = memory.read(0, pages)[:, 0]
                    seen.update(pages.tolist())
                if last:
                    return seen, mirror.tolist()
            raise AssertionError

        def get() -> tuple[set[int], list[int]]:
            seen: set[int] = set()
            mirror = np.zeros(npages, np.uint8)
            last = False
            while not last:
                last = not writing.is_set()
                pages = log.get(0).pages()
                mirror[pages] = memory.read(0, pages)[:, 0]
                seen.update(pages.tolist())
            return seen, mirror.tolist()

        readers = [threads.submit(follow, consumer, fail_every) for fail_every, consumer in enumerate(consumers)]
        readers.append(threads.submit(get))
        written = threads.submit(write_all).result()

        content = memory.read(0, range(npages))[:, 0].tolist()
        for reader in readers:
            assert reader.result() == (written, content)


def test_threads_that_ask_for_one_name_at_once_get_one_consumer() -> None:
    with make_memory() as memory:
        log = DirtyLog(memory)
        together = threading.Barrier(8)

        def ask() -> Consumer:
            together.wait()
            return log.consumer("a")

        with ThreadPoolExecutor(8) as threads:
            found = [thread.result() for thread in [threads.submit(ask) for _ in range(8)]]

        assert all(consumer is log.consumer("a") for consumer in found)


def test_of_threads_that_enter_an_epoch_at_once_one_gets_it() -> None:
    memory = make_memory()
    with DirtyLog(memory) as log:
        consumer = log.consumer("a")
        write(memory, 0, [3])
        together = threading.Barrier(4)

        def enter() -> dict[int, set[int]] | None:
            together.wait()
            try:
                return pages_of(consumer.epoch().__enter__().dirty)
            except InvalidArgumentError:
                return None

        with ThreadPoolExecutor(4) as threads:
            found = [thread.result() for thread in [threads.submit(enter) for _ in range(4)]]

        assert sorted(found, key=bool) == [None, None, None, {0: {3}}]

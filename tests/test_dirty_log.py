"""The kernel's dirty_log_test, ported: the guest runs freely, the log is read, and what it says is held against the memory.

After each get the first word of every page is read. A page whose word changed since the reading before was written in
between. If this get did not report it, the write came after the get's snapshot, and *the next get must report it* (the
track-next rule). The other way round, these ports are exact: a page is reported only if it was written since the last report.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dirtylog import DirtyLog, UnsupportedError
from dirtylog.guests.machine import RAM_SLOT
from sources import has_manual_protect, open_source, sources

if TYPE_CHECKING:
    from dirtylog import DirtyBitmap
    from dirtylog.emulated.machine import EmulatedMemory
    from dirtylog.kvm.memory import KvmMemory
    from store_guests import BufferGuest, ProcessGuest

    AnyMemory = EmulatedMemory | KvmMemory | BufferGuest | ProcessGuest

LENGTHS = (1024, 1025, 1027, 1040, 1087, 3, 40)
"""Remainders 0, 1, 3, 16 and 63 modulo 64, and shorter than 64 pages."""

ROUNDS = 12


def first_words(memory: AnyMemory) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return memory.contents(memory.slots[RAM_SLOT])[:, :8].copy().view(np.uint64).ravel()


class TrackNext:
    """The oracle: what must be in the next report, and what may be."""

    def __init__(self, memory: AnyMemory, late: int) -> None:
        self._memory = memory
        self._late = late
        # Pages seen to change and not reported yet, by how many reports they have missed.
        self._owed: dict[int, int] = {}
        self._words = first_words(memory)
        self._changed = [set[int]() for _ in range(late + 2)]
        self.reported = 0

    def check(self, dirty: DirtyBitmap, *, last: bool = False, everything_may_be_reported: bool = False) -> None:
        pages = set(dirty.pages().tolist())
        self.reported += len(pages)
        words = first_words(self._memory)
        changed = set(np.flatnonzero(words != self._words).tolist())
        self._words = words
        for page in pages:
            self._owed.pop(page, None)
        overdue = {page for page, missed in self._owed.items() if missed >= self._late}
        assert not overdue, f"written, and in neither of the next reports: {sorted(overdue)[:10]}"
        self._owed = {page: missed + 1 for page, missed in self._owed.items()}
        # A page written after this snapshot is owed even if the snapshot has it: but then nobody can tell it from before.
        for page in changed - pages:
            self._owed.setdefault(page, 0)
        if last:
            assert not self._owed, f"written before the guest was paused, never reported: {sorted(self._owed)[:10]}"
        self._changed = [changed, *self._changed[:-1]]
        unwritten = pages - set().union(*self._changed)
        everything_may_be_reported |= getattr(self._memory.stats, "ring_overflows", 0) > 0
        # A vCPU that is kicked in the middle of a store makes it again when it goes on: the page is reported again, unchanged.
        assert everything_may_be_reported or len(unwritten) <= len(self._memory.vcpus), (
            f"reported, but not written: {sorted(unwritten)}"
        )


@pytest.mark.parametrize("npages", LENGTHS)
@pytest.mark.parametrize("source", sources())
def test_get_and_clear_while_the_guest_runs(source: str, npages: int) -> None:
    with open_source(source, npages * 4096, program="random") as memory, DirtyLog(memory) as log:
        oracle = TrackNext(memory, late=1 if source == "ppc-hv" else 0)
        memory.resume()
        for _ in range(ROUNDS):
            time.sleep(0.004)
            oracle.check(log.get(RAM_SLOT))
        memory.pause()
        oracle.check(log.get(RAM_SLOT), last=True)
        memory.check()
        assert oracle.reported > 0
        assert not log.get(RAM_SLOT).any(), "the guest is paused: a second get finds nothing"


@pytest.mark.parametrize("npages", LENGTHS)
@pytest.mark.parametrize("source", sources(has_manual_protect))
def test_manual_protect_initially_all_set_while_the_guest_runs(source: str, npages: int) -> None:
    with (
        open_source(source, npages * 4096, program="random") as memory,
        DirtyLog(memory, manual_protect=True, initially_all_set=True) as log,
    ):
        first = log.get(RAM_SLOT)
        assert first.count() == npages, "every page, and none past the end"
        oracle = TrackNext(memory, late=0)
        memory.resume()
        for number in range(ROUNDS):
            time.sleep(0.004)
            dirty = log.get(RAM_SLOT)
            log.clear(RAM_SLOT, 0, dirty)
            oracle.check(dirty, everything_may_be_reported=number == 0)
        memory.pause()
        dirty = log.get(RAM_SLOT)
        assert dirty == log.get(RAM_SLOT), "a get of manual protect changes nothing"
        log.clear(RAM_SLOT, 0, dirty)
        oracle.check(dirty, last=True)
        memory.check()
        assert not log.get(RAM_SLOT).any()


@pytest.mark.parametrize("source", sources(lambda port: not has_manual_protect(port)))
def test_a_port_without_manual_protect_says_so(source: str) -> None:
    with open_source(source, 64 * 4096) as memory, pytest.raises(UnsupportedError, match="manual protect"):
        DirtyLog(memory, manual_protect=True)


@pytest.mark.parametrize("source", sources())
def test_a_store_to_a_page_already_dirty_is_reported_once(source: str) -> None:
    with open_source(source, 64 * 4096, program="hotset") as memory, DirtyLog(memory) as log:
        memory.resume()
        time.sleep(0.02)
        memory.pause()
        assert log.get(RAM_SLOT).count() == 2, "the hot set of this program has a 32nd of the window's pages"
        assert log.get(RAM_SLOT).count() == 0


@pytest.mark.parametrize("source", sources())
def test_an_idle_guest_reports_nothing(source: str) -> None:
    with open_source(source, 64 * 4096, program="idle") as memory, DirtyLog(memory) as log:
        memory.resume()
        assert memory.wait(timeout=10)
        assert not log.get(RAM_SLOT).any()


@pytest.mark.parametrize("source", sources())
def test_four_vcpus_in_one_memory_lose_nothing(source: str) -> None:
    with open_source(source, 515 * 4096, program="random", vcpus=4) as memory, DirtyLog(memory) as log:
        oracle = TrackNext(memory, late=1 if source == "ppc-hv" else 0)
        memory.resume()
        for _ in range(ROUNDS):
            time.sleep(0.01)
            oracle.check(log.get(RAM_SLOT))
        memory.pause()
        oracle.check(log.get(RAM_SLOT), last=True)
        memory.check()

"""KVM guests that run freely while their log is read, from several threads, while slots come and go."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dirtylog import DirtyBitmap, DirtyLog, LoggingOffError, SlotFlags
from dirtylog.guests.programs import Pattern
from dirtylog.kvm.guest import make_kvm_guest
from dirtylog.kvm.memory import KvmRingStats
from dirtylog.kvm.ring_port import KvmRingPort
from dirtylog.options import KvmOptions, Log
from kvm_here import needs_kvm
from kvm_scene import LOGS

if TYPE_CHECKING:
    from collections.abc import Callable

    from dirtylog.kvm.memory import KvmMemory

pytestmark = needs_kvm
RAM = 0
LOGGED_STORES = 1_000_000
every_log = pytest.mark.parametrize("log", LOGS)


def endless(pages: int, vcpus: int) -> list[Pattern]:
    """Return loops that never end, each vCPU over a window of its own in a pseudo-random order that meets every page."""
    return [Pattern(base=index * pages << 12, mul=0x5D588B65 & 0x3FFFFFFF, add=0x269EC3, mask=pages - 1) for index in range(vcpus)]


def guest(log: Log, npages: int, loops: list[Pattern], ring_entries: int = 65536) -> KvmMemory:
    """Return a paused guest with a vCPU for each loop."""
    return make_kvm_guest(npages << 12, vcpus=len(loops), loops=loops, options=KvmOptions(log=log, ring_entries=ring_entries))


def follow(memory: KvmMemory, copy: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], dirty: DirtyBitmap) -> int:
    pages = dirty.pages()
    copy[pages] = memory.read(RAM, pages)
    return len(pages)


def last_values(pattern: Pattern, stores: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Return what each page of the window holds after so many stores: an oracle that has seen no log and no memory."""
    period = pattern.mask + 1
    order = np.empty(period, np.int64)
    page = pattern.page
    for number in range(period):
        order[number] = page
        page = page * pattern.mul + pattern.add & pattern.mask
    values = np.zeros(period, np.uint64)
    last = np.arange(max(0, stores - period), stores)
    values[order[last % period]] = pattern.value + last
    return values


@every_log
def test_a_million_logged_stores_lose_nothing(log: str) -> None:
    """Each store counts that was the first to its page since a get: over a million page reports, the guest never stopped."""
    pages, vcpus = 8192, 2
    loops = endless(pages, vcpus)
    with guest(Log(log), vcpus * pages, loops) as memory:
        copy = memory.read(RAM, np.arange(vcpus * pages))
        with DirtyLog(memory) as dirty_log:
            memory.resume()
            reports = 0
            while reports < LOGGED_STORES:
                time.sleep(0.008)
                reports += follow(memory, copy, dirty_log.get(RAM))
                memory.check()
            memory.pause()
            reports += follow(memory, copy, dirty_log.get(RAM))
            assert not dirty_log.get(RAM).any()
        stored = 0
        for index, pattern in enumerate(loops):
            values = copy[index * pages : (index + 1) * pages, :8].copy().view(np.uint64).ravel()
            stores = int(values.max())  # values count from 1
            stored += stores
            lost = np.flatnonzero(values != last_values(pattern, stores))
            assert not len(lost), f"vCPU {index}: {len(lost)} pages lost, first {lost[:5]}"
        assert np.array_equal(copy, memory.read(RAM, np.arange(vcpus * pages)))
        if not overflows(memory):
            assert reports <= stored, "a page was reported more often than it was stored to"


def overflows(memory: KvmMemory) -> int:
    return memory.stats.ring_overflows if isinstance(memory.stats, KvmRingStats) else 0


@pytest.mark.parametrize("collector", [True, False], ids=["collector", "no collector"])
@pytest.mark.parametrize("entries", [256, 512, 4096])
def test_rings_that_fill_all_the_time_lose_nothing(entries: int, collector: bool) -> None:
    """Whether its guest stops in time (a full exit) or runs on and overflows (then every page is reported)."""
    memory = guest(Log.RING, 16384, [Pattern(base=0, page=index, mask=16383) for index in range(2)], ring_entries=entries)
    with memory, DirtyLog(memory) as dirty_log:
        if not collector:
            assert isinstance(memory.port, KvmRingPort)
            memory.port.end_collector()
        copy = memory.read(RAM, np.arange(16384))
        memory.resume()
        for _ in range(20):
            time.sleep(0.015)
            follow(memory, copy, dirty_log.get(RAM))
            memory.check()
        memory.pause()
        follow(memory, copy, dirty_log.get(RAM))
        assert np.array_equal(copy, memory.read(RAM, np.arange(16384)))
        stats = memory.stats
        assert isinstance(stats, KvmRingStats)
        assert collector or entries > 512 or stats.ring_full_exits + stats.ring_overflows > 0, "the ring was never full"
        assert stats.ring_entries > 4 * entries


def run_together(seconds: float, *bodies: Callable[[], object]) -> None:
    """Call each body over and over on a thread of its own for a while, and raise what one of them raised."""
    until = time.monotonic() + seconds
    errors: list[BaseException] = []

    def repeat(body: Callable[[], object]) -> None:
        try:
            while time.monotonic() < until and not errors:
                body()
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@every_log
def test_gets_from_several_threads_share_what_there_is_and_lose_nothing(log: str) -> None:
    with (
        guest(Log(log), 2048, endless(2048, 1)) as memory,
        DirtyLog(memory) as dirty_log,
    ):
        copy = memory.read(RAM, np.arange(2048))
        lock = threading.Lock()

        def get() -> None:
            with lock:  # a get and its copy are one step for whoever keeps one copy
                follow(memory, copy, dirty_log.get(RAM))

        consumer = dirty_log.consumer("other")
        other = copy.copy()

        def take() -> None:
            with consumer.epoch() as epoch:
                follow(memory, other, epoch.dirty[RAM])

        memory.resume()
        run_together(0.5, get, get, take, lambda: memory.write(RAM, [2047], np.full((1, 4096), 1, np.uint8)))
        memory.pause()
        get()
        take()
        now = memory.read(RAM, np.arange(2048))
        assert np.array_equal(copy, now)
        assert np.array_equal(other, now)


def test_gets_and_clears_of_manual_protect_from_several_threads_lose_nothing() -> None:
    with (
        guest(Log.MANUAL, 2048, endless(2048, 1)) as memory,
        DirtyLog(memory, manual_protect=True, initially_all_set=True) as dirty_log,
    ):
        copy = memory.read(RAM, np.arange(2048))
        lock = threading.Lock()

        def clear(first: int) -> None:
            """Take a quarter: clear, then copy."""
            with lock:
                mask = DirtyBitmap.from_pages(512, [page - first for page in dirty_log.get(RAM).pages() if 0 <= page - first < 512])
                dirty_log.clear(RAM, first, mask)
                pages = mask.pages() + first
                copy[pages] = memory.read(RAM, pages)

        memory.resume()
        run_together(
            0.6, lambda: clear(0), lambda: clear(512), lambda: clear(1024), lambda: clear(1536), lambda: dirty_log.get(RAM)
        )
        memory.pause()
        for first in range(0, 2048, 512):
            clear(first)
        assert not dirty_log.get(RAM).any()
        assert np.array_equal(copy, memory.read(RAM, np.arange(2048)))


@every_log
def test_slots_are_toggled_moved_and_deleted_while_gets_run_and_the_guest_stores(log: str) -> None:
    with (
        guest(Log(log), 1024, endless(1024, 1)) as memory,
        DirtyLog(memory) as dirty_log,
    ):
        copy = memory.read(RAM, np.arange(1024))
        memory.add_slot(7, 1 << 20, 70, SlotFlags.LOG_DIRTY_PAGES)
        state = {"base": 1 << 20}

        def get_ram() -> None:
            follow(memory, copy, dirty_log.get(RAM))

        def get_other() -> None:
            with contextlib.suppress(LoggingOffError):  # it may be gone just then
                dirty_log.get(7)

        def move() -> None:
            state["base"] ^= 1 << 16
            memory.move_slot(7, state["base"])

        def delete() -> None:
            with memory.slots.lock:
                memory.remove_slot(7)
                memory.add_slot(7, state["base"], 131, SlotFlags.LOG_DIRTY_PAGES)

        def churn() -> None:
            move()
            memory.write(7, [3], np.full((1, 4096), 1, np.uint8))
            delete()

        memory.resume()
        run_together(0.6, get_ram, get_other, churn)
        memory.pause()
        memory.check()
        get_ram()
        assert np.array_equal(copy, memory.read(RAM, np.arange(1024)))


@every_log
def test_logging_is_switched_off_and_on_while_the_guest_stores(log: str) -> None:
    """What was written while it was off nobody knows; from each start on nothing is missing."""
    with guest(Log(log), 1024, endless(1024, 1)) as memory:
        memory.resume()
        for _ in range(8):
            with DirtyLog(memory) as dirty_log:
                copy = memory.read(RAM, np.arange(1024))  # after the start: what comes between is reported
                for _ in range(5):
                    time.sleep(0.002)
                    follow(memory, copy, dirty_log.get(RAM))
                memory.pause()
                follow(memory, copy, dirty_log.get(RAM))
                assert np.array_equal(copy, memory.read(RAM, np.arange(1024)))
            memory.resume()
            time.sleep(0.003)


@every_log
def test_eight_vcpus_in_one_memory_lose_nothing(log: str) -> None:
    with guest(Log(log), 8 * 256, endless(256, 8)) as memory:
        copy = memory.read(RAM, np.arange(2048))
        with DirtyLog(memory) as dirty_log:
            memory.resume()
            for _ in range(12):
                time.sleep(0.02)
                follow(memory, copy, dirty_log.get(RAM))
            memory.pause()
            follow(memory, copy, dirty_log.get(RAM))
            assert np.array_equal(copy, memory.read(RAM, np.arange(2048)))
            assert all(cpu.exits for cpu in memory.cpus), "every vCPU ran"


@every_log
def test_a_reset_starts_the_guest_again(log: str) -> None:
    pattern = Pattern(base=0, mask=63, count=64)
    with guest(Log(log), 64, [pattern]) as memory, DirtyLog(memory) as dirty_log:
        for _ in range(3):
            memory.resume()
            assert memory.wait(timeout=30)
            assert dirty_log.get(RAM).count() == 64
            memory.reset()

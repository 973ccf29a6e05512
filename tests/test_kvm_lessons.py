"""Bugs that KVM's dirty log has had, and what keeps them out of here; the commit is KVM's fix.

The orders (edde99ce0529, e88643ba1acb) and the missing flush (7e71a59b2503) are in test_mutants.py, the range checks of the
clear (98938aa8edd6, 76d58e0f07ec, 4ddc9204572c) in test_errno.py, blocks (a216e24fc947) and lists of hardware logs
(37c3ddfe5238) in test_walkers.py.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest

from dirtylog import DirtyBitmap, DirtyLog, GuestFaultError, LoggingOffError, SlotFlags
from dirtylog.emulated.arch import PORTS
from dirtylog.emulated.cpu_trace import Access, TraceCpu
from dirtylog.emulated.machine import EmulatedMemory
from dirtylog.memslot import MEM_MAX_NR_PAGES
from dirtylog.port import ProtectPort
from dirtylog.slotbitmap import SlotBitmap
from scene import BASE_GFN, NPAGES, SLOT, Scene

if TYPE_CHECKING:
    from dirtylog.words import DirtyWords


def test_bitmaps_of_the_largest_slot_need_more_than_32_bits_87bf6e7de113() -> None:
    bitmap = SlotBitmap(MEM_MAX_NR_PAGES)
    last = MEM_MAX_NR_PAGES - 1
    bitmap.mark(last)
    bitmap.mark(0)
    assert bitmap.exchange().pages().tolist() == [0, last]


class Guarded(SlotBitmap):
    """A bitmap that knows its port, and lets nobody change it without mmu_lock."""

    port: Any

    def mark(self, page: int) -> None:
        assert self.port.mmu_lock.locked(), "marked without mmu_lock"
        super().mark(page)

    def merge(self, words: DirtyWords) -> None:
        assert not hasattr(self, "port") or self.port.mmu_lock.locked(), "merged without mmu_lock"
        super().merge(words)


@pytest.mark.parametrize("name", PORTS)
def test_every_marker_holds_mmu_lock_50e92b3c9711(name: str) -> None:
    """A read-modify-write of a word that another marker may change loses that marker's bit."""
    scene = Scene(PORTS[name])
    with DirtyLog(scene.memory) as log:
        bitmap = Guarded(NPAGES)
        bitmap.port = scene.memory.port
        scene.slot.dirty_bitmap = bitmap
        for page in (1, 2, 99):
            scene.store(page)
        scene.host_write(3)
        assert log.get(SLOT) == DirtyBitmap.from_pages(NPAGES, [1, 2, 3, 99])
        with pytest.raises(AssertionError, match="without mmu_lock"):
            bitmap.mark(5)


@pytest.mark.parametrize("name", PORTS)
def test_markers_of_one_word_in_many_threads_lose_no_bit_50e92b3c9711(name: str) -> None:
    scene = Scene(PORTS[name])
    port = scene.memory.port
    with DirtyLog(scene.memory) as log:
        taken = DirtyBitmap(NPAGES)

        def mark(vcpu: int) -> None:
            for page in range(vcpu, 128, 2):
                port.translate(vcpu, BASE_GFN + page, True)

        threads = [threading.Thread(target=mark, args=(vcpu,)) for vcpu in range(2)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            taken |= log.get(SLOT)
        for thread in threads:
            thread.join()
        taken |= log.get(SLOT)
        assert taken == DirtyBitmap.from_pages(NPAGES, range(128))


@pytest.mark.parametrize("name", PORTS)
def test_starting_the_log_flushes_always_b64d740ea7dd(name: str) -> None:
    """The table may hold no permission to take, and a stale translation may hold one all the same."""
    scene = Scene(PORTS[name])
    scene.store(3)
    with scene.memory.port.mmu_lock:
        scene.memory.port.unmap(scene.slot)  # nothing is left to protect, and nobody has flushed
    with DirtyLog(scene.memory) as log:
        scene.store(3)
        assert 3 in log.get(SLOT)


@pytest.mark.parametrize("name", PORTS)
def test_a_read_only_slot_stays_so_whatever_the_log_does_7c8a4742c4ab(name: str) -> None:
    """Protected by the log and protected for good are two reasons."""
    memory = EmulatedMemory(PORTS[name])
    memory.add_slot(0, 0, 64, SlotFlags.READONLY)
    cpu = TraceCpu(0, name, (), memory.port.translate, memory.host_memory)
    with DirtyLog(memory) as log:
        for _ in range(2):
            cpu.access(Access(0x1000))
            with pytest.raises(GuestFaultError) as caught:
                cpu.access(Access(0x1000, 1))
            assert caught.value.address == 0x1000
            assert not log.get(0).any()


@pytest.mark.parametrize("name", PORTS)
def test_a_page_is_marked_where_its_slot_is_now_aba(name: str) -> None:
    """Locking.rst: a lockless fault may mark the frame that an entry mapped before. A slot that moved is
    marked by its place now.
    """
    scene = Scene(PORTS[name])
    with DirtyLog(scene.memory) as log:
        scene.store(3)
        scene.memory.move_slot(SLOT, 700)
        scene.store(9)
        assert log.get(SLOT) == DirtyBitmap.from_pages(NPAGES, [3, 9]), "a slot keeps its log when it moves"
        with pytest.raises(GuestFaultError):
            scene.vcpus[0].cpu.access(Access((BASE_GFN + 9) << 12, 1))
        scene.store(3)
        assert log.get(SLOT) == DirtyBitmap.from_pages(NPAGES, [3])


@pytest.mark.parametrize("name", PORTS)
def test_host_writes_are_logged_0a61b222df75(name: str) -> None:
    scene = Scene(PORTS[name])
    with DirtyLog(scene.memory) as log:
        scene.host_write(5)
        scene.host_write(130)
        scene.load(6)
        assert log.get(SLOT) == DirtyBitmap.from_pages(NPAGES, [5, 130])
        assert not log.get(SLOT).any()


@pytest.mark.parametrize("name", PORTS)
def test_no_get_comes_between_a_host_write_s_bit_and_its_bytes(name: str) -> None:
    """It would take the bit, its caller read the old bytes, and the new ones be lost."""
    scene = Scene(PORTS[name])
    ram = scene.memory._ram[scene.slot]
    pages, lock = ram.pages, cast("threading.Lock", scene.memory.port.mmu_lock)
    held: list[bool] = []

    def marked() -> list[int]:
        assert scene.slot.dirty_bitmap is not None
        return [int(page) for page in scene.slot.dirty_bitmap.read().pages()]

    class Watching:
        def __setitem__(self, offsets: Any, contents: Any) -> None:
            held.append(lock.locked() and 7 in marked())
            pages[offsets] = contents

    with DirtyLog(scene.memory) as log:
        ram.pages = Watching()  # type: ignore[assignment]  # stands in for the array while it is written to
        scene.memory.write(SLOT, [7], np.full((1, 4096), 42, np.uint8))
        ram.pages = pages
        assert held == [True], "the bytes are written with the bit set and mmu_lock held"
        assert log.get(SLOT) == DirtyBitmap.from_pages(NPAGES, [7])
        assert (scene.contents()[7] == 42).all()


def test_a_slot_without_a_bitmap_is_looked_for_each_time_13a17cc0526f() -> None:
    scene = Scene(PORTS["x86"])
    log = DirtyLog(scene.memory)
    log.start()
    scene.store(1)
    log.stop()
    with pytest.raises(LoggingOffError):
        log.get(SLOT)
    scene.store(2)
    scene.host_write(3)
    with log:
        assert not log.get(SLOT).any(), "a log that starts again starts empty"


@pytest.mark.parametrize("name", PORTS)
def test_an_empty_batch_does_no_work_676f819c3e98(name: str) -> None:
    """A get with nothing dirty neither protects page 0 nor flushes."""
    scene = Scene(PORTS[name])
    with DirtyLog(scene.memory) as log:
        scene.store(0)
        log.get(SLOT)
        scene.load(0)
        flushes = scene.memory.stats.flushes
        assert not log.get(SLOT).any()
        assert scene.memory.stats.flushes == flushes
        assert scene.vcpus[0].cpu._tlb, "cached translations stay"


@pytest.mark.parametrize("name", PORTS)
def test_loads_are_not_writes(name: str) -> None:
    scene = Scene(PORTS[name])
    with DirtyLog(scene.memory) as log:
        for page in range(NPAGES):
            scene.load(page)
        assert not log.get(SLOT).any()
        for page in range(0, NPAGES, 2):
            scene.store(page)
        for page in range(NPAGES):
            scene.load(page, vcpu=1)
        assert log.get(SLOT) == DirtyBitmap.from_pages(NPAGES, range(0, NPAGES, 2))


@pytest.mark.parametrize("name", PORTS)
def test_two_getters_at_once_take_each_page_exactly_once(name: str) -> None:
    scene = Scene(PORTS[name], npages=1027)
    port = scene.memory.port
    with DirtyLog(scene.memory) as log:
        results: list[list[DirtyBitmap]] = [[], []]
        done = threading.Event()

        def getter(mine: list[DirtyBitmap]) -> None:
            while not done.is_set():
                mine.append(log.get(SLOT))

        threads = [threading.Thread(target=getter, args=(mine,)) for mine in results]
        for thread in threads:
            thread.start()
        for page in range(1024):
            port.translate(0, BASE_GFN + page, True)
        done.set()
        for thread in threads:
            thread.join()
        found = [page for mine in results for bitmap in mine for page in bitmap.pages().tolist()]
        found += log.get(SLOT).pages().tolist()
        assert sorted(found) == list(range(1024))


@pytest.mark.parametrize("name", ["x86", "ppc-hv", "s390", "ia64"])
def test_slots_are_removed_and_toggled_while_others_get(name: str) -> None:
    """A get that races with a slot's end either answers or finds no slot; nothing else happens, and no other slot is harmed."""
    scene = Scene(PORTS[name])
    memory = scene.memory
    memory.add_slot(2, 4096, 64)
    with DirtyLog(memory) as log:
        done = threading.Event()
        wrong: list[BaseException] = []

        def getter() -> None:
            while not done.is_set():
                try:
                    log.get(2)
                except LoggingOffError:
                    pass
                except BaseException as error:  # noqa: BLE001 - whatever it is, the test shows it
                    wrong.append(error)

        thread = threading.Thread(target=getter)
        thread.start()
        pages = set()
        for number in range(30):
            scene.store(number)
            memory.remove_slot(2)
            memory.add_slot(2, 4096, 64, SlotFlags.LOG_DIRTY_PAGES)
            pages |= set(log.get(SLOT).pages().tolist())
        done.set()
        thread.join()
        assert not wrong
        assert pages == set(range(30))


def test_a_page_that_two_processors_hold_late_is_reported_once() -> None:
    """The invalidation of its entry forces the write of C by both: one store, one report (ppc hv)."""
    scene = Scene(PORTS["ppc-hv"])
    for vcpu in scene.vcpus:
        vcpu.in_guest = True
    with DirtyLog(scene.memory) as log:
        scene.store(7, vcpu=0)
        reports = log.get(SLOT).count()  # late by one get
        scene.store(7, vcpu=1)
        for _ in range(4):
            reports += log.get(SLOT).count()
        assert reports == 1
        scene.store(7, vcpu=1)
        assert sum(log.get(SLOT).count() for _ in range(4)) == 1, "a later store is reported"


def test_every_protect_port_names_the_hooks_that_it_needs() -> None:
    for port in PORTS.values():
        assert issubclass(port, ProtectPort) == hasattr(port, "enable_log_dirty")

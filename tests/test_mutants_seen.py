"""What the mutants of ``make mutants`` break and no other test sees: locks around each step, starts that fail, unanswered kicks."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dirtylog
from dirtylog import CopyFaultError, DirtyBitmap, DirtyLog, SlotFlags
from dirtylog.buffers.memory import BufferMemory
from dirtylog.emulated.arch import PORTS
from dirtylog.epoch import Consumer
from dirtylog.guests.cpu import CpuExit
from dirtylog.guests.vcpu import Vcpu, leave_guest
from dirtylog.log import start_logging, stop_logging
from dirtylog.port import ProtectPort
from dirtylog.slotbitmap import SlotBitmap
from interrupts import interrupt
from kvm_here import needs_kvm
from kvm_scene import KvmScene
from ring_model import RingScene
from scene import NPAGES, SLOT, Scene

if TYPE_CHECKING:
    from collections.abc import Callable

TAKES = ("read", "exchange", "exchange_masked", "merge", "mark", "give_back")
HOOKS = {"start_logging": True, "stop_logging": True, "enable_log_dirty": True, "sync_dirty_log": False, "flush_tlbs": False}
"""Whether mmu_lock is held when the generic functions call a hook. slots_lock always is."""


def watch_locks(scene: Scene, patch: pytest.MonkeyPatch) -> list[str]:
    """Return what is called with other locks than it should be, as it happens."""
    memory, wrong = scene.memory, list[str]()
    lock: Any = memory.port.mmu_lock
    slots_lock: Any = memory.slots.lock

    def watch(owner: Any, name: str, *, held: bool, bound: bool) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any) -> Any:
            if lock.locked() is not held:
                wrong.append(f"{name} with mmu_lock {'free' if held else 'held'}")
            if bound and not slots_lock._is_owned():
                wrong.append(f"{name} without slots_lock")
            return real(*arguments)

        patch.setattr(owner, name, watched)

    for name in TAKES:
        watch(SlotBitmap, name, held=True, bound=False)
    for name, held in HOOKS.items():
        if hasattr(memory.port, name):
            watch(memory.port, name, held=held, bound=True)
    return wrong


@pytest.mark.parametrize("name", PORTS)
def test_each_step_has_its_locks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(PORTS[name])
    wrong = watch_locks(scene, monkeypatch)

    def fail(_snapshot: DirtyBitmap) -> None:
        raise ValueError

    with DirtyLog(scene.memory) as log:
        for page in (3, 64, 130):
            scene.store(page)
        if isinstance(scene.memory.port, ProtectPort):
            log.clear(SLOT, 64, DirtyBitmap.from_pages(NPAGES - 64, [0]))
        # Not through get, which holds slots_lock around it.
        with pytest.raises(CopyFaultError):
            log._take(scene.memory, SLOT, fail)
        assert log.get(SLOT).pages().tolist() == ([3, 130] if isinstance(scene.memory.port, ProtectPort) else [3, 64, 130])
        assert not log.get(SLOT).any()
        scene.store(3)
        log._take(scene.memory, SLOT, lambda _: None)
        scene.store(3)
        assert log.get(SLOT).pages().tolist() == [3]
    start_logging(scene.memory, SLOT)
    stop_logging(scene.memory, SLOT)
    assert wrong == []


@pytest.mark.parametrize("name", PORTS)
def test_a_start_that_fails_leaves_no_log_whose_contents_nobody_was_told_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(PORTS[name])

    def fail(_slot: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(scene.memory.port, "mark_contents", fail)
        with pytest.raises(MemoryError):
            start_logging(scene.memory, SLOT, contents=True)
    assert scene.slot.dirty_bitmap is None
    assert not scene.slot.flags & SlotFlags.LOG_DIRTY_PAGES


class SlowCpu:
    """Runs on until it has been kicked three times."""

    def __init__(self) -> None:
        self.flushed = False
        self.running = threading.Event()
        self.pc = 0
        self._kicks = threading.Semaphore(0)

    def run(self) -> CpuExit:
        self.running.set()
        for _ in range(3):
            self._kicks.acquire()
        return CpuExit.STOPPED

    def stop(self) -> None:
        self._kicks.release()

    def flush_tlb(self) -> None:
        self.flushed = True


def test_a_flush_is_over_when_the_vcpu_has_flushed_and_not_when_it_was_kicked() -> None:
    cpu = SlowCpu()
    vcpu = Vcpu(0, lambda: cpu, lambda _: None)
    vcpu.resume()
    assert cpu.running.wait(30)
    leave_guest([vcpu])
    flushed = cpu.flushed
    vcpu.close()
    assert flushed


# --- readers


def test_an_entry_that_is_interrupted_leaves_no_epoch_open() -> None:
    for step in itertools.count():
        scene = Scene(PORTS["x86"])
        with DirtyLog(scene.memory) as log:
            consumer = log.consumer("copy")
            scene.store(3)
            if not interrupt(consumer.epoch().__enter__, step):
                break
            with consumer.epoch() as epoch:
                assert epoch.dirty[SLOT].pages().tolist() == [3], f"interrupted at point {step}"
    assert step > 20, "the points were not seen"


def test_an_epoch_begins_and_ends_under_the_log_s_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or two threads could both find that no epoch is open."""
    lock: Any = threading.RLock()
    held = list[bool]()

    def look(*_: object) -> dict[int, DirtyBitmap]:
        held.append(lock._is_owned())
        return {}

    consumer = Consumer("copy", lock, look)  # type: ignore[arg-type]  # what it returns is of no use
    for name in ("take", "commit", "give_back"):
        monkeypatch.setattr(consumer.pending, name, look)
    with consumer.epoch():
        assert not lock._is_owned(), "others go on meanwhile"
    with consumer.epoch() as epoch:
        epoch.rollback()
    assert held == [True] * 6


# --- the dirty ring


def test_rings_are_harvested_and_marked_under_mmu_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a get could take the mark of a page that is harvested and not protected again."""
    scene = RingScene({0: 131})
    lock: Any = scene.port.mmu_lock
    held = list[bool]()

    def watch(owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def watched(*arguments: Any) -> Any:
            held.append(lock.locked())
            return real(*arguments)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((scene.vm, "reset_dirty_rings"), (SlotBitmap, "merge"), (SlotBitmap, "exchange")):
        watch(owner, name)
    scene.store(0, 3)
    assert scene.get(0) == [3]
    assert len(held) >= 3
    assert all(held)


class HoldsBack:
    """A vCPU whose hardware has logged a page in a buffer of its own, which comes into the ring when it leaves the guest."""

    def __init__(self, scene: RingScene, page: int) -> None:
        self._scene, self._page = scene, page

    def request_flush(self) -> int:
        self._scene.store(0, self._page)
        return 1

    def wait_flushed(self, ticket: int) -> None:
        assert ticket == 1


def test_every_vcpu_leaves_the_guest_before_rings_are_harvested() -> None:
    scene = RingScene({0: 131})
    vcpus: Any = scene.port._vcpus
    vcpus += [HoldsBack(scene, 3), HoldsBack(scene, 5)]
    assert scene.get(0) == [3, 5]


@pytest.mark.parametrize("offset", [1 << 32 | 3, 1 << 63 | 3, (1 << 64) - 1])
def test_an_entry_of_no_page_is_no_page_of_the_first_32_bits(offset: int) -> None:
    scene = RingScene({0: 131})
    scene.vm.rings[0].push(0, offset)
    assert scene.get(0) == []


def test_a_stop_drops_what_the_rings_hold() -> None:
    scene = RingScene({0: 131})
    scene.store(0, 3)
    scene.log.stop()
    scene.log.start()
    assert scene.get(0) == []


# --- comparing


def test_a_store_after_the_copy_that_is_compared_is_in_no_copy_that_is_kept() -> None:
    """Once, beside a page that differs: the next get finds it only if the copy that was compared is the one that is kept."""
    buffer = dirtylog.empty(8 * 4096, np.uint8)
    with BufferMemory(buffer, port="compare") as memory, DirtyLog(memory) as log:
        port: Any = memory.port
        read = port._read
        overtaken = iter([7])

        def read_and_be_overtaken(*arguments: Any) -> None:
            read(*arguments)
            for page in overtaken:
                buffer[page * 4096] = 1

        port._read = read_and_be_overtaken
        buffer[3 * 4096] = 1
        assert log.get(0).pages().tolist() == [3]
        assert log.get(0).pages().tolist() == [7]


# --- manual protect


@needs_kvm
def test_a_clear_takes_nothing_that_was_written_since_the_kernel_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even between the words that it clears in one call."""
    with KvmScene("manual", npages=200) as scene, DirtyLog(scene.memory) as log:
        vm: Any = scene.memory.vm
        clear = vm.clear_dirty_log

        def write_and_clear(*arguments: Any) -> None:
            scene.store(70)
            clear(*arguments)

        scene.stores([3, 130])
        with monkeypatch.context() as patch:
            patch.setattr(vm, "clear_dirty_log", write_and_clear)
            assert log.get(SLOT).pages().tolist() == [3, 130]
        assert log.get(SLOT).pages().tolist() == [70]

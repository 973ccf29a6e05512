"""The ports of KVM broken on purpose: the scenario must see each break, and nothing where none is broken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dirtylog import DirtyLog
from dirtylog.guests.programs import Pattern
from dirtylog.kvm.ports import KvmBitmapPort, KvmManualPort
from dirtylog.kvm.ring_port import KvmRingPort
from dirtylog.slotbitmap import SlotBitmap
from dirtylog.words import DirtyWords
from kvm_here import needs_kvm
from kvm_scene import LOGS, KvmScene

if TYPE_CHECKING:
    from collections.abc import Callable

    from dirtylog import MemorySlot

pytestmark = needs_kvm
RAM, HIGH = 0, 300


def lost_pages(log: str, *, ring_entries: int = 65536) -> set[int]:
    """Run the scenario and return the pages that a consumer of the log did not get in their last state; below 0, of the other slot.

    What it cannot see on every host is a page that is not protected again: a KVM that interprets its guest marks each store.
    The model of the ring can (test_kvm_ring.py).
    """
    with KvmScene(log, npages=8259, ring_entries=ring_entries) as scene:
        scene.memory.add_slot(HIGH, 1 << 20, 70)
        scene.stores([0, 1, 200, 8258])  # mapped before logging starts
        scene.copy = scene.contents()
        lost = set[int]()
        with DirtyLog(scene.memory) as dirty_log:
            for number in range(3):
                scene.stores([0, 63, 64, 8258])
                scene.stores([1, 200], vcpu=1)
                scene.host_write(100 + number)
                scene.loop(Pattern(base=(1 << 20) + number << 12, value=number + 1, count=1))
                scene.consume(dirty_log.get(RAM))
                if number not in dirty_log.get(HIGH):
                    lost.add(-1 - number)
            if ring_entries < 65536:
                for seed in range(4):
                    scene.loop(Pattern(base=0, page=seed, mask=4095, count=4096, value=seed + 1))
                    scene.consume(dirty_log.get(RAM))
            scene.stores([0, 3])
            scene.consume(dirty_log.get(RAM))
        return lost | scene.lost()


@pytest.mark.parametrize("log", LOGS)
def test_the_real_ports_lose_nothing(log: str) -> None:
    assert lost_pages(log) == set()


def test_the_real_ring_loses_nothing_when_it_overflows() -> None:
    assert lost_pages("ring", ring_entries=256) == set()


def without_host_marks(self: Any, slot: MemorySlot, fetch: Callable[..., None]) -> Any:
    self._flags[:] = False
    self._current[:] = 0
    return _receive(self, slot, fetch)


_receive = SlotBitmap.receive
_bitmap_fetch = KvmBitmapPort.fetch_dirty_log
_clear = KvmManualPort.enable_log_dirty
_mark = KvmRingPort._mark


def fetch_twice(self: Any, slot: MemorySlot, words: Any) -> None:
    _bitmap_fetch(self, slot, words)
    _bitmap_fetch(self, slot, words)


def forget_the_last_word(self: Any, slot: MemorySlot, words: Any) -> None:
    _bitmap_fetch(self, slot, words)
    words[-1] = 0


def mark_the_first_only(self: Any, entries: Any) -> None:
    _mark(self, entries[:1])


def nothing(_self: Any, _argument: Any) -> None:
    pass


MUTANTS: list[tuple[str, type, str, Any]] = [
    ("bitmap", SlotBitmap, "receive", without_host_marks),
    ("bitmap", KvmBitmapPort, "fetch_dirty_log", fetch_twice),
    ("bitmap", KvmBitmapPort, "fetch_dirty_log", forget_the_last_word),
    ("manual", KvmManualPort, "sync_dirty_log", nothing),
    ("ring", KvmRingPort, "_mark", nothing),
    ("ring", KvmRingPort, "_mark", mark_the_first_only),
]


@pytest.mark.parametrize(
    ("log", "owner", "name", "mutant"), MUTANTS, ids=[f"{log}-{name}-{mutant.__name__}" for log, _, name, mutant in MUTANTS]
)
def test_a_broken_port_is_caught(log: str, owner: type, name: str, mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, mutant)
    assert lost_pages(log)


def test_a_clear_of_more_than_was_taken_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest writes between the read and the clear."""

    def clear_everything(self: Any, slot: MemorySlot, words: DirtyWords) -> None:
        if words:
            scene.store(130)
        everything = np.arange((slot.npages + 63) // 64)
        _clear(self, slot, DirtyWords(everything, np.full(len(everything), np.uint64(0xFFFF_FFFF_FFFF_FFFF))))

    with KvmScene("manual") as scene, DirtyLog(scene.memory) as dirty_log:
        monkeypatch.setattr(KvmManualPort, "enable_log_dirty", clear_everything)
        scene.store(3)
        scene.consume(dirty_log.get(RAM))
        monkeypatch.undo()
        scene.consume(dirty_log.get(RAM))
        assert scene.lost() == {130}


def test_an_entry_that_is_taken_for_another_slot_s_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def low_byte_of_the_slot(self: Any, entries: Any) -> None:
        entries = entries.copy()
        entries["slot"] &= 0xFF
        _mark(self, entries)

    monkeypatch.setattr(KvmRingPort, "_mark", low_byte_of_the_slot)
    assert lost_pages("ring") == {-1, -2, -3}

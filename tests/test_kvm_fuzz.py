"""Random sequences of everything that can be done with a log of the kernel's, against sets of page numbers."""

from __future__ import annotations

import ctypes
import errno
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dirtylog import CopyFaultError, DirtyBitmap, DirtyLog
from dirtylog.guests.programs import Pattern
from dirtylog.kvm.abi import DirtyLogArgument
from kvm_here import needs_kvm
from kvm_scene import LOGS, KvmScene

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = needs_kvm
RAM = 0
STEPS = 250


class Oracle:
    """A log under manual or automatic protection, and what must be in it."""

    def __init__(self, scene: KvmScene, generator: np.random.Generator, *, manual: bool) -> None:
        self.scene, self.generator, self.manual = scene, generator, manual
        self.npages = scene.slot.npages
        self.log = DirtyLog(scene.memory, manual_protect=manual)
        self.log.start()
        self.dirty = set[int]()
        self.pending = set[int]()
        self.consumer = self.log.consumer("fuzz")

    def page(self) -> int:
        return int(self.generator.choice((0, 63, 64, self.npages - 1, int(self.generator.integers(self.npages)))))

    def written(self, page: int) -> None:
        self.dirty.add(page)
        self.pending.add(page)

    def store(self) -> None:
        page = self.page()
        self.scene.store(page, vcpu=int(self.generator.integers(2)))
        self.written(page)

    def loop(self) -> None:
        first = int(self.generator.integers(self.npages - 32))
        count = int(self.generator.integers(1, 60))
        self.scene.loop(Pattern(base=first << 12, mask=31, count=count))
        for page in range(first, first + min(count, 32)):
            self.written(page)

    def host_write(self) -> None:
        page = self.page()
        self.scene.host_write(page)
        self.written(page)

    def get(self) -> None:
        assert set(self.log.get(RAM).pages().tolist()) == self.dirty
        if not self.manual:
            self.dirty = set()

    def clear(self) -> None:
        if not self.manual:
            return
        first = 64 * int(self.generator.integers(self.npages // 64 + 1))
        length = min(64 * int(self.generator.integers(3)), self.npages - first)
        mask = DirtyBitmap.from_pages(length, np.flatnonzero(self.generator.integers(0, 2, length)))
        self.log.clear(RAM, first, mask)
        self.dirty -= {page + first for page in mask.pages().tolist()}

    def epoch(self) -> None:
        if self.manual:
            return  # what a consumer takes is taken from get as well: the sets would need two oracles
        with self.consumer.epoch() as epoch:
            assert set(epoch.dirty[RAM].pages().tolist()) == self.pending
            if self.generator.integers(3) == 0:
                epoch.rollback()
            else:
                self.pending = set()

    def restart(self) -> None:
        self.log.stop()
        self.log = DirtyLog(self.scene.memory, manual_protect=self.manual)
        self.log.start()
        self.consumer = self.log.consumer("fuzz")
        self.dirty, self.pending = set(), set()

    def step(self) -> None:
        steps: tuple[Callable[[], None], ...] = (self.store, self.loop, self.host_write, self.get, self.clear, self.epoch)
        if self.generator.integers(40) == 0:
            self.restart()
        steps[int(self.generator.integers(len(steps)))]()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("log", "manual"), [*((log, False) for log in LOGS), ("manual", True)])
def test_any_sequence_agrees_with_a_set(log: str, manual: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    with KvmScene(log, npages=int(generator.integers(70, 400)), ring_entries=4096) as scene:
        oracle = Oracle(scene, generator, manual=manual)
        for _ in range(STEPS):
            oracle.step()
        oracle.get()
        oracle.log.stop()


def test_the_kernel_s_own_efault_loses_what_it_took_which_is_why_nobody_hands_it_a_bad_address() -> None:
    """KVM clears the bitmap before it copies. Ours goes through a buffer of our own, and copies that fail give back."""
    with KvmScene("bitmap") as scene, DirtyLog(scene.memory) as log:
        scene.store(3)
        with pytest.raises(CopyFaultError) as caught:
            scene.memory.vm.get_dirty_log_into(DirtyLogArgument(slot=RAM, dirty_bitmap=ctypes.c_void_p(8).value))
        assert caught.value.errno == errno.EFAULT
        assert not log.get(RAM).any()

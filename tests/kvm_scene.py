"""A KVM guest whose every step a test takes itself: vCPUs that are run on the test's own thread, one store at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np

from dirtylog.guests.machine import RAM_SLOT, ROM_SLOT
from dirtylog.guests.programs import Pattern
from dirtylog.kvm.arch.x86_64_registers import Regs
from dirtylog.kvm.exits import DirtyRingFull, Halted, Interrupted
from dirtylog.kvm.guest import loop_registers, make_kvm_guest
from dirtylog.options import KvmOptions, Log

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

    from dirtylog import DirtyBitmap

LOGS = tuple(log.value for log in Log)
NPAGES = 131


class KvmScene:
    """Two vCPUs over the guest's RAM, and a copy of it that a consumer keeps from what the log reports."""

    def __init__(self, log: str, *, npages: int = NPAGES, ring_entries: int = 65536, vcpus: int = 2) -> None:
        idle = [Pattern(base=0, count=0)] * vcpus
        options = KvmOptions(log=Log(log), ring_entries=ring_entries)
        self.memory = make_kvm_guest(npages << 12, vcpus=vcpus, loops=idle, options=options)
        self.slot = self.memory.slots[RAM_SLOT]
        self._entry = self.memory.architecture.pc(self.memory.cpus[0].vcpu)
        self._value = 0
        self.copy = self.contents()

    def loop(self, pattern: Pattern, vcpu: int = 0) -> None:
        """Run a store loop to its end."""
        cpu = self.memory.cpus[vcpu].vcpu
        cpu.put(Regs(rip=self._entry, rflags=2, **loop_registers(self.memory, pattern)))
        while isinstance(reason := cpu.run(), (DirtyRingFull, Interrupted)):
            if reason == DirtyRingFull():
                self.memory.port.ring_full(vcpu)
        assert reason == Halted(), reason

    def store(self, page: int, vcpu: int = 0) -> None:
        """Have the guest store a value that was never stored before."""
        self._value += 1
        self.loop(Pattern(base=(self.slot.base_gfn + page) << 12, value=self._value, count=1), vcpu)

    def stores(self, pages: Iterable[int], vcpu: int = 0) -> None:
        """Have the guest store to several pages."""
        for page in pages:
            self.store(page, vcpu)

    def host_write(self, page: int) -> None:
        """Write a page from this process."""
        self._value += 1
        self.memory.write(self.slot.id, [page], np.full((1, 4096), self._value % 251, np.uint8))

    def contents(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """Return a copy of the RAM."""
        return self.memory.contents(self.slot).copy()

    def consume(self, dirty: DirtyBitmap) -> None:
        """Copy what the log reported, as a migration would."""
        pages = dirty.pages()
        self.copy[pages] = self.memory.read(self.slot.id, pages)

    def lost(self) -> set[int]:
        """Return the pages in which the copy differs from the memory."""
        return set(np.flatnonzero((self.copy != self.contents()).any(axis=1)).tolist())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.memory.close()


__all__ = ["LOGS", "NPAGES", "ROM_SLOT", "KvmScene"]

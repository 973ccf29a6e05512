"""A machine whose every step a test takes itself: trace CPUs without threads, and a slot with an odd base and length."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.emulated.cpu_trace import Access, TraceCpu
from dirtylog.emulated.machine import EmulatedMemory
from dirtylog.emulated.port import PAGE_SHIFT

if TYPE_CHECKING:
    from dirtylog.bitmap import DirtyBitmap
    from dirtylog.emulated.port import SoftwareProtectPort, SoftwareSyncPort

BASE_GFN = 5
NPAGES = 131
SLOT = 0


class InlineVcpu:
    """A vCPU that is driven by the test's own thread, and so is never in the guest when a flush is asked for."""

    def __init__(self, memory: EmulatedMemory, index: int) -> None:
        self.in_guest = False
        self.index = index
        self._memory = memory
        self.cpu = TraceCpu(index, memory.port.name, (), memory.port.translate, memory.host_memory)

    def request_flush(self) -> int | None:
        self.cpu.flush_tlb()
        self._memory.port.tlb_flushed(self.index)
        return None

    def wait_flushed(self, ticket: int) -> None:
        raise AssertionError(f"nobody was given ticket {ticket}")


class Scene:
    """Two vCPUs over one slot, and a copy of it that a consumer keeps from what the log reports."""

    def __init__(
        self, port: type[SoftwareProtectPort | SoftwareSyncPort], *, npages: int = NPAGES, base_gfn: int = BASE_GFN
    ) -> None:
        self.memory = EmulatedMemory(port)
        self.memory.add_slot(SLOT, base_gfn, npages)
        self.vcpus = [InlineVcpu(self.memory, index) for index in range(2)]
        self.memory.port.vcpus = self.vcpus
        self.slot = self.memory.slots[SLOT]
        self.copy = self.contents()
        self._value = 0

    def store(self, page: int, vcpu: int = 0) -> None:
        """Store a value that was never stored before."""
        self._value += 1
        self.vcpus[vcpu].cpu.access(Access(self._address(page), self._value))

    def load(self, page: int, vcpu: int = 0) -> int:
        return self.vcpus[vcpu].cpu.access(Access(self._address(page)))

    def host_write(self, page: int) -> None:
        self._value += 1
        self.memory.write(SLOT, [page], np.full((1, 4096), self._value % 251, np.uint8))

    def contents(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return self.memory.read(SLOT, np.arange(self.slot.npages if hasattr(self, "slot") else self.memory.slots[SLOT].npages))

    def consume(self, dirty: DirtyBitmap) -> None:
        """Copy what the log reported, as a migration would."""
        pages = dirty.pages()
        self.copy[pages] = self.memory.read(SLOT, pages)

    def lost(self) -> set[int]:
        """Return the pages in which the copy differs from the memory."""
        return set(np.flatnonzero((self.copy != self.contents()).any(axis=1)).tolist())

    def step(self, page: int, vcpu: int = 0) -> partial[None]:
        """Return a store to be made later."""
        return partial(self.store, page, vcpu)

    def _address(self, page: int) -> int:
        return (self.slot.base_gfn + page) << PAGE_SHIFT

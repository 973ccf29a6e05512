"""KVM's dirty ring: the real port and the real ring, over a kernel whose every step is one of the scheduler's.

The kernel writes an entry's slot and offset, and then its flag; the reader reads flags, and then entries. Both are steps here, so
that a weakly ordered machine can be had: one in which the flag is seen before what it publishes, or the entry read before the flag.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

from dirtylog.kvm import abi
from dirtylog.kvm.ring import DirtyRing
from interleave.cooperation import StepLock
from ring_model import ModelRing, RingScene

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from dirtylog.kvm.ring_port import KvmRingPort
    from interleave.explorer import Run

SLOT, NPAGES, ENTRIES = 0, 4, 4
_SOFT_LIMIT = 3
_NEAR_THE_WRAP = 0xFFFF_FFFE
_RING = "the ring"


class StepRing(DirtyRing):
    """The real ring, whose looks at memory are steps."""

    run: Run

    def waiting(self) -> int:
        self.run.step("reads the flags", reads=[_RING])
        count = super().waiting()
        self.run.say(f"{count} entries are dirty")
        return count

    def ahead(self, count: int, start: int = 0) -> NDArray[np.void]:
        self.run.step("reads the entries", reads=[_RING])
        entries = super().ahead(count, start)
        self.run.say(f"pages {', '.join(map(str, entries['offset'].tolist()))}")
        return entries

    def give(self, count: int) -> None:
        self.run.step("sets the flags to harvested", writes=[_RING])
        super().give(count)

    def came_round(self) -> bool:
        self.run.step("looks whether the kernel has come round", reads=[_RING])
        return super().came_round()


class EntriesBeforeFlags(StepRing):
    """A reader without the order: the processor has loaded the entries before the flags."""

    def waiting(self) -> int:
        self.run.step("loads the entries ahead of time", reads=[_RING])
        self._ahead_of_time = super().ahead(self.size) if self.run.current() is None else DirtyRing.ahead(self, self.size)
        return super().waiting()

    def ahead(self, count: int, start: int = 0) -> NDArray[np.void]:
        return self._ahead_of_time[start : start + count]


def reset_before_marking(port: KvmRingPort, ring: DirtyRing) -> None:
    """Harvest, but have the entries reset before they have been read: the kernel may write over them."""
    count = ring.waiting()
    if count:
        ring.give(count)
        port._reset(ring)
        ring.next -= count
        port._mark_ahead(ring, count)
        ring.next += count


class Kernel:
    """A vCPU's stores, and the reset: the kernel's side, which holds its own mmu_lock in a fault and where it arms pages."""

    def __init__(self, run: Run, scene: RingScene, *, flag_first: bool) -> None:
        self._run, self._scene, self._flag_first = run, scene, flag_first
        self.lock = StepLock(run, "KVM's mmu_lock")
        scene.vm._arm = partial(self._arm, scene.vm._arm)  # type: ignore[method-assign]  # the model's reset, with a lock
        scene.vm.between = lambda: run.step("goes on with the reset", reads=[_RING], writes=[_RING])

    def store(self, page: int) -> None:
        """Store as a vCPU does; one whose ring is full asks for room first."""
        scene, ring, known = self._scene, self._scene.vm.rings[0], self._scene.vm.slots[SLOT]
        while True:
            self._run.step(f"stores to page {page}", writes=[f"page {page}"])
            if not (known.logged and known.armed[page]):
                scene.clock += 1
                scene.versions[SLOT][page] = scene.clock
                return
            self._run.say("write-protected")
            if ring.full:
                self._run.intend("leaves the guest, for its ring is full, and takes mmu_lock to make room")
                scene.port.ring_full(0)
                continue
            with self.lock:
                self._enter(ring, page)
                known.armed[page] = False

    def _enter(self, ring: ModelRing, page: int) -> None:
        place = ring.dirty_index % ring.size

        def payload() -> None:
            ring._slots[place], ring._offsets[place] = SLOT, page

        def flag() -> None:
            ring._flags[place] = abi.GFN_DIRTY

        writes: list[tuple[str, Callable[[], None]]] = [
            (f"writes page {page} into entry {place}", payload),
            (f"sets the flag of entry {place}", flag),
        ]
        for what, write in reversed(writes) if self._flag_first else writes:
            self._run.step(what, writes=[_RING])
            write()
        ring.dirty_index = ring.dirty_index + 1 & 0xFFFF_FFFF

    def _arm(self, arm: Callable[[int, list[int]], None], slot: int, offsets: list[int]) -> None:
        if offsets:
            self._run.intend(f"protects pages {', '.join(map(str, offsets))} again, under KVM's mmu_lock")
            with self.lock:
                self._run.step("flushes", writes=[f"page {page}" for page in offsets])
                arm(slot, offsets)


class RingExploration:
    """One vCPU that stores to the pages of ``trace``, a ring of four entries near its wrap, and readers."""

    def __init__(
        self,
        trace: Sequence[int],
        readers: int = 1,
        *,
        ring: type[StepRing] = StepRing,
        flag_first: bool = False,
        collector: bool = False,
        harvest: Callable[[KvmRingPort, DirtyRing], None] | None = None,
    ) -> None:
        self._trace, self._readers, self._ring, self._flag_first, self._collector = trace, readers, ring, flag_first, collector
        self._harvest = harvest

    def begin(self, run: Run) -> None:
        """Put the ring up."""
        self.scene = RingScene({SLOT: NPAGES}, size=ENTRIES, start=_NEAR_THE_WRAP)
        kernel = self.scene.vm.rings[0]
        kernel.soft_limit = _SOFT_LIMIT
        ring = self._ring(kernel.entries)
        ring.next = kernel.reset_index % ENTRIES
        ring.run = run
        self.scene.port._rings[:] = [ring]
        self.scene.port.mmu_lock = StepLock(run, "mmu_lock", reentrant=True)
        self.scene.log._lock = cast("Any", StepLock(run, "the log's lock", reentrant=True))
        self.scene.table.lock = cast("Any", StepLock(run, "slots_lock", reentrant=True))
        if self._harvest is not None:
            self.scene.port._harvest = partial(self._harvest, self.scene.port)  # type: ignore[method-assign]  # a mutant
        self._kernel = Kernel(run, self.scene, flag_first=self._flag_first)
        self._run = run
        run.actor("vcpu-0", self._stores)
        for number in range(self._readers):
            run.actor(f"getter-{number}" if self._readers > 1 else "getter", self._get)
        if self._collector:
            run.actor("collector", self._collect)

    def check(self) -> str | None:
        """Get for the last time, and once more after a store to every page."""
        self.scene.vm.between = lambda: None
        if self.scene.port._failure is not None:
            return f"the port gives up: {self.scene.port._failure}"
        self.scene.get(SLOT)
        if lost := self.scene.lost():
            return f"LOST: what was stored to page {min(lost)[1]} is in no log"
        if lost := self.scene.unseen_after_a_store_to_every_page():
            return f"LOST: page {min(lost)[1]} is not protected, and no get reports it"
        return None

    def _stores(self) -> None:
        for page in self._trace:
            self._kernel.store(page)

    def _get(self) -> None:
        pages = self.scene.log.get(SLOT).pages()
        if len(pages):
            self._run.step(f"reads pages {', '.join(map(str, pages.tolist()))}", reads=[f"page {page}" for page in pages.tolist()])
            self.scene.copies[SLOT][pages] = self.scene.versions[SLOT][pages]

    def _collect(self) -> None:
        self.scene.collect()

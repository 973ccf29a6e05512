"""The kernel's side of the dirty rings, after Linux's virt/kvm/dirty_ring.c, and a guest whose every step a test takes.

A page is armed or not: a store to an armed page of a logged slot is entered in the vCPU's ring and disarms the page, any other
leaves no trace. Pages have no contents but a version, which says what was stored last.
"""

from __future__ import annotations

import signal
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

import dirtylog
from dirtylog import DirtyLog, MemorySlot, SlotFlags, SlotTable
from dirtylog.errors import UnsupportedError
from dirtylog.kvm import abi
from dirtylog.kvm.abi import Cap
from dirtylog.kvm.ring import DirtyRing
from dirtylog.kvm.ring_port import KvmRingPort
from dirtylog.log import start_logging, stop_logging
from dirtylog.port import Exactness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from dirtylog.kvm.arch.architecture import Architecture
    from dirtylog.kvm.vm import KvmVm

U32 = 0xFFFF_FFFF
RESERVED = 64
SIZE = 256
X86 = {Cap.DIRTY_LOG_RING: 1 << 20, Cap.DIRTY_LOG_RING_ACQ_REL: 1 << 20}
ARM64 = {Cap.DIRTY_LOG_RING_ACQ_REL: 1 << 20, Cap.DIRTY_LOG_RING_WITH_BITMAP: 1}

_BATCH = 64
_SOURCE = str(Path(dirtylog.__file__).parent)


def nothing() -> None:
    """Be what happens where nothing does."""


class ModelArchitecture:
    """What the ring port asks of an architecture."""

    def __init__(self, *, offset_pages: int = 64, alone_loses: bool = False) -> None:
        self.ring_offset_pages = offset_pages
        self.ring_alone_loses_pages = alone_loses


class ModelRing:
    """A vCPU's ring in the kernel. Its indexes run freely and wrap at 2**32."""

    def __init__(self, size: int, start: int = 0) -> None:
        self.size = size
        self.soft_limit = size - RESERVED
        self.dirty_index = self.reset_index = start & U32
        self.entries = np.zeros(size, abi.DIRTY_GFN)
        self._flags, self._slots, self._offsets = (self.entries[name] for name in ("flags", "slot", "offset"))

    @property
    def used(self) -> int:
        """How many entries the kernel thinks are in use. More than 2**31: its reset has passed its next entry, for good."""
        return (self.dirty_index - self.reset_index) & U32

    @property
    def full(self) -> bool:
        """Whether the vCPU may not enter the guest."""
        return self.used >= self.soft_limit

    def push(self, slot: int, offset: int) -> None:
        """Enter a page; whatever is there is written over."""
        place = self.dirty_index % self.size
        self._slots[place], self._offsets[place] = slot, offset
        self._flags[place] = abi.GFN_DIRTY
        self.dirty_index = self.dirty_index + 1 & U32

    @property
    def harvested(self) -> bool:
        """Whether the next entry to be reset is harvested."""
        return bool(self._flags[self.reset_index % self.size] & abi.GFN_RESET)

    def take_harvested(self) -> tuple[int, int] | None:
        """Free the next entry if it is harvested, and return what is in it."""
        if not self.harvested:
            return None
        place = self.reset_index % self.size
        self._flags[place] = 0
        self.reset_index = self.reset_index + 1 & U32
        return int(self._slots[place]), int(self._offsets[place])


class ModelSlot:
    """A slot in the kernel."""

    def __init__(self, npages: int) -> None:
        self.npages = npages
        self.logged = False
        self.armed = np.zeros(npages, np.bool_)
        self.written_without_vcpu = np.zeros(npages, np.bool_)


class ModelVm:
    """The VM's ioctls. ``between`` is called wherever a vCPU may come between two steps of one."""

    def __init__(self, extensions: Mapping[Cap, int]) -> None:
        self.rings: list[ModelRing] = []
        self.slots: dict[int, ModelSlot] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.between: Callable[[], None] = nothing
        self.between_regions: Callable[[], None] = nothing
        self.signal_after: int | None = None
        """After how many entries a signal ends the next reset. It is gone then, as one is that has been handled."""
        self.signal_can_be_blocked = True
        """False: what ends it is no signal that a thread can block, but a freezer or a debugger."""
        self.failure: OSError | None = None
        self._extensions = extensions

    def check_extension(self, cap: Cap) -> int:
        return self._extensions.get(cap, 0)

    def enable_dirty_ring(self, cap: Cap, nbytes: int) -> None:
        self.calls.append(("ring", cap, nbytes))

    def enable_cap(self, cap: Cap, *arguments: int) -> None:
        self.calls.append(("cap", cap, *arguments))

    def set_user_memory_region(self, slot: int, flags: SlotFlags, _address: int, nbytes: int, _host: int) -> None:
        self.calls.append(("region", slot, int(flags), nbytes))
        self.between_regions()
        self.between()
        if not nbytes:
            del self.slots[slot]
            return
        known = self.slots.setdefault(slot, ModelSlot(nbytes >> 12))
        assert known.npages == nbytes >> 12, "EINVAL: a slot's size may not change"
        logged = bool(flags & SlotFlags.LOG_DIRTY_PAGES)
        if logged and not known.logged:
            known.armed[:] = True
        known.logged = logged
        self.between()

    def reset_dirty_rings(self) -> int:
        """Free what is harvested and arm its pages: in batches of one slot, of pages that lie within 64 of one another."""
        if self.failure is not None:
            raise self.failure
        count = 0
        for ring in self.rings:
            batch: list[int] = []
            batch_slot = 0
            while not self._stopped(count, ring):
                self.between()
                entry = ring.take_harvested()
                if entry is None:
                    break
                count += 1
                slot, offset = entry
                if batch and (slot != batch_slot or max(*batch, offset) - min(*batch, offset) >= _BATCH):
                    self._arm(batch_slot, batch)
                    batch = []
                batch_slot = slot
                batch.append(offset)
            else:
                # Since Linux 6.17 a signal is looked at here, and what has been gathered for a batch is left as it is.
                break
            self._arm(batch_slot, batch)
            self.between()
        self.signal_after = None
        self.calls.append(("reset", count))
        return count

    def get_dirty_log(self, slot: int, words: NDArray[np.uint64]) -> None:
        """Take what was written without a running vCPU."""
        self.calls.append(("get", slot))
        bits = self.slots[slot].written_without_vcpu
        octets = np.zeros(8 * len(words), np.uint8)
        packed = np.packbits(bits, bitorder="little")
        octets[: len(packed)] = packed
        words[:] = octets.view("<u8")
        bits[:] = False

    def resets(self) -> list[int]:
        """Return what each reset returned."""
        return [call[1] for call in self.calls if call[0] == "reset"]

    def _stopped(self, count: int, ring: ModelRing) -> bool:
        if self.signal_after is None or count < self.signal_after:
            return False
        if self.signal_can_be_blocked:
            return signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        # Behind the last entry nobody could know of it: a user of this kernel can only hope.
        return ring.harvested

    def _arm(self, slot: int, offsets: list[int]) -> None:
        known = self.slots.get(slot)
        # The batch is looked at as a whole: where one page lies past the end, none is armed.
        if known is not None and offsets and max(offsets) < known.npages:
            known.armed[offsets] = True


class ModelMemory:
    """A Memory without contents, over the port."""

    exactness = Exactness.SUPERSET
    blind_spots: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()
    faults: int | None = None
    held = 0
    paused = True

    def __init__(self, port: KvmRingPort, slots: SlotTable) -> None:
        self.port = port
        self.slots = slots

    def update_slots(self) -> list[MemorySlot]:
        return []

    def read(self, *_: Any) -> Any:
        raise UnsupportedError("pages have versions here, not contents")

    write = pause = resume = close = ending = read


class RingScene:
    """vCPUs over slots, the log of them, and a copy that a consumer keeps from what it reports. Normally no collector runs.

    ``slots`` gives the length of each slot by its id, ``late`` how many entries a vCPU still makes after it was told that its
    ring is full, before it leaves the guest: none on most hosts.
    """

    def __init__(
        self,
        slots: Mapping[int, int],
        *,
        size: int = SIZE,
        vcpus: int = 1,
        late: int = 0,
        start: int = 0,
        extensions: Mapping[Cap, int] = X86,
        collector: bool = False,
    ) -> None:
        self.vm = ModelVm(extensions)
        self.table = SlotTable(address_spaces=2)
        self.port = KvmRingPort(cast("KvmVm", self.vm), cast("Architecture", ModelArchitecture()), self.table, [], entries=size)
        if not collector:
            self.port.end_collector()
        for _ in range(vcpus):
            ring = ModelRing(size, start)
            self.vm.rings.append(ring)
            self.port._rings.append(DirtyRing(ring.entries, partial(self._hold, len(self.vm.rings) - 1)))
        self.memory = ModelMemory(self.port, self.table)
        self.log = DirtyLog(self.memory)
        self.clock = 0
        self.late = late
        self.versions: dict[int, NDArray[np.int64]] = {}
        self.copies: dict[int, NDArray[np.int64]] = {}
        self._late = [0] * vcpus
        self._outside = [False] * vcpus
        self._held = [False] * vcpus
        for slot, npages in slots.items():
            self.add_slot(slot, npages)
        self.log.start()

    # --- the guest

    @contextmanager
    def _hold(self, vcpu: int) -> Iterator[None]:
        """Keep a vCPU out of the guest."""
        self._held[vcpu] = True
        try:
            yield
        finally:
            self._held[vcpu] = False

    def try_store(self, slot: int, page: int, vcpu: int = 0) -> bool:
        """Store, unless the vCPU may not run for its ring is full; return whether it did."""
        ring, known = self.vm.rings[vcpu], self.vm.slots[slot]
        if self._held[vcpu]:
            return False
        if self._outside[vcpu]:
            if ring.full:
                return False
            self._outside[vcpu] = False
        if not ring.full:
            self._late[vcpu] = 0
        if known.logged and known.armed[page]:
            if ring.full:
                if self._late[vcpu] >= self.late:
                    self._outside[vcpu] = True
                    return False
                self._late[vcpu] += 1
            ring.push(slot, page)
            known.armed[page] = False
        self.clock += 1
        self.versions[slot][page] = self.clock
        return True

    def store(self, slot: int, page: int, vcpu: int = 0) -> None:
        """Store; a vCPU whose ring is full comes to the port for room, as often as KVM_RUN sends it there."""
        for _ in range(self.patience(vcpu)):
            if self.try_store(slot, page, vcpu):
                return
            self.ask_for_room(vcpu)
        raise AssertionError(f"vCPU {vcpu} does not get to run again: {self.vm.rings[vcpu].used} entries are in use")

    def stores(self, slot: int, pages: Iterable[int], vcpu: int = 0) -> None:
        for page in pages:
            self.store(slot, page, vcpu)

    def write_without_vcpu(self, slot: int, page: int) -> None:
        """Write as the kernel does for a device of its own: not into a ring."""
        self.clock += 1
        self.versions[slot][page] = self.clock
        self.vm.slots[slot].written_without_vcpu[page] = True

    def leave_if_full(self, vcpu: int) -> bool:
        """Have a vCPU leave the guest if its ring is full; return whether it did."""
        self._outside[vcpu] = self._outside[vcpu] or self.vm.rings[vcpu].full
        return self._outside[vcpu]

    def ask_for_room(self, vcpu: int) -> None:
        """Do what the thread of a vCPU does that has left the guest for its ring was full, and enter the guest again."""
        self.port.ring_full(vcpu)
        self._outside[vcpu] = self.vm.rings[vcpu].full

    def patience(self, vcpu: int) -> int:
        """Return how often a vCPU may have to ask for room: twice for each quarter of a ring that is in use, and a few times."""
        ring = self.vm.rings[vcpu]
        return 8 + min(ring.used, 8 * ring.size) * 8 // ring.size

    # --- slots

    def add_slot(self, slot: int, npages: int, *, logged: bool = False) -> None:
        """Add a slot as KvmMemory does."""
        base = sum(self.table[known.id].npages for known in self.table) + (slot & 0xFFFF) * 4096
        memslot = MemorySlot(slot, base, npages)
        with self.table.lock:
            self.table.add(memslot)
            self.versions[slot], self.copies[slot] = (np.zeros(npages, np.int64) for _ in range(2))
            self.port.place(memslot)
            if logged:
                start_logging(self.memory, slot)

    def remove_slot(self, slot: int) -> None:
        """Remove a slot as KvmMemory does."""
        with self.table.lock:
            stop_logging(self.memory, slot)
            with self.port.mmu_lock:
                self.port.remove(self.table[slot])
                self.table.remove(slot)
            del self.versions[slot], self.copies[slot]

    # --- the consumer

    def get(self, slot: int) -> list[int]:
        """Get, copy what is reported, and return it."""
        pages = self.log.get(slot).pages()
        self.copies[slot][pages] = self.versions[slot][pages]
        return cast("list[int]", pages.tolist())

    def collect(self) -> int:
        """Harvest as the collector does."""
        with self.port.mmu_lock:
            return self.port.collect()

    def lost(self) -> set[tuple[int, int]]:
        """Return the slots and pages in which the copy differs from the memory."""
        return {(slot, page) for slot, copy in self.copies.items() for page in np.flatnonzero(copy != self.versions[slot]).tolist()}

    def unseen_after_a_store_to_every_page(self, vcpu: int = 0) -> set[tuple[int, int]]:
        """Store to every page and get; return what was not reported, for it was not armed."""
        for slot, versions in self.versions.items():
            self.stores(slot, range(len(versions)), vcpu)
        for slot in self.versions:
            self.get(slot)
        return self.lost()


def meanwhile(scene: RingScene, action: Callable[[], object], moments: Mapping[int, Callable[[], object]]) -> None:
    """Run ``action``, and at its steps of these numbers something else: a step is a call or return in dirtylog, or in an ioctl."""
    step = 0
    before = sys.getprofile()

    def tick() -> None:
        nonlocal step
        step += 1
        do = moments.get(step - 1)
        if do is not None:
            sys.setprofile(before)
            scene.vm.between = nothing
            do()
            scene.vm.between = tick
            sys.setprofile(profile)

    def profile(frame: Any, _event: str, _argument: object) -> None:
        if frame.f_code.co_filename.startswith(_SOURCE):
            tick()

    scene.vm.between = tick
    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(before)
        scene.vm.between = nothing

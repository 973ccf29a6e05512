"""The software machine: slots, guest memory, vCPUs, and one of the ports between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np

from dirtylog.bitmap import checked_pages
from dirtylog.emulated.port import PAGE_SHIFT, PAGE_SIZE
from dirtylog.emulated.ram import Ram
from dirtylog.emulated.vcpu import Vcpu
from dirtylog.errors import InvalidArgumentError
from dirtylog.log import start_logging, stop_logging
from dirtylog.memslot import MemorySlot, SlotFlags, SlotTable
from dirtylog.words import words_of_pages

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from numpy.typing import ArrayLike, NDArray

    from dirtylog.emulated.cpu import Cpu
    from dirtylog.emulated.port import PortStats, SoftwareProtectPort, SoftwareSyncPort
    from dirtylog.port import Exactness

MAX_VCPUS = 8
# Host-physical memory begins here and slots are spread by this much, which is the largest block of any port: so a block of
# guest frames is a block of host memory too, and no guest address is its own translation.
_HOST_ALIGNMENT = 1 << 26


class EmulatedMemory:
    """The memory of an emulated guest, and the machine around it: a :class:`~dirtylog.memory.Memory`.

    It starts paused and without slots or vCPUs; :func:`dirtylog.open` makes one with a guest in it. Guest frame numbers are
    in pages of 4 KiB.
    """

    def __init__(self, port: type[SoftwareProtectPort | SoftwareSyncPort]) -> None:
        self.slots = SlotTable()
        self.vcpus: list[Vcpu] = []
        self.port = port(self.slots, self.vcpus)
        self._ram: dict[MemorySlot, Ram] = {}
        self._running = False
        self._closed = False

    @property
    def exactness(self) -> Exactness:
        """EXACT on every emulated port."""
        return self.port.exactness

    @property
    def blind_spots(self) -> tuple[str, ...]:
        """The writes that this source cannot see."""
        return self.port.blind_spots

    @property
    def stats(self) -> PortStats:
        """The port's counters."""
        return self.port.stats

    # --- slots

    def add_slot(self, slot_id: int, base_gfn: int, npages: int, flags: SlotFlags = SlotFlags.NONE) -> MemorySlot:
        """Add a slot of fresh zero pages, before any vCPU. With LOG_DIRTY_PAGES it is logged from the start."""
        with self.slots.lock:
            if self.vcpus:
                raise InvalidArgumentError(f"slot {slot_id} after a vCPU: a CPU knows the memory that was there when it was made")
            used = max((ram.address + ram.nbytes for ram in self._ram.values()), default=_HOST_ALIGNMENT)
            address = -(-used // _HOST_ALIGNMENT) * _HOST_ALIGNMENT + (base_gfn << PAGE_SHIFT) % _HOST_ALIGNMENT
            slot = MemorySlot(slot_id, base_gfn, npages, PAGE_SIZE, flags & ~SlotFlags.LOG_DIRTY_PAGES, host_address=address)
            self._check_reach(slot, base_gfn)
            ram = Ram(address, npages)
            self.slots.add(slot)
            self._ram[slot] = ram
            if flags & SlotFlags.LOG_DIRTY_PAGES:
                start_logging(self, slot_id)
        return slot

    def remove_slot(self, slot_id: int) -> None:
        """Remove a slot, its log and its memory. A get that comes later, or waits for this, finds no slot (ENOENT)."""
        with self.slots.lock:
            slot = self.slots[slot_id]
            stop_logging(self, slot_id)
            with self.port.mmu_lock:
                self.slots.remove(slot_id)
                self.port.unmap(slot)
            # Only when no vCPU can reach the memory any more may it go.
            self.port.flush_tlbs(slot)
            self._ram.pop(slot)

    def move_slot(self, slot_id: int, base_gfn: int) -> None:
        """Move a slot, with its contents and its log, to other guest frames."""
        with self.slots.lock:
            slot = self.slots.check_move(slot_id, base_gfn)
            self._check_reach(slot, base_gfn)
            with self.port.mmu_lock:
                self.port.unmap(slot)
                slot.base_gfn = base_gfn
            self.port.flush_tlbs(slot)

    # --- contents

    def read(self, slot: int, pages: ArrayLike, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Return the contents of ``pages`` (offsets in the slot) as uint8[k, 4096], in ``out`` if it is given."""
        memslot = self.slots[slot]
        offsets = checked_pages(pages, memslot.npages)
        return np.take(self._ram[memslot].pages, offsets, axis=0, out=out, mode="clip")

    def write(self, slot: int, pages: ArrayLike, data: ArrayLike) -> None:
        """Write uint8[k, 4096] to ``pages``, and log them.

        Both under mmu_lock, so that no get comes between, and the bits first, so that an interrupt loses none.
        """
        memslot = self.slots[slot]
        offsets = checked_pages(pages, memslot.npages)
        contents = np.asarray(data, np.uint8)
        if contents.shape != (len(offsets), PAGE_SIZE):
            raise InvalidArgumentError(
                f"data of shape {contents.shape} for {len(offsets)} pages: it must be ({len(offsets)}, {PAGE_SIZE})"
            )
        with self.port.mmu_lock:
            if memslot.dirty_bitmap is not None:
                memslot.dirty_bitmap.merge(words_of_pages(offsets))
            self._ram[memslot].pages[offsets] = contents

    def load(self, address: int, image: bytes) -> None:
        """Copy an image to a guest-physical address, unlogged: for firmware, before the guest runs."""
        slot = self.slots.find(address >> PAGE_SHIFT)
        offset = 0 if slot is None else address - (slot.base_gfn << PAGE_SHIFT)
        if slot is None or offset + len(image) > slot.nbytes:
            raise InvalidArgumentError(
                f"a program of {len(image)} bytes does not fit at address {address:#x}: no slot holds all of it"
            )
        flat = self._ram[slot].pages.reshape(-1)
        flat[offset : offset + len(image)] = np.frombuffer(image, np.uint8)

    def host_memory(self, address: int) -> tuple[memoryview, int]:
        """Return the memory of the slot that holds a host-physical address, and the offset of the address in it."""
        for ram in self._ram.values():
            if 0 <= address - ram.address < ram.nbytes:
                return ram.view, address - ram.address
        raise InvalidArgumentError(f"host-physical address {address:#x} is no guest's memory")

    def host_ranges(self) -> list[tuple[int, int, int]]:
        """Return (host-physical address, address in this process, nbytes) of each slot's memory."""
        return [(ram.address, ram.host, ram.nbytes) for ram in self._ram.values()]

    # --- vCPUs

    def add_vcpu(self, make_cpu: Callable[[int], Cpu]) -> Vcpu:
        """Add a vCPU; ``make_cpu`` gets its index, now and at each reset. At most eight, and only while paused."""
        if self._running:
            raise InvalidArgumentError("cannot add a vCPU while the machine runs", remedy="pause it first")
        index = len(self.vcpus)
        if index >= MAX_VCPUS:
            raise InvalidArgumentError(f"vCPU number {index + 1}: a machine has at most {MAX_VCPUS}")
        vcpu = Vcpu(index, lambda: make_cpu(index), self.port.tlb_flushed)
        self.vcpus.append(vcpu)
        return vcpu

    def pause(self) -> None:
        """Return when no vCPU is in the guest."""
        self._running = False
        for vcpu in self.vcpus:
            vcpu.request_pause()
        for vcpu in self.vcpus:
            vcpu.wait_outside()

    def resume(self) -> None:
        """Let every vCPU that has not halted or faulted run."""
        self._running = True
        for vcpu in self.vcpus:
            vcpu.resume()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every vCPU has halted; return whether all have. Raises the error of one that faulted."""
        waited = [vcpu.wait(timeout) for vcpu in self.vcpus]
        self.check()
        return all(waited)

    def check(self) -> None:
        """Raise the error of the first vCPU that faulted, if any."""
        for vcpu in self.vcpus:
            if vcpu.error is not None:
                raise vcpu.error

    def reset(self) -> None:
        """Pause, and set every vCPU's registers to what they were at first. Memory stays as it is."""
        self.pause()
        for vcpu in self.vcpus:
            vcpu.reset()

    def close(self) -> None:
        """End the vCPU threads. The contents stay readable until the object goes. A second call does nothing."""
        if not self._closed:
            self._closed = True
            for vcpu in self.vcpus:
                vcpu.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _check_reach(self, slot: MemorySlot, base_gfn: int) -> None:
        if base_gfn + slot.npages > self.port.max_gfn:
            raise InvalidArgumentError(
                f"a slot that ends at gfn {base_gfn + slot.npages:#x}: the {self.port.name} port's tables reach "
                f"gfn {self.port.max_gfn - 1:#x}",
                slot=slot.id,
            )
        if slot.host_address + slot.nbytes > self.port.max_host_address:
            raise InvalidArgumentError(
                f"a slot of {slot.nbytes} bytes at host address {slot.host_address:#x}: the {self.port.name} port's entries reach "
                f"{self.port.max_host_address - 1:#x}",
                slot=slot.id,
            )

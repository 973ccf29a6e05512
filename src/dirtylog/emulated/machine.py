"""The software machine: slots, guest memory, vCPUs, and one of the ports between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dirtylog.emulated.port import PAGE_SHIFT, PAGE_SIZE
from dirtylog.emulated.ram import Ram
from dirtylog.errors import InvalidArgumentError
from dirtylog.guests.machine import Machine
from dirtylog.log import start_logging, stop_logging
from dirtylog.memslot import MemorySlot, SlotFlags, SlotTable

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from dirtylog.emulated.port import PortStats, SoftwareProtectPort, SoftwareSyncPort
    from dirtylog.guests.cpu import Cpu
    from dirtylog.guests.vcpu import Vcpu

# Host-physical memory begins here and slots are spread by this much, which is the largest block of any port: so a block of
# guest frames is a block of host memory too, and no guest address is its own translation.
_HOST_ALIGNMENT = 1 << 26


class EmulatedMemory(Machine["SoftwareProtectPort | SoftwareSyncPort"]):
    """The memory of an emulated guest, and the machine around it.

    It starts paused and without slots or vCPUs; :func:`dirtylog.open` makes one with a guest in it. Guest frame numbers are
    in pages of 4 KiB. The contents stay readable after :meth:`close`, until the object goes.
    """

    def __init__(self, port: type[SoftwareProtectPort | SoftwareSyncPort]) -> None:
        super().__init__(SlotTable(), PAGE_SIZE)
        self._port = port(self.slots, self.vcpus)
        self._ram: dict[MemorySlot, Ram] = {}

    @property
    def port(self) -> SoftwareProtectPort | SoftwareSyncPort:
        """The architecture's port."""
        return self._port

    @property
    def stats(self) -> PortStats:
        """The port's counters."""
        return self.port.stats

    @property
    def faults(self) -> int:
        """Misses that had to change a table: those to which a page was mapped, or given back its write permission."""
        return self.port.stats.faults

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

    def contents(self, slot: MemorySlot) -> NDArray[np.uint8]:
        """Return the live memory of a slot, uint8[npages, 4096]."""
        return self._ram[slot].pages

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
        return self._add_vcpu(make_cpu, self.port.tlb_flushed)

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

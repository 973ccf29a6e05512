"""The memory of a KVM guest, and the machine around it: slots, vCPUs, devices, and one of the kernel's logs."""

from __future__ import annotations

import mmap
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from dirtylog.errors import DirtyLogError, InvalidArgumentError
from dirtylog.guests.machine import Machine
from dirtylog.kvm.abi import Cap
from dirtylog.kvm.arch import host_architecture
from dirtylog.kvm.bus import Bus
from dirtylog.kvm.cpu import KvmCpu
from dirtylog.kvm.ports import KvmBitmapPort, KvmManualPort
from dirtylog.kvm.ram import GuestRam
from dirtylog.kvm.ring_port import KvmRingPort
from dirtylog.kvm.statistics import faults_taken
from dirtylog.kvm.system import DEVICE, KvmSystem
from dirtylog.log import start_logging, stop_logging
from dirtylog.memslot import MemorySlot, SlotFlags, SlotTable
from dirtylog.options import MAX_ENTRIES, Backing, Log
from dirtylog.words import words_of_range

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from dirtylog.guests.cpu import Cpu
    from dirtylog.guests.vcpu import Vcpu
    from dirtylog.kvm.arch.architecture import Rom
    from dirtylog.kvm.vm import KvmVm


PORTS: dict[Log, type[KvmBitmapPort | KvmManualPort | KvmRingPort]] = {
    Log.BITMAP: KvmBitmapPort,
    Log.MANUAL: KvmManualPort,
    Log.RING: KvmRingPort,
}


@dataclass(frozen=True, slots=True)
class KvmStats:
    """Counters. ``exits`` are those that came to this process."""

    exits: int


@dataclass(frozen=True, slots=True)
class KvmRingStats(KvmStats):
    """Counters of dirty rings. ``ring_overflows`` are those after which every page was reported, for entries had been lost."""

    ring_full_exits: int
    ring_entries: int
    ring_resets: int
    ring_overflows: int


class KvmMemory(Machine["KvmBitmapPort | KvmManualPort | KvmRingPort"]):
    """A KVM virtual machine. It starts paused, without slots or vCPUs; :func:`dirtylog.open` makes one with a guest in it.

    ``log`` chooses the port, ``ring_entries`` the length of each vCPU's ring. Slot ids are ``address_space << 16 | number``.
    Raises :class:`UnsupportedError` where there is no KVM or no such log, :class:`AccessDeniedError` without permission.
    """

    def __init__(self, log: Log = Log.BITMAP, *, ring_entries: int = MAX_ENTRIES, device: str = DEVICE) -> None:
        self.architecture = host_architecture()
        self.system = KvmSystem(device)
        try:
            self.vm = self.system.create_vm()
        except BaseException:
            self.system.close()
            raise
        try:
            spaces = max(1, self.vm.check_extension(Cap.MULTI_ADDRESS_SPACE))
            slots = SlotTable(address_spaces=spaces, slots_per_space=self.vm.check_extension(Cap.NR_MEMSLOTS))
            super().__init__(slots, mmap.PAGESIZE)
            self._port = self._make_port(log, self.vm, ring_entries)
        except BaseException:
            self.vm.close()
            self.system.close()
            raise
        self.bus = Bus()
        self.cpus: list[KvmCpu] = []
        self._ram: dict[MemorySlot, GuestRam] = {}

    @property
    def port(self) -> KvmBitmapPort | KvmManualPort | KvmRingPort:
        """Which of the kernel's logs this is."""
        return self._port

    @property
    def stats(self) -> KvmStats:
        """What was counted so far."""
        exits = sum(cpu.exits for cpu in self.cpus)
        if isinstance(self._port, KvmRingPort):
            ring = self._port.stats
            return KvmRingStats(exits, ring.full_exits, ring.harvested, ring.resets, ring.overflows)
        return KvmStats(exits)

    @property
    def faults(self) -> int | None:
        """Page faults of the vCPUs, as the kernel counts them; None if it does not: before Linux 5.19, or it interprets."""
        return faults_taken([cpu.statistics for cpu in self.cpus])

    # --- slots

    def add_slot(
        self,
        slot_id: int,
        base_gfn: int,
        npages: int,
        flags: SlotFlags = SlotFlags.NONE,
        *,
        backing: Backing = Backing.ANONYMOUS,
        buffer: Buffer | None = None,
    ) -> MemorySlot:
        """Add a slot of fresh zero pages, or over a ``buffer`` of the user's; with LOG_DIRTY_PAGES it is logged from the start.

        :class:`BadSlotError` for an id out of range (EINVAL), and one that exists or overlaps another (EEXIST).
        """
        with self.slots.lock:
            self._check_open()
            slot = MemorySlot(slot_id, base_gfn, npages, self.page_size, flags & ~SlotFlags.LOG_DIRTY_PAGES)
            self._check_hole(slot, base_gfn)
            self.slots.add(slot)
            try:
                ram = self._ram[slot] = self._make_ram(slot, backing, buffer)
                slot.host_address = ram.address
                self._port.place(slot)
            except BaseException:
                self.slots.remove(slot_id)
                if slot in self._ram:
                    self._ram.pop(slot).close()
                raise
            if flags & SlotFlags.LOG_DIRTY_PAGES:
                start_logging(self, slot_id)
        return slot

    def remove_slot(self, slot_id: int) -> None:
        """Remove a slot, its log and its memory. A get that comes later, or waits for this, finds no slot (ENOENT)."""
        with self.slots.lock:
            slot = self.slots[slot_id]
            stop_logging(self, slot_id)
            with self._port.mmu_lock:
                self._port.remove(slot)
                self.slots.remove(slot_id)
            self._ram.pop(slot).close()

    def move_slot(self, slot_id: int, base_gfn: int) -> None:
        """Move a slot, with its contents and its log, to other guest frames."""
        with self.slots.lock:
            slot = self.slots.check_move(slot_id, base_gfn)
            self._check_hole(slot, base_gfn)
            with self._port.mmu_lock:
                before, slot.base_gfn = slot.base_gfn, base_gfn
                try:
                    self._port.place(slot)
                except BaseException:
                    slot.base_gfn = before
                    raise

    # --- contents

    def contents(self, slot: MemorySlot) -> NDArray[np.uint8]:
        """Return the live memory of a slot, uint8[npages, page_size]. What is written to it goes past the log."""
        ram = self._ram.get(slot)
        if ram is None:
            raise DirtyLogError(f"the memory of slot {slot.id} is gone", slot=slot.id)
        return ram.pages

    def memfd(self, slot_id: int) -> int | None:
        """Return the descriptor of a slot whose backing is a memfd, for another process to map. It stays this object's."""
        return self._ram[self.slots[slot_id]].fd

    @contextmanager
    def host_write(self, address: int, nbytes: int) -> Iterator[memoryview]:
        """Give a writable view of guest memory to a device of this process, for ``readinto`` and the like; logged at the end.

        ``address`` is guest-physical. The bits come after the writes, whether these end well or not: before them, a get could
        take the bits and the writes come after it. Drop the view with the block.
        """
        slot, offset = self.locate(address, nbytes, f"{nbytes} bytes at guest address {address:#x} cannot be written")
        first, end = offset // self.page_size, -(-(offset + nbytes) // self.page_size)
        try:
            yield self.contents(slot).reshape(-1).data[offset : offset + nbytes]
        finally:
            with self._port.mmu_lock:
                if slot.dirty_bitmap is not None and nbytes:
                    slot.dirty_bitmap.merge(words_of_range(first, end - first))

    # --- vCPUs

    def resume(self) -> None:
        """Let every vCPU that has not halted or faulted run."""
        self._check_open()
        super().resume()

    def add_vcpu(self, rom: Rom, entry: int, registers: dict[str, int] | None = None) -> Vcpu:
        """Add a vCPU that begins at ``entry`` under the tables of ``rom``, with these registers; only while paused."""
        self._check_open()
        return self._add_vcpu(partial(self._make_cpu, rom, entry, registers or {}), lambda _: None)

    def _make_cpu(self, rom: Rom, entry: int, registers: dict[str, int], index: int) -> Cpu:
        """Make a vCPU the first time, and later set it to what it was then: KVM does not give a number twice."""
        if index < len(self.cpus):
            cpu = self.cpus[index]
            self.architecture.restore(cpu.vcpu, cpu.initial)
            return cpu
        vcpu = self.vm.create_vcpu(index)
        try:
            self.architecture.start(self.system, vcpu, rom, entry, registers)
            cpu = KvmCpu(self.system, vcpu, self.architecture, self.bus, self._port.ring_full)
            cpu.initial = self.architecture.save(self.system, vcpu)
            if self.vm.check_extension(Cap.BINARY_STATS_FD):
                # Now, for it must not be running.
                cpu.statistics = vcpu.open_statistics()
            if isinstance(self._port, KvmRingPort):
                self._port.add_ring(vcpu)
        except BaseException:
            vcpu.close()
            raise
        self.cpus.append(cpu)
        return cpu

    def close(self) -> None:
        """End the vCPUs, destroy the VM, let its memory go; a get that waits for this finds no slot. A second call does nothing."""
        if self._closed:
            return
        super().close()
        self._port.close()
        with self.slots.lock, self._port.mmu_lock:
            for slot in list(self.slots):
                slot.dirty_bitmap = None
                self.slots.remove(slot.id)
            for cpu in self.cpus:
                cpu.vcpu.close()
            self.vm.close()
            self.system.close()
            for ram in self._ram.values():
                ram.close()
            self._ram.clear()

    def _make_ram(self, slot: MemorySlot, backing: Backing, buffer: Buffer | None) -> GuestRam:
        if buffer is None:
            return GuestRam(slot.npages, backing)
        ram = GuestRam.over(buffer)
        if len(ram.pages) != slot.npages:
            raise InvalidArgumentError(f"a buffer of {len(ram.pages)} pages for a slot of {slot.npages}", slot=slot.id)
        return ram

    def _make_port(self, log: Log, vm: KvmVm, ring_entries: int) -> KvmBitmapPort | KvmManualPort | KvmRingPort:
        if log is Log.RING:
            return KvmRingPort(vm, self.architecture, self.slots, self.vcpus, entries=ring_entries)
        return KvmManualPort(vm) if log is Log.MANUAL else KvmBitmapPort(vm)

    def _check_open(self) -> None:
        if self._closed:
            raise DirtyLogError("this KVM guest is closed")

    def _check_hole(self, slot: MemorySlot, base_gfn: int) -> None:
        start, end = (address // self.page_size for address in self.architecture.hole)
        if base_gfn < end and start < base_gfn + slot.npages:
            raise InvalidArgumentError(
                f"slot {slot.id:#x} (gfn {base_gfn:#x} to {base_gfn + slot.npages - 1:#x}) reaches into gfn {start:#x} to "
                f"{end - 1:#x}, where the architecture has its devices",
                slot=slot.id,
                remedy=f"end it before, or begin it at gfn {end:#x}",
            )

"""The kernel's dirty bitmap, as two ports: with automatic protection, and with manual protection.

Whoever writes guest memory through KVM is in the kernel's bitmap. This process is not: what it writes (``KvmMemory.write``,
``host_write``) it marks in the slot's own bitmap, and a get returns both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from dirtylog.errors import UnsupportedError
from dirtylog.kvm import abi
from dirtylog.kvm.abi import Cap
from dirtylog.port import Exactness, KernelPort, Port, ProtectPort
from dirtylog.words import PAGES_PER_WORD, DirtyWords, word_count

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dirtylog.kvm.vm import KvmVm
    from dirtylog.memslot import MemorySlot

BLIND_SPOTS = (
    "writes by this process straight into the guest's mapping, other than through write and host_write",
    "writes by other processes into shared guest memory (memfd, or a buffer that they map too)",
    "writes by the kernel and by devices that do not go through KVM: vhost, VFIO and other DMA into pinned guest pages, io_uring",
)

# How much one KVM_CLEAR_DIRTY_LOG clears: a call holds the kernel's mmu_lock, and vCPUs that fault wait for it.
_CLEAR_WORDS = (1 << 30) // 4096 // PAGES_PER_WORD


class KvmPort(Port):
    """What the ports of KVM share: logging is a flag of the slot."""

    exactness: ClassVar[Exactness] = Exactness.SUPERSET
    """KVM marks a page when it becomes writable for the guest: on some hosts the first read of a page does that too."""
    blind_spots: ClassVar[tuple[str, ...]] = BLIND_SPOTS
    how: ClassVar[str]

    def __init__(self, vm: KvmVm) -> None:
        super().__init__()
        self._vm = vm

    def start_logging(self, slot: MemorySlot) -> None:
        """Set the slot's flag: the kernel protects its pages and flushes."""
        self.place(slot)

    def stop_logging(self, slot: MemorySlot) -> None:
        """Clear the slot's flag: the kernel frees its bitmap."""
        self.place(slot)

    def flush_tlbs(self, slot: MemorySlot) -> None:
        """Do nothing: the kernel flushes before its calls return."""

    def place(self, slot: MemorySlot) -> None:
        """Tell the kernel where the slot lies and what its flags are: create it, move it, or toggle its logging."""
        self._vm.set_user_memory_region(slot.id, slot.flags, slot.base_gfn * slot.page_size, slot.nbytes, slot.host_address)

    def remove(self, slot: MemorySlot) -> None:
        """Delete the slot, and its log with it."""
        self._vm.set_user_memory_region(slot.id, slot.flags, slot.base_gfn * slot.page_size, 0, slot.host_address)

    def ring_full(self, vcpu: int) -> None:
        """Make room in a vCPU's dirty ring. Only where there is one."""
        raise UnsupportedError(f"vCPU {vcpu} says that its dirty ring is full, and it has none")

    def close(self) -> None:
        """Let go of what vCPUs own, before they are closed."""


class KvmBitmapPort(KvmPort, KernelPort):
    """KVM_GET_DIRTY_LOG: the kernel runs the four steps in one call."""

    name = "kvm-bitmap"
    how = "KVM_GET_DIRTY_LOG"

    def __init__(self, vm: KvmVm) -> None:
        super().__init__(vm)
        # By slot: the words that it is always asked for, and the argument made of them.
        self._arguments: dict[MemorySlot, tuple[NDArray[np.uint64], abi.DirtyLogArgument]] = {}

    def stop_logging(self, slot: MemorySlot) -> None:
        """Clear the slot's flag: the kernel frees its bitmap."""
        super().stop_logging(slot)
        self._arguments.pop(slot, None)

    def fetch_dirty_log(self, slot: MemorySlot, words: NDArray[np.uint64]) -> None:
        """Let the kernel write its snapshot."""
        known = self._arguments.get(slot)
        if known is None or known[0] is not words:
            known = words, abi.DirtyLogArgument(slot=slot.id, dirty_bitmap=words.ctypes.data)
            self._arguments[slot] = known
        self._vm.get_dirty_log_into(known[1])


class KvmManualPort(KvmPort, ProtectPort):
    """KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: KVM_GET_DIRTY_LOG only reads, KVM_CLEAR_DIRTY_LOG takes and protects.

    So a get under automatic protection (:class:`~dirtylog.dirty_log.DirtyLog` without manual_protect) protects just the pages that
    it returns, in calls that are short for the vCPUs, and logging can begin with all pages dirty and none protected.
    """

    name = "kvm-manual"
    how = "KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG"

    def __init__(self, vm: KvmVm) -> None:
        super().__init__(vm)
        self._supported = vm.check_extension(Cap.MANUAL_DIRTY_LOG_PROTECT2)
        if not self._supported & abi.DIRTY_LOG_MANUAL_PROTECT_ENABLE:
            raise UnsupportedError("this kernel's KVM has no manual protect (Linux 5.2 has it)", remedy="use the bitmap")
        # By slot: where the kernel's bitmap is copied to, and the argument made of it.
        self._copies: dict[MemorySlot, tuple[NDArray[np.uint64], abi.DirtyLogArgument]] = {}
        self._mask = np.zeros(_CLEAR_WORDS, np.uint64)

    def start_logging(self, slot: MemorySlot) -> None:
        """Begin with no page dirty and every page protected."""
        self._start(slot, abi.DIRTY_LOG_MANUAL_PROTECT_ENABLE)

    def start_logging_all_set(self, slot: MemorySlot) -> None:
        """Begin with every page dirty and none protected (KVM_DIRTY_LOG_INITIALLY_SET, Linux 5.7)."""
        if not self._supported & abi.DIRTY_LOG_INITIALLY_SET:
            raise UnsupportedError("this kernel's KVM cannot begin with all pages dirty", remedy="leave initially_all_set out")
        self._start(slot, abi.DIRTY_LOG_MANUAL_PROTECT_ENABLE | abi.DIRTY_LOG_INITIALLY_SET)

    def stop_logging(self, slot: MemorySlot) -> None:
        """Clear the slot's flag."""
        super().stop_logging(slot)
        self._copies.pop(slot, None)

    def sync_dirty_log(self, slot: MemorySlot) -> None:
        """Add what is in the kernel's bitmap to the slot's own. That changes nothing: the kernel keeps what is not cleared."""
        copy, argument = self._copies[slot]
        self._vm.get_dirty_log_into(argument)
        # Counted, for that is many times as fast as any().
        if not np.count_nonzero(copy):
            return
        with self.mmu_lock:
            if slot.dirty_bitmap is not None:
                slot.dirty_bitmap.merge_all(copy)

    def enable_log_dirty(self, slot: MemorySlot, words: DirtyWords) -> None:
        """Clear these pages in the kernel's bitmap, which protects them, piece by piece."""
        pieces = np.flatnonzero(np.diff(words.offsets // _CLEAR_WORDS)) + 1
        for offsets, values in zip(np.split(words.offsets, pieces), np.split(words.values, pieces), strict=True):
            if not len(offsets):
                continue
            first, last = int(offsets[0]), int(offsets[-1])
            mask = self._mask[: last - first + 1]
            mask[:] = 0
            mask[offsets - first] = values
            first_page = first * PAGES_PER_WORD
            # A multiple of 64, but where it ends with the slot: there it may, and must, be shorter.
            npages = min(len(mask) * PAGES_PER_WORD, slot.npages - first_page)
            self._vm.clear_dirty_log(slot.id, first_page, npages, mask)

    def _start(self, slot: MemorySlot, flags: int) -> None:
        # The capability is the VM's, and looked at when a bitmap is made: so it is set anew for each slot.
        self._vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, flags)
        copy = np.zeros(word_count(slot.npages), np.uint64)
        self._copies[slot] = copy, abi.DirtyLogArgument(slot=slot.id, dirty_bitmap=copy.ctypes.data)
        self.place(slot)

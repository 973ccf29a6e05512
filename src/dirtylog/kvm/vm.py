"""A virtual machine: the vm descriptor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dirtylog.errors import InvalidArgumentError
from dirtylog.kvm import abi
from dirtylog.kvm.descriptor import KvmDescriptor
from dirtylog.kvm.vcpu import KvmVcpu

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dirtylog.kvm.abi import Cap
    from dirtylog.memslot import SlotFlags


_MAX_INT = (1 << 31) - 1


class KvmVm(KvmDescriptor):
    """The vm descriptor: memory slots, dirty logs, capabilities, vCPUs. A thin layer: the kernel's semantics, typed errors."""

    def __init__(self, fd: int, run_size: int) -> None:
        super().__init__(fd)
        self._run_size = run_size

    def check_extension(self, cap: Cap) -> int:
        """Return what the kernel answers for a capability of this VM: 0 is no."""
        return self.ioctl(abi.KVM_CHECK_EXTENSION, int(cap), f"cannot ask for {cap.name}")

    def enable_cap(self, cap: Cap, *arguments: int, what: str | None = None, remedy: str | None = None) -> None:
        """Enable a capability with up to four arguments."""
        argument = abi.EnableCap(cap=cap)
        argument.args[: len(arguments)] = list(arguments)
        self.ioctl(abi.KVM_ENABLE_CAP, argument, what or f"cannot enable {cap.name} with {arguments}", remedy=remedy)

    def create_vcpu(self, index: int) -> KvmVcpu:
        """Return a new vCPU. It goes with its VM: a number cannot be used again."""
        if not 0 <= index <= _MAX_INT:
            raise InvalidArgumentError(
                f"cannot create vCPU {index}", reason="numbers begin at 0, and KVM_CAP_MAX_VCPU_ID ends them"
            )
        fd = self.ioctl(abi.KVM_CREATE_VCPU, index, f"cannot create vCPU {index}")
        return KvmVcpu(fd, index, self._run_size)

    def set_user_memory_region(self, slot: int, flags: SlotFlags, guest_address: int, nbytes: int, host_address: int) -> None:
        """Create a slot, toggle its logging, move it, or with ``nbytes`` 0 delete it (KVM_SET_USER_MEMORY_REGION).

        Of a slot that exists the size, the host address and READONLY may not change (EINVAL); places that overlap are EEXIST.
        Safe as long as the caller keeps the host memory mapped while the slot exists; unmapped memory faults in the guest only.
        """
        region = abi.UserMemoryRegion(
            slot=slot, flags=flags, guest_phys_addr=guest_address, memory_size=nbytes, userspace_addr=host_address
        )
        what = (
            f"cannot delete slot {slot:#x}"
            if not nbytes
            else f"cannot set slot {slot:#x}: {nbytes} bytes at guest address {guest_address:#x}, host address {host_address:#x}, "
            f"flags {int(flags)}"
        )
        self.ioctl(abi.KVM_SET_USER_MEMORY_REGION, region, what, slot=slot)

    def get_dirty_log(self, slot: int, words: NDArray[np.uint64]) -> None:
        """Overwrite ``words``, uint64[ceil(npages / 64)], with the slot's dirty bitmap; not in manual mode, take and re-arm it.

        EINVAL for a slot id out of range, ENOENT for no slot or one that is not logged, ENXIO with a ring.
        """
        self.get_dirty_log_into(abi.DirtyLogArgument(slot=slot, dirty_bitmap=words.ctypes.data))

    def get_dirty_log_into(self, argument: abi.DirtyLogArgument) -> None:
        """Do the same with an argument that was made before; whoever made it keeps its words alive."""
        self.ioctl(abi.KVM_GET_DIRTY_LOG, argument, "cannot get the dirty log of slot %#x", argument.slot, slot=argument.slot)

    def clear_dirty_log(self, slot: int, first_page: int, npages: int, words: NDArray[np.uint64]) -> None:
        """Clear and re-protect the pages that are set in ``words``, whose bit 0 is ``first_page`` (KVM_CLEAR_DIRTY_LOG).

        ``first_page`` is a multiple of 64, and so is ``npages`` unless the range ends with the slot (else EINVAL).
        """
        argument = abi.ClearDirtyLogArgument(slot=slot, num_pages=npages, first_page=first_page, dirty_bitmap=words.ctypes.data)
        what = f"cannot clear {npages} pages from page {first_page} of slot {slot:#x}"
        self.ioctl(abi.KVM_CLEAR_DIRTY_LOG, argument, what, slot=slot)

    def enable_dirty_ring(self, cap: Cap, nbytes: int) -> None:
        """Give every vCPU that will be made a ring of ``nbytes``. Before any vCPU, and once (EINVAL); E2BIG if it is too large."""
        remedy = "before any vCPU: a power of two, from 256 entries (1024 with Intel's log) to 65536, of 16 bytes each"
        self.enable_cap(cap, nbytes, what=f"cannot enable dirty rings of {nbytes} bytes", remedy=remedy)

    def reset_dirty_rings(self) -> int:
        """Re-protect the pages of all harvested entries, and return how many there were. A signal may end it early."""
        return self.ioctl(abi.KVM_RESET_DIRTY_RINGS, 0, "cannot reset the dirty rings")

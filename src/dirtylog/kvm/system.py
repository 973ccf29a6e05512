"""/dev/kvm itself: the system descriptor."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from dirtylog.errors import AccessDeniedError, UnsupportedError
from dirtylog.kvm import abi
from dirtylog.kvm.descriptor import KvmDescriptor
from dirtylog.kvm.vm import KvmVm

if TYPE_CHECKING:
    from dirtylog.kvm.abi import Cap

DEVICE = "/dev/kvm"

_NO_DEVICE = (
    "use a Linux host with virtualization switched on, and load its module (kvm_intel, kvm_amd, kvm); in a virtual machine, \
ask for nested virtualization; in a container, pass /dev/kvm in; emulated guests (emu:ARCH) run everywhere"
)


class KvmSystem(KvmDescriptor):
    """The system descriptor: what this host's KVM can do, and the maker of virtual machines.

    Raises :class:`UnsupportedError` where there is no such device, or its interface is another one, and
    :class:`AccessDeniedError` where the user may not open it.
    """

    def __init__(self, device: str = DEVICE) -> None:
        try:
            fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise _cannot_open(device, error) from error
        super().__init__(fd)
        try:
            self.api_version = self._api_version(device)
        except BaseException:
            self.close()
            raise

    def _api_version(self, device: str) -> int:
        version = self.ioctl(abi.KVM_GET_API_VERSION, 0, f"{device} is not KVM", remedy=_NO_DEVICE)
        if version != abi.API_VERSION:
            raise UnsupportedError(f"{device} speaks version {version} of KVM's interface; dirtylog speaks {abi.API_VERSION}")
        return version

    def check_extension(self, cap: Cap) -> int:
        """Return what the kernel answers for a capability: 0 is no. A VM may know better than the system."""
        return self.ioctl(abi.KVM_CHECK_EXTENSION, int(cap), f"cannot ask for {cap.name}")

    def create_vm(self) -> KvmVm:
        """Return a new virtual machine, of this machine's default type."""
        fd = self.ioctl(abi.KVM_CREATE_VM, 0, "cannot create a virtual machine")
        return KvmVm(fd, self.ioctl(abi.KVM_GET_VCPU_MMAP_SIZE, 0, "cannot learn the size of a vCPU's run page"))


def _cannot_open(device: str, error: OSError) -> Exception:
    if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ENOTDIR):
        return UnsupportedError(f"this host has no {device}", errno=error.errno, reason=error.strerror, remedy=_NO_DEVICE)
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessDeniedError(
            f"this user may not open {device}",
            errno=error.errno,
            reason=error.strerror,
            remedy="join its group (often: sudo usermod -aG kvm USER, then log in again), or run as root",
        )
    return KvmDescriptor.error(error, f"cannot open {device}")

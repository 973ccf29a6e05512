"""A userfaultfd for asynchronous write protection: who registers memory with it has every write marked, and nobody handles a fault.

Linux 6.7 added UFFD_FEATURE_WP_ASYNC: the kernel itself resolves a write-protect fault, by giving the permission back and clearing
the mark of the page table entry. The writing thread goes on after a microsecond; PAGEMAP_SCAN finds the entries without the mark.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from typing import TYPE_CHECKING

from dirtylog.errors import AccessDeniedError, DirtyLogError, UnsupportedError
from dirtylog.linux import abi
from dirtylog.linux.abi import Feature
from dirtylog.linux.descriptor import UnsharedDescriptor

if TYPE_CHECKING:
    from collections.abc import Mapping

DEVICE = "/dev/userfaultfd"
NEEDED = Feature.WP_ASYNC | Feature.WP_UNPOPULATED | Feature.WP_HUGETLBFS_SHMEM
FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | abi.UFFD_USER_MODE_ONLY
_NEWER = "use Linux 6.7 or later (6.10 on arm64), or port compare, which needs nothing of the kernel"
_libc = ctypes.CDLL(None, use_errno=True)


class Userfaultfd(UnsharedDescriptor):
    """One userfaultfd, for the address space of the process that created it, whoever holds the descriptor.

    As long as it is open, here or in another process, what was registered with it stays so.
    """

    @classmethod
    def create(cls) -> Userfaultfd:
        """Return one for this process, enabled. :class:`UnsupportedError` or :class:`AccessDeniedError` where there can be none."""
        uffd = cls(new_userfaultfd())
        try:
            uffd.enable()
        except BaseException:
            uffd.close()
            raise
        return uffd

    def enable(self) -> None:
        """Agree on the features; once, and before anything else."""
        argument = abi.UffdioApi(api=abi.UFFD_API, features=NEEDED)
        try:
            self.ioctl(abi.UFFDIO_API, argument, "cannot enable asynchronous write protection")
        except DirtyLogError as error:
            if error.errno != errno.EINVAL:
                raise
            missing = NEEDED & ~Feature(_features())
            raise UnsupportedError(
                "this kernel has no asynchronous write protection",
                reason=f"userfaultfd lacks {', '.join(feature.name or '' for feature in missing) or 'the features together'}",
                remedy=_NEWER,
            ) from error

    def register(self, start: int, nbytes: int) -> None:
        """Have the writes to whole pages of memory marked; harmless where they are already. Holes in the range are passed over.

        What is not registered counts as written throughout, and so does what has just been.
        The ``errno`` of an error: EBUSY where another userfaultfd has it, EPERM for a file that may not be written, EINVAL for what
        the kernel itself keeps (vdso, vvar), ENOMEM when the address space has gone.
        """
        argument = abi.UffdioRegister(start=start, len=nbytes, mode=abi.REGISTER_MODE_WP)
        self.ioctl(abi.UFFDIO_REGISTER, argument, "cannot watch %#x to %#x", start, start + nbytes)

    def register_afresh(self, start: int, nbytes: int) -> None:
        """Register memory, and take every mark away: all that is there counts as written.

        Where the kernel makes one mapping of several after a move (mremap) it can drop their watch, but not the marks: stores do
        not clear these then, nor would they after another registration. The ``errno`` is ENOENT where a move comes in the middle.
        """
        self.register(start, nbytes)
        argument = abi.UffdioWriteprotect(start=start, len=nbytes)
        self.ioctl(abi.UFFDIO_WRITEPROTECT, argument, "cannot take the marks away from %#x to %#x", start, start + nbytes)

    def unregister(self, start: int, nbytes: int) -> None:
        """Let go of memory, if it is still there: where it was unmapped, or went with its address space, there is nothing to do."""
        try:
            self.ioctl(abi.UFFDIO_UNREGISTER, abi.UffdioRange(start=start, len=nbytes), "cannot let go of %#x", start)
        except DirtyLogError as error:
            if error.errno not in (errno.EINVAL, errno.ENOMEM, errno.ESRCH):
                raise


def missing_uffd() -> DirtyLogError | None:
    """Return why this process cannot watch its memory with a userfaultfd, or None if it can."""
    try:
        _try()
    except DirtyLogError as error:
        return error
    return None


@functools.cache
def _try() -> None:
    """Make one, once: what fails is tried again, for it may be for want of a descriptor."""
    Userfaultfd.create().close()


def new_userfaultfd() -> int:
    """Return a new userfaultfd: through the system call, which needs no privilege, or through the device."""
    # Safe: the call takes an integer and touches no memory.
    fd = int(_libc.syscall(abi.userfaultfd_number(), FLAGS))
    if fd >= 0:
        return fd
    first = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        raise _refused(first) from first
    with UnsharedDescriptor(device) as opened:
        return opened.ioctl(abi.USERFAULTFD_IOC_NEW, FLAGS, f"{DEVICE} gives no userfaultfd")


def _refused(error: OSError) -> DirtyLogError:
    if error.errno == errno.ENOSYS:
        return UnsupportedError("this kernel has no userfaultfd", errno=error.errno, reason="ENOSYS", remedy=_NEWER)
    if error.errno not in (errno.EPERM, errno.EACCES):
        return DirtyLogError("no userfaultfd can be had", errno=error.errno, reason=error.strerror)
    return AccessDeniedError(
        "userfaultfd is refused",
        errno=error.errno,
        reason=f"{errno.errorcode.get(error.errno or 0)}: a seccomp filter or a security module is probably in the way",
        remedy=f"allow the system call userfaultfd (as with docker --security-opt seccomp=...) or give access to {DEVICE}; or use "
        "port compare",
    )


def _features() -> int:
    """Return the features that the kernel has. An attempt spends the descriptor, so it takes one of its own."""
    with UnsharedDescriptor(new_userfaultfd()) as uffd:
        argument = abi.UffdioApi(api=abi.UFFD_API)
        uffd.ioctl(abi.UFFDIO_API, argument, "cannot ask for the features of userfaultfd")
        return int(argument.features)


def describe_features() -> Mapping[str, bool]:
    """Return which of the needed features there are, by name."""
    found = _features()
    return {feature.name or "": bool(found & feature) for feature in Feature}

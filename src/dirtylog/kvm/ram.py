"""The memory of a KVM guest, as this process sees it: a mapping of its own, or a buffer that the user brings."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.errors import DirtyLogError, InvalidArgumentError, UnsupportedError
from dirtylog.guests.host import host_memory
from dirtylog.options import Backing

if TYPE_CHECKING:
    from typing_extensions import Buffer

_HUGE_PAGE_BYTES = 2 << 20
# Python has no names for these before 3.13: Linux include/uapi/asm-generic/mman-common.h.
_MAP_HUGETLB = 0x40000
_MAP_NORESERVE = 0x4000


class GuestRam:
    """The memory of one slot.

    ``pages`` is uint8[npages, page_size], live; ``address`` is where it begins in this process; ``fd`` the memfd, if it is one.
    The mapping lives as long as somebody refers to its pages.
    """

    def __init__(self, npages: int, backing: Backing) -> None:
        self.fd: int | None = None
        nbytes = npages * mmap.PAGESIZE
        total = host_memory()
        if total is not None and nbytes > total:
            raise InvalidArgumentError(f"guest memory of {nbytes} bytes: this host has {total} bytes")
        if backing is Backing.HUGETLB and nbytes % _HUGE_PAGE_BYTES:
            raise InvalidArgumentError(f"guest memory of {nbytes} bytes in huge pages: it must be a multiple of {_HUGE_PAGE_BYTES}")
        try:
            self._mapping = self._map(nbytes, backing)
        except (OSError, OverflowError, ValueError) as error:
            self.close()
            raise _cannot_map(nbytes, backing, error) from error
        self.pages = np.frombuffer(self._mapping, np.uint8).reshape(npages, mmap.PAGESIZE)
        self.address = self.pages.ctypes.data

    @classmethod
    def over(cls, buffer: Buffer) -> GuestRam:
        """Return guest memory that lies in a writable buffer of the user's: whole pages, at a page's boundary."""
        ram = cls.__new__(cls)
        ram.fd = None
        try:
            view = memoryview(buffer).cast("B")
        except TypeError as error:
            raise InvalidArgumentError("guest memory must be a contiguous buffer", reason=str(error)) from error
        octets = np.frombuffer(view, np.uint8)
        ram.address = octets.ctypes.data
        if view.readonly:
            raise InvalidArgumentError("guest memory must be writable, and this buffer is read-only")
        if not len(octets) or len(octets) % mmap.PAGESIZE or ram.address % mmap.PAGESIZE:
            raise InvalidArgumentError(
                f"a buffer of {len(octets)} bytes at address {ram.address:#x}: guest memory must be whole pages of {mmap.PAGESIZE} "
                "bytes, and begin at a multiple of that",
                remedy="an mmap.mmap always does",
            )
        ram.pages = octets.reshape(-1, mmap.PAGESIZE)
        return ram

    def close(self) -> None:
        """Close the memfd. The mapping goes with the last reference to its pages."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def _map(self, nbytes: int, backing: Backing) -> mmap.mmap:
        if backing is Backing.MEMFD:
            self.fd = os.memfd_create("dirtylog-guest", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, nbytes)
            return mmap.mmap(self.fd, nbytes)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if backing is Backing.HUGETLB:
            return mmap.mmap(-1, nbytes, flags=flags | _MAP_HUGETLB)
        mapping = mmap.mmap(-1, nbytes, flags=flags | _MAP_NORESERVE)
        mapping.madvise(mmap.MADV_HUGEPAGE if backing is Backing.THP else mmap.MADV_NOHUGEPAGE)
        return mapping


def _cannot_map(nbytes: int, backing: Backing, error: Exception) -> DirtyLogError:
    what = f"the host cannot map {nbytes} bytes of {backing.value} memory"
    code = error.errno if isinstance(error, OSError) else None
    if backing is Backing.HUGETLB:
        need = -(-nbytes // _HUGE_PAGE_BYTES)
        return UnsupportedError(
            what,
            errno=code,
            reason=str(error),
            remedy=f"reserve {need} huge pages, as root: sysctl vm.nr_hugepages={need}; or use thp, which needs no reserve",
        )
    return DirtyLogError(what, errno=code, reason=str(error), remedy="ask for less memory")

"""userfaultfd and PAGEMAP_SCAN: structs, ioctl numbers and constants.

Source: Linux include/uapi/linux/userfaultfd.h and include/uapi/linux/fs.h.
"""

from __future__ import annotations

import ctypes
import enum
import platform

import numpy as np

from dirtylog.linux.layout import U64, Direction, Struct, ioctl_number, struct

UFFDIO = 0xAA
UFFD_API = 0xAA
UFFD_USER_MODE_ONLY = 1
"""The flag with which userfaultfd(2) needs no privilege (Linux 5.11): no handler is then given faults of the kernel itself.

Asynchronous write protection has no handler, so it loses nothing: what the kernel writes for the process is logged all the same.
"""


@struct(24)
class UffdioApi(Struct):
    """uffdio_api: features asked for, and features granted."""

    api: U64
    features: U64
    ioctls: U64


@struct(16)
class UffdioRange(Struct):
    """uffdio_range, in bytes."""

    start: U64
    len: U64


@struct(32)
class UffdioRegister(Struct):
    """uffdio_register."""

    start: U64
    len: U64
    mode: U64
    ioctls: U64


@struct(24)
class UffdioWriteprotect(Struct):
    """uffdio_writeprotect; with ``mode`` 0 it takes the marks away."""

    start: U64
    len: U64
    mode: U64


@struct(96)
class PmScanArg(Struct):
    """pm_scan_arg. ``size`` must be 96; ``walk_end`` comes back, the others do not change."""

    size: U64
    flags: U64
    start: U64
    end: U64
    walk_end: U64
    vec: U64
    vec_len: U64
    max_pages: U64
    category_inverted: U64
    category_mask: U64
    category_anyof_mask: U64
    return_mask: U64


@struct(104)
class ProcmapQuery(Struct):
    """procmap_query (Linux 6.11), without the pointers' contents."""

    size: U64
    query_flags: U64
    query_addr: U64
    vma_start: U64
    vma_end: U64
    vma_flags: U64
    vma_page_size: U64
    vma_offset: U64
    inode: U64
    dev: U64
    name_and_build_id_size: U64
    vma_name_addr: U64
    build_id_addr: U64


PAGE_REGION = np.dtype([("start", np.uint64), ("end", np.uint64), ("categories", np.uint64)])
"""page_region: addresses in bytes."""


class Feature(enum.IntFlag):
    """UFFD_FEATURE_*, as far as dirtylog asks for them."""

    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    WP_ASYNC = 1 << 15


REGISTER_MODE_WP = 2


class Category(enum.IntFlag):
    """PAGE_IS_*."""

    WPALLOWED = 1
    WRITTEN = 2
    FILE = 4
    PRESENT = 8
    SWAPPED = 16
    HUGE = 64
    SOFT_DIRTY = 128


class Scan(enum.IntFlag):
    """PM_SCAN_*: write-protect what matches; fail on memory that no asynchronous userfaultfd watches."""

    WP_MATCHING = 1
    CHECK_WPASYNC = 2


UFFDIO_API = ioctl_number(Direction.BOTH, 0x3F, ctypes.sizeof(UffdioApi), magic=UFFDIO)
UFFDIO_REGISTER = ioctl_number(Direction.BOTH, 0x00, ctypes.sizeof(UffdioRegister), magic=UFFDIO)
UFFDIO_UNREGISTER = ioctl_number(Direction.READ, 0x01, ctypes.sizeof(UffdioRange), magic=UFFDIO)
UFFDIO_WRITEPROTECT = ioctl_number(Direction.BOTH, 0x06, ctypes.sizeof(UffdioWriteprotect), magic=UFFDIO)
USERFAULTFD_IOC_NEW = ioctl_number(Direction.NONE, 0x00, magic=UFFDIO)
PAGEMAP_SCAN = ioctl_number(Direction.BOTH, 16, ctypes.sizeof(PmScanArg), magic=ord("f"))
PROCMAP_QUERY = ioctl_number(Direction.BOTH, 17, ctypes.sizeof(ProcmapQuery), magic=ord("f"))

PIDFD_GETFD = 438
"""pidfd_getfd(2) (Linux 5.6): it came after all architectures had agreed on numbers."""
_USERFAULTFD = {"x86_64": 323, "i386": 374, "i686": 374, "arm": 388, "ppc64le": 364, "ppc64": 364, "s390x": 355}
_USERFAULTFD_GENERIC = 282


def userfaultfd_number(machine: str | None = None) -> int:
    """Return the number of userfaultfd(2); the architectures since 2012 share one."""
    name = platform.machine() if machine is None else machine
    return _USERFAULTFD.get(name, 388 if name.startswith("armv") else _USERFAULTFD_GENERIC)

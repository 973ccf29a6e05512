"""What can be chosen for a KVM guest. This file needs no KVM: the command line reads it everywhere."""

from __future__ import annotations

import enum
from dataclasses import dataclass

MAX_ENTRIES = 65536
"""KVM_DIRTY_RING_MAX_ENTRIES."""


class Log(enum.Enum):
    """Which of the kernel's logs a VM is made with."""

    BITMAP = "bitmap"
    """KVM_GET_DIRTY_LOG, which takes and protects."""
    MANUAL = "manual"
    """KVM_GET_DIRTY_LOG, which reads, and KVM_CLEAR_DIRTY_LOG, which takes and protects."""
    RING = "ring"
    """A dirty ring for each vCPU."""


class Backing(enum.Enum):
    """What guest memory is made of."""

    ANONYMOUS = "anonymous"
    """Private anonymous pages of the host's page size; transparent huge pages are kept out."""
    THP = "thp"
    """Private anonymous pages, and transparent huge pages wherever the host has them (MADV_HUGEPAGE)."""
    HUGETLB = "hugetlb"
    """Huge pages from the host's reserved pool, of 2 MiB (MAP_HUGETLB). Memory is a multiple of that."""
    MEMFD = "memfd"
    """Shared memory in a file without a name, which another process can map (memfd_create)."""


@dataclass(frozen=True, slots=True)
class KvmOptions:
    """How a KVM guest is made: its log, what its RAM is made of, and the length of each vCPU's dirty ring (a power of two)."""

    log: Log = Log.BITMAP
    backing: Backing = Backing.ANONYMOUS
    ring_entries: int = MAX_ENTRIES

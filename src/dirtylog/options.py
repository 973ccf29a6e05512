"""What can be chosen for a KVM guest, and for a process. Plain data, which needs no KVM and no Linux."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from dirtylog.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

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

    @classmethod
    def of(cls, log: str | None, backing: str | None, ring_entries: int | None) -> KvmOptions | None:
        """Return options from words as users write them; None if nothing is chosen."""
        if log is None and backing is None and ring_entries is None:
            return None
        chosen = _member(Log, log or Log.BITMAP, "log")
        if ring_entries is not None and chosen is not Log.RING:
            raise InvalidArgumentError(f"a ring of {ring_entries} entries goes with log ring, not with log {chosen.value}")
        entries = MAX_ENTRIES if ring_entries is None else ring_entries
        return cls(chosen, _member(Backing, backing or Backing.ANONYMOUS, "backing"), entries)


class ProcessPorts(enum.Enum):
    """How the writes of a process are logged."""

    AUTO = "auto"
    """The first of the others that works."""
    UFFD = "uffd"
    """Asynchronous write protection of a userfaultfd, and PAGEMAP_SCAN."""
    SOFT_DIRTY = "soft-dirty"
    """Soft-dirty bits. The process stops for each get."""
    COMPARE = "compare"
    """A copy of the memory, compared."""


@dataclass(frozen=True, slots=True)
class ProcessOptions:
    """How a process is logged: its port, and words that choose among its mappings."""

    port: ProcessPorts = ProcessPorts.AUTO
    maps: tuple[str, ...] = ()

    @classmethod
    def of(cls, port: str | None, maps: Sequence[str] | None) -> ProcessOptions:
        """Return options from words as users write them."""
        return cls(_member(ProcessPorts, port or ProcessPorts.AUTO, "port"), tuple(maps or ()))


_E = TypeVar("_E", bound=enum.Enum)


def _member(kind: type[_E], value: _E | str, what: str) -> _E:
    try:
        return kind(value)
    except ValueError as error:
        raise InvalidArgumentError(
            f"unknown {what} {value!r}; it is one of: {', '.join(str(one.value) for one in kind)}"
        ) from error

"""What this kernel really does, found by trying: never by its version."""

from __future__ import annotations

import functools
import mmap

import numpy as np

from dirtylog.linux.pagemap import Pagemap, Scanner
from dirtylog.linux.userfaultfd import Userfaultfd

_TABLE_BYTES = 2 << 20
_MADV_DONTNEED = 4


@functools.cache
def sees_discarded_tables() -> bool:
    """Return whether a scan reports pages that were discarded together with their page table.

    Until July 2026 a discarded transparent huge page was clean (Linux: fixes of 12f6b01a0bcb and 2bad466cc9d9, backported).
    """
    with mmap.mmap(-1, 2 * _TABLE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        octets = np.frombuffer(memory, np.uint8)
        start = -(-octets.ctypes.data // _TABLE_BYTES) * _TABLE_BYTES
        offset = start - octets.ctypes.data
        memory.madvise(mmap.MADV_HUGEPAGE, offset, _TABLE_BYTES)
        octets[offset : offset + _TABLE_BYTES : mmap.PAGESIZE] = 1
        with Userfaultfd.create() as uffd, Pagemap() as pagemap:
            uffd.register(start, _TABLE_BYTES)
            scanner = Scanner(pagemap, _TABLE_BYTES // mmap.PAGESIZE)
            scanner.take(start, start + _TABLE_BYTES, lambda _: None)
            memory.madvise(_MADV_DONTNEED, offset, _TABLE_BYTES)
            found = 0

            def count(regions: np.ndarray) -> None:
                nonlocal found
                found += int((regions["end"] - regions["start"]).sum())

            scanner.take(start, start + _TABLE_BYTES, count)
        del octets
    return found == _TABLE_BYTES

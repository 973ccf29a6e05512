"""What this kernel really does, found by trying: never by its version."""

from __future__ import annotations

import functools
import mmap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.errors import AccessDeniedError, DirtyLogError
from dirtylog.linux.abi import Category
from dirtylog.linux.pagemap import Pagemap, Scanner
from dirtylog.linux.userfaultfd import Userfaultfd

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_TABLE_BYTES = 2 << 20
_MADV_DONTNEED = 4


@functools.cache
def sees_discarded_tables() -> bool:
    """Return whether a scan reports pages that were discarded together with their page table.

    Until July 2026 a discarded transparent huge page was clean (Linux: fixes of 12f6b01a0bcb and 2bad466cc9d9, backported). Where
    there are such pages, and none can be had just now to try it with, the answer is no.
    """
    try:
        if "[never]" in _HUGE_PAGES.read_text(encoding="ascii"):
            return True
    except FileNotFoundError:
        return True
    except OSError as error:
        raise DirtyLogError(f"cannot read {_HUGE_PAGES}", errno=error.errno, reason=error.strerror) from error
    # Not in a with statement: what refers to its pages could then not be let go of before it is closed.
    memory = mmap.mmap(-1, 2 * _TABLE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    octets = np.frombuffer(memory, np.uint8)
    start = -(-octets.ctypes.data // _TABLE_BYTES) * _TABLE_BYTES
    offset = start - octets.ctypes.data
    memory.madvise(mmap.MADV_HUGEPAGE, offset, _TABLE_BYTES)
    octets[offset : offset + _TABLE_BYTES : mmap.PAGESIZE] = 1
    categories = found = 0

    def look(regions: NDArray[np.void]) -> None:
        nonlocal categories, found
        categories |= int(np.bitwise_or.reduce(regions["categories"]))
        found += int((regions["end"] - regions["start"]).sum())

    try:
        pagemap = Pagemap()
    except AccessDeniedError:
        return False  # a process that has changed its user may not look at its own
    with pagemap, Userfaultfd.create() as uffd:
        uffd.register(start, _TABLE_BYTES)
        scanner = Scanner(pagemap, _TABLE_BYTES // mmap.PAGESIZE)
        scanner.take(start, start + _TABLE_BYTES, look, returned=Category.WRITTEN | Category.HUGE)
        memory.madvise(_MADV_DONTNEED, offset, _TABLE_BYTES)
        found = 0
        scanner.take(start, start + _TABLE_BYTES, look)
    return bool(categories & Category.HUGE) and found == _TABLE_BYTES

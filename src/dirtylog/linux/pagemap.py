"""PAGEMAP_SCAN: which pages of a process were written, reported and armed again in one step.

Facts about the kernel (Linux fs/proc/task_mmu.c) that this file relies on:

* Under the lock of each page table it reads an entry's mark, notes the page, sets the mark and flushes the TLBs: each page is taken
  atomically, a range is not. A store through a stale translation comes before the call returns, so contents are read after it.
* ``walk_end`` says how far the call came: a vector that is too short loses nothing, if one goes on from there.
* When a call fails (EPERM at memory that nobody watches, EFAULT at the vector) pages were taken before, and their count is not
  returned. The vector has them: it is cleared after delivery, so what is not zero in it has not been delivered.
* Without PM_SCAN_CHECK_WPASYNC memory that nobody watches would be passed over in silence.
* Part of a huge page of hugetlbfs would be passed over without end, for the walk stays where it is.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.errors import DirtyLogError, TargetGoneError
from dirtylog.linux import abi
from dirtylog.linux.abi import Category, Scan
from dirtylog.linux.descriptor import UnsharedDescriptor

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

POPULATED = Category.PRESENT | Category.SWAPPED
"""What a page has that is not a hole. A hole that has been armed counts as swapped, for it has an entry, too."""

NONE = Category(0)

_REGIONS = 1 << 16
# How much one call walks: other threads of the process that map or unmap memory wait for it.
_CHUNK_BYTES = 4 << 30


class Pagemap(UnsharedDescriptor):
    """/proc/PID/pagemap. It belongs to the address space that the process had when it was opened, not to a later program of it."""

    def __init__(self, pid: int | None = None) -> None:
        self.pid = pid
        path = f"/proc/{pid or 'self'}/pagemap"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise TargetGoneError(f"there is no process {pid}", errno=error.errno, pid=pid) from error
        except OSError as error:
            raise self.error(
                error,
                f"cannot open {path}",
                pid=pid,
                remedy="be the same user, or root (CAP_SYS_PTRACE)" if error.errno == errno.EACCES else None,
            ) from error
        super().__init__(fd)

    def alive(self) -> bool:
        """Return whether the address space is still there: not after an exit, nor an execve."""
        return bool(os.pread(self.fileno(), 8, 0))


class Scanner:
    """Scans of one pagemap, with a vector that loses nothing. Whoever calls holds a lock."""

    def __init__(self, pagemap: Pagemap, capacity: int = _REGIONS) -> None:
        self._pagemap = pagemap
        # Pages of its own, and touched: never in memory that is watched, nor where the kernel could fail to write.
        self._memory = mmap.mmap(-1, capacity * abi.PAGE_REGION.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._vector = np.frombuffer(self._memory, abi.PAGE_REGION)
        self._vector[:] = 0
        self._ends = self._vector["end"]
        self._in_flight = False
        # Safe: the vector is as long as the argument says, and lives as long as this object.
        self._argument = abi.PmScanArg(size=96, vec=self._vector.ctypes.data, vec_len=capacity)

    def take(
        self,
        start: int,
        end: int,
        deliver: Callable[[NDArray[np.void]], None],
        *,
        anyof: Category = NONE,
        returned: Category = Category.WRITTEN,
        careful: bool = True,
    ) -> None:
        """Deliver the written pages of watched memory, as regions, and arm them.

        ``anyof`` limits that to pages of these categories; ``returned`` is what the regions tell apart. With neither, the kernel
        takes its fast path, the only one that older kernels let see pages that are not there (fixed in July 2026). ``careful``
        walks on until the kernel says that it is at the end, as it must where huge pages of hugetlbfs may be.
        :class:`AccessDeniedError` (EPERM) where part of the range is not watched, :class:`TargetGoneError` (ESRCH) when the address
        space has gone. What had been taken then is delivered by :meth:`settle`.
        """
        argument = self._argument
        argument.flags = Scan.WP_MATCHING | Scan.CHECK_WPASYNC
        argument.category_inverted, argument.category_mask = 0, Category.WRITTEN
        argument.category_anyof_mask, argument.return_mask = anyof, returned
        self._walk(start, end, deliver, careful=careful)

    def holes(self, start: int, end: int, deliver: Callable[[NDArray[np.void]], None]) -> None:
        """Deliver the regions in which no page is, and change nothing."""
        argument = self._argument
        argument.flags = 0
        argument.category_inverted = argument.category_mask = POPULATED
        argument.category_anyof_mask = argument.return_mask = 0
        self._walk(start, end, deliver)

    def populated(self, start: int, end: int, deliver: Callable[[NDArray[np.void]], None]) -> None:
        """Deliver the regions in which pages are, and change nothing."""
        argument = self._argument
        argument.flags = argument.category_inverted = argument.category_mask = argument.return_mask = 0
        argument.category_anyof_mask = POPULATED
        self._walk(start, end, deliver)

    def settle(self, deliver: Callable[[NDArray[np.void]], None]) -> None:
        """Deliver what a scan that failed or was interrupted took."""
        if self._in_flight:
            left = np.flatnonzero(self._ends)
            if len(left):
                deliver(self._vector[left])
                self._ends[left] = 0
            self._in_flight = False

    def _walk(self, start: int, end: int, deliver: Callable[[NDArray[np.void]], None], *, careful: bool = True) -> None:
        argument, ends = self._argument, self._ends
        while start < end:
            argument.start, argument.end = start, min(end, start + _CHUNK_BYTES)
            self._in_flight = True
            count = self._pagemap.ioctl(abi.PAGEMAP_SCAN, argument, "cannot scan %#x to %#x", start, end)
            if count:
                deliver(self._vector[:count])
                ends[:count] = 0
            self._in_flight = False
            walked = argument.walk_end
            if walked <= start:
                raise DirtyLogError(
                    f"a scan of {start:#x} to {end:#x} stays where it is", reason="the range cuts through a huge page of hugetlbfs"
                )
            # walk_end is where the kernel's own buffer of 512 regions was last full, although it has walked on to the end, unless
            # the vector is full: to ask again would walk that part in vain. In huge pages of hugetlbfs it can mean more.
            start = walked if careful or count == len(ends) else argument.end

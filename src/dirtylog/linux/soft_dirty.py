"""Writes found by the kernel's soft-dirty bits: for kernels before userfaultfd's asynchronous write protection.

Facts (Documentation/admin-guide/mm/soft-dirty.rst, fs/proc/task_mmu.c): writing 4 to /proc/PID/clear_refs clears the bits of the
*whole* process, and reading them in /proc/PID/pagemap (bit 55) is a step of its own. So every sync stops the process, takes the
bits of all slots, clears them, and lets it run on. On a kernel without CONFIG_MEM_SOFT_DIRTY the write succeeds, and all pages are
clean for ever: only a round trip can tell.
"""

from __future__ import annotations

import functools
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from dirtylog.errors import AccessDeniedError, DirtyLogError, TargetGoneError, UnsupportedError
from dirtylog.linux.ptrace import ATTACH_REMEDY
from dirtylog.port import Exactness, SyncPort
from dirtylog.words import words_of_pages

if TYPE_CHECKING:
    from dirtylog.linux.freezer import Freezer
    from dirtylog.memslot import MemorySlot

_ENTRY_BYTES = 8
_SOFT_DIRTY = np.uint64(1 << 55)
_CLEAR_SOFT_DIRTY = b"4"
_PIECE_PAGES = 1 << 17


class SoftDirtyPort(SyncPort):
    """The soft-dirty bits of a process, which stops for each sync. Nobody else may clear them meanwhile, as CRIU does."""

    name = "soft-dirty"
    how = "soft-dirty bits in /proc/PID/pagemap"
    exactness: ClassVar[Exactness] = Exactness.SUPERSET
    """The bits of huge pages are coarse, and those of new mappings are all set."""
    blind_spots: ClassVar[tuple[str, ...]] = (
        "writes through another mapping of the same memory, by another process, or to a mapped file by write(2)",
        "DMA into pinned pages of shared memory",
        "discards (MADV_DONTNEED, MADV_REMOVE, fallocate, truncate), and pages of shared memory that were swapped out",
        "bits that another user of soft-dirty clears",
    )

    def __init__(self, pid: int, freezer: Freezer) -> None:
        super().__init__()
        self._pid = pid
        self._freezer = freezer
        self._logged: list[MemorySlot] = []

    def start_logging(self, slot: MemorySlot) -> None:
        """Clear the bits, having taken those of the slots that are logged already."""
        self._take_all()
        self._logged.append(slot)

    def stop_logging(self, slot: MemorySlot) -> None:
        """Forget the slot."""
        if slot in self._logged:
            self._logged.remove(slot)

    def sync_dirty_log(self, slot: MemorySlot) -> None:  # noqa: ARG002 - the bits of all slots are cleared at once
        """Take the bits of every slot."""
        with self.mmu_lock:
            self._take_all()

    def refuses(self, start: int, nbytes: int) -> DirtyLogError | None:  # noqa: ARG002 - it takes all that is mapped
        """Return None: it takes any memory."""
        return None

    def close(self) -> None:
        """Forget all slots."""
        self._logged.clear()

    def flush_tlbs(self, slot: MemorySlot) -> None:
        """Do nothing: clearing flushes."""

    def _take_all(self) -> None:
        was_frozen = self._freezer.frozen
        try:
            self._freezer.freeze()
            for slot in self._logged:
                if slot.dirty_bitmap is not None:
                    for first in range(0, slot.npages, _PIECE_PAGES):
                        npages = min(_PIECE_PAGES, slot.npages - first)
                        pages = soft_dirty_pages(self._pid, slot.host_address + first * slot.page_size, npages, slot.page_size)
                        slot.dirty_bitmap.merge(words_of_pages(pages + first))
            clear_soft_dirty(self._pid)
        finally:
            if not was_frozen:
                self._freezer.thaw()


def soft_dirty_pages(pid: int, start: int, npages: int, page_size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the offsets of the soft-dirty pages among ``npages`` from address ``start`` on."""
    step = page_size // mmap.PAGESIZE
    try:
        with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
            data = os.pread(pagemap.fileno(), npages * step * _ENTRY_BYTES, start // mmap.PAGESIZE * _ENTRY_BYTES)
    except OSError as error:
        raise _error(pid, error) from error
    dirty = np.flatnonzero(np.frombuffer(data, np.uint64) & _SOFT_DIRTY)
    return np.unique(dirty // step) if step > 1 else dirty


def clear_soft_dirty(pid: int) -> None:
    """Clear the bits of a whole process."""
    try:
        fd = os.open(f"/proc/{pid}/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, _CLEAR_SOFT_DIRTY)
        finally:
            os.close(fd)
    except OSError as error:
        raise _error(pid, error) from error


@functools.cache
def missing_soft_dirty() -> DirtyLogError | None:
    """Return why this kernel has no soft-dirty bits, or None: by a write, a clear and a write of a page of this process's own."""
    with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        octets = np.frombuffer(memory, np.uint8)
        start, pid = octets.ctypes.data, os.getpid()
        seen: list[bool] = []
        try:
            for clear in (False, True, False):
                if clear:
                    clear_soft_dirty(pid)
                else:
                    memory[0] = 1
                seen.append(bool(len(soft_dirty_pages(pid, start, 1, mmap.PAGESIZE))))
        except DirtyLogError as error:
            return error
        finally:
            del octets
    if seen == [True, False, True]:
        return None
    return UnsupportedError(
        "this kernel has no soft-dirty bits",
        reason=f"a page was {', then '.join('dirty' if one else 'clean' for one in seen)} when written, cleared, and written again",
        remedy="a kernel with CONFIG_MEM_SOFT_DIRTY; or port uffd or compare",
    )


def _error(pid: int, error: OSError) -> DirtyLogError:
    if isinstance(error, (FileNotFoundError, ProcessLookupError)):
        return TargetGoneError(f"process {pid} is gone", pid=pid)
    if isinstance(error, PermissionError):
        return AccessDeniedError(
            f"the soft-dirty bits of process {pid} may not be had", errno=error.errno, pid=pid, remedy=ATTACH_REMEDY
        )
    return DirtyLogError(f"cannot take the soft-dirty bits of process {pid}", errno=error.errno, pid=pid, reason=error.strerror)

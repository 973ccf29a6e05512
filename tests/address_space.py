"""Memory of this process by hand: mapped, remapped and discarded through the C library, where Python has no call for it."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

PAGE = mmap.PAGESIZE
HUGE = 2 << 20
"""A transparent huge page, and one of hugetlbfs, on the machines where these tests have been run."""

READ, WRITE, NONE = mmap.PROT_READ, mmap.PROT_WRITE, 0
PRIVATE, SHARED, ANONYMOUS = mmap.MAP_PRIVATE, mmap.MAP_SHARED, mmap.MAP_ANONYMOUS
FIXED, NORESERVE, HUGETLB = 0x10, 0x4000, 0x40000
MAYMOVE, REMAP_FIXED, DONTUNMAP = 1, 2, 4
DONTNEED, FREE, REMOVE, NOHUGEPAGE, PAGEOUT = 4, 8, 9, 15, 21
POPULATE_READ, POPULATE_WRITE, GUARD_INSTALL, GUARD_REMOVE = 22, 23, 102, 103
KEEP_SIZE, PUNCH_HOLE = 1, 2
MFD_HUGETLB = 4

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_libc.munmap.argtypes = _libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mprotect.argtypes = _libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.msync.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
_FAILED = ctypes.c_void_p(-1).value


def checked(result: int | None) -> int:
    """Return what a call of the C library returned, or raise its OSError."""
    if result in (-1, _FAILED):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result or 0


class Area:
    """Pages at a fixed place. ``octets`` is all of it, uint8; nobody may touch what is not mapped just now."""

    def __init__(self, address: int, npages: int, page_size: int = PAGE) -> None:
        self.address = address
        self.npages = npages
        self.page_size = page_size
        # Safe: the memory is the area's until close, and tests touch only pages that are mapped.
        self.octets: NDArray[np.uint8] = np.ctypeslib.as_array((ctypes.c_uint8 * (npages * page_size)).from_address(address))
        self._mapped = np.ones(npages, np.bool_)

    @classmethod
    def map(
        cls,
        npages: int,
        flags: int = PRIVATE | ANONYMOUS,
        *,
        protection: int = READ | WRITE,
        fd: int = -1,
        page_size: int = PAGE,
        align: int = 0,
    ) -> Self:
        """Map pages, at a multiple of ``align`` if it is given (then they are private and of no file)."""
        nbytes = npages * page_size
        if not align:
            return cls(checked(_libc.mmap(None, nbytes, protection, flags, fd, 0)), npages, page_size)
        around = checked(_libc.mmap(None, nbytes + align, protection, flags, fd, 0))
        start = -(-around // align) * align
        for first, end in ((around, start), (start + nbytes, around + nbytes + align)):
            if first < end:
                checked(_libc.munmap(first, end - first))
        return cls(start, npages, page_size)

    @classmethod
    def map_at(cls, address: int, npages: int) -> Self:
        """Map private pages just there, or raise the OSError."""
        noreplace = 0x100000
        flags = PRIVATE | ANONYMOUS | noreplace
        return cls(checked(_libc.mmap(address, npages * PAGE, READ | WRITE, flags, -1, 0)), npages)

    def __getitem__(self, page: int) -> int:
        """Return the first byte of a page."""
        return int(self.octets[page * self.page_size])

    def store(self, *pages: int, value: int | None = None) -> None:
        """Store one byte to each page, a new one if no value is given."""
        for page in pages:
            self.octets[page * self.page_size] = (self[page] + 1) & 0xFF if value is None else value

    def span(self, first: int = 0, npages: int | None = None) -> tuple[int, int]:
        """Return the address and the length in bytes of some of the pages."""
        count = self.npages - first if npages is None else npages
        return self.address + first * self.page_size, count * self.page_size

    def advise(self, advice: int, first: int = 0, npages: int | None = None) -> None:
        """Call madvise."""
        checked(_libc.madvise(*self.span(first, npages), advice))

    def protect(self, protection: int, first: int = 0, npages: int | None = None) -> None:
        """Call mprotect."""
        checked(_libc.mprotect(*self.span(first, npages), protection))

    def lock(self, first: int = 0, npages: int | None = None) -> None:
        """Call mlock."""
        checked(_libc.mlock(*self.span(first, npages)))

    def sync(self) -> None:
        """Call msync, and wait."""
        checked(_libc.msync(*self.span(), 4))

    def unmap(self, first: int = 0, npages: int | None = None) -> None:
        """Unmap some of the pages."""
        address, nbytes = self.span(first, npages)
        checked(_libc.munmap(address, nbytes))
        self.set_mapped(False, first, npages)

    def map_again(
        self,
        first: int = 0,
        npages: int | None = None,
        flags: int = PRIVATE | ANONYMOUS,
        *,
        fd: int = -1,
        protection: int = READ | WRITE,
    ) -> None:
        """Map something else in the place of some of the pages."""
        address, nbytes = self.span(first, npages)
        checked(_libc.mmap(address, nbytes, protection, flags | FIXED, fd, 0))
        self.set_mapped(True, first, npages)

    def set_mapped(self, mapped: bool, first: int = 0, npages: int | None = None) -> None:
        """Say what a call behind the area's back did, so that close unmaps just what is the area's."""
        self._mapped[first : self.npages if npages is None else first + npages] = mapped

    def close(self) -> None:
        """Unmap what is still mapped: in a hole somebody else's memory may lie by now."""
        for page in np.flatnonzero(self._mapped).tolist() if not self._mapped.all() else ():
            checked(_libc.munmap(*self.span(page, 1)))
        if self._mapped.all():
            checked(_libc.munmap(*self.span()))
        self._mapped[:] = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def remap(source: tuple[int, int], new_nbytes: int, flags: int, target: int = 0) -> int:
    """Call mremap on an address and a length, and return where the memory is now."""
    return checked(_libc.mremap(*source, new_nbytes, flags, target))


def punch_hole(fd: int, offset: int, nbytes: int) -> None:
    """Discard part of a file."""
    checked(_libc.fallocate(fd, KEEP_SIZE | PUNCH_HOLE, offset, nbytes))


@contextmanager
def memory_file(nbytes: int, flags: int = 0, *, contents: bytes = b"") -> Iterator[int]:
    """Give a memfd."""
    fd = os.memfd_create("dirtylog-test", flags | os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, nbytes)
        if contents:
            os.pwrite(fd, contents, 0)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def disk_file(contents: bytes) -> Iterator[int]:
    """Give a file, which has no name any more, on whatever file system temporary files are."""
    with tempfile.TemporaryFile() as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())
        yield file.fileno()


@contextmanager
def file_to_read(contents: bytes, flags: int = 0) -> Iterator[int]:
    """Give a file that is open for reading only."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(contents)
        file.flush()
        fd = os.open(file.name, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        yield fd
    finally:
        os.close(fd)


def status_kib(field: str) -> int:
    """Return a size of this process from /proc/self/status, such as VmPTE, in KiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise LookupError(field)


def huge_pages(address: int) -> int:
    """Return how many bytes of the mapping at an address are in transparent huge pages."""
    return _smaps(address, "AnonHugePages") << 10


def _smaps(address: int, field: str) -> int:
    here = False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            start, _, end = first.partition("-")
            here = int(start, 16) <= address < int(end, 16)
        elif here and first == f"{field}:":
            return int(rest.split()[0])
    raise LookupError(field)

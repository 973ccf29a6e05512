"""What the buffer benchmarks share: memory to be tracked, and the bare loops in C that they measure against."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np

import dirtylog
from dirtylog.errors import DirtyLogError
from dirtylog.linux import abi

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

PAGE_SIZE = 4096
REGIONS = 1 << 16
"""The length of a scan's vector: dirtylog's own."""

_HERE = Path(__file__).parent
_libc = ctypes.CDLL(None, use_errno=True)


def why_no_uffd() -> str | None:
    """Return why no buffer can be tracked by a userfaultfd here, or None if it can."""
    if mmap.PAGESIZE != PAGE_SIZE:
        return f"skipped: pages of {mmap.PAGESIZE} bytes"
    try:
        dirtylog.track(dirtylog.empty(PAGE_SIZE, np.uint8), port="uffd").stop()
    except DirtyLogError as error:
        return f"skipped: {error}"
    return None


def touched_buffer(npages: int, *, huge: bool = False) -> NDArray[np.uint8]:
    """Return a buffer in which every page is there, in huge pages or in none."""
    buffer = dirtylog.empty(npages * PAGE_SIZE, np.uint8)
    # Safe: the range is the buffer's own, and the call changes no contents.
    _libc.madvise(
        ctypes.c_void_p(buffer.ctypes.data),
        ctypes.c_size_t(buffer.nbytes),
        mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE,
    )
    buffer[::PAGE_SIZE] = 1
    return buffer


def huge_bytes(buffer: NDArray[np.uint8]) -> int:
    """Return how much of a buffer lies in huge pages."""
    start, end, total, within = buffer.ctypes.data, buffer.ctypes.data + buffer.nbytes, 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if not first.endswith(":"):
            low, high = (int(address, 16) for address in first.split("-"))
            within = low < end and start < high
        elif within and first == "AnonHugePages:":
            total += int(rest.split()[0]) << 10
    return total


def some_pages(npages: int, dirty: int) -> NDArray[np.int64]:
    """Return ``dirty`` of a buffer's pages, in random order; always the same."""
    return np.random.default_rng(2**16).permutation(npages)[:dirty].astype(np.int64)


class Scanned(NamedTuple):
    """What a bare scan took: seconds of the calls, and pages."""

    seconds: float
    pages: int


class Bare:
    """The bare loops, in C where there is a compiler; a context manager. ``why_not`` says why there is none.

    Without one, stores are NumPy's, and a scan is fcntl.ioctl's, its argument made beforehand.
    """

    def __init__(self) -> None:
        self.why_not: str | None = "no C compiler"
        self._folder = tempfile.TemporaryDirectory()
        self._library: ctypes.CDLL | None = None
        self._trackers: Path | None = None
        self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._vector = np.ones(REGIONS, abi.PAGE_REGION)
        compiler = shutil.which("cc")
        if compiler is not None:
            library, trackers = Path(self._folder.name, "buffers.so"), Path(self._folder.name, "trackers")
            self.why_not = compile_c(compiler, "buffers.c", library, "-shared", "-fPIC") or compile_c(
                compiler, "trackers.c", trackers
            )
            if self.why_not is None:
                self._library, self._trackers = ctypes.CDLL(str(library)), trackers
                self._library.store.restype = self._library.scan.restype = ctypes.c_int64

    @property
    def language(self) -> str:
        """What the loops are written in."""
        return "C" if self._library is not None else "Python"

    def store(self, buffer: NDArray[np.uint8], pages: NDArray[np.int64], value: int) -> float:
        """Store to each page of a list, in this order; return the seconds that it takes."""
        if self._library is None:
            begin = time.perf_counter()
            buffer.reshape(-1, PAGE_SIZE)[pages, 0] = value & 0xFF
            return time.perf_counter() - begin
        # Safe: the pages are the buffer's, and both arrays outlive the call.
        nanoseconds = self._library.store(
            ctypes.c_void_p(buffer.ctypes.data),
            ctypes.c_void_p(pages.ctypes.data),
            ctypes.c_int64(len(pages)),
            ctypes.c_uint8(value & 0xFF),
        )
        return float(nanoseconds) / 1e9

    def scan(self, buffer: NDArray[np.uint8]) -> Scanned:
        """Take and arm what was written, with nothing around the ioctl."""
        start, end = buffer.ctypes.data, buffer.ctypes.data + buffer.nbytes
        if self._library is None:
            return self._scan(start, end)
        found = ctypes.c_int64()
        # Safe: the vector is as long as the call is told, and outlives it.
        nanoseconds = self._library.scan(
            ctypes.c_int(self._pagemap),
            ctypes.c_uint64(start),
            ctypes.c_uint64(end),
            ctypes.c_void_p(self._vector.ctypes.data),
            ctypes.c_uint64(REGIONS),
            ctypes.byref(found),
        )
        if nanoseconds < 0:
            raise OSError(-nanoseconds, os.strerror(-nanoseconds))
        return Scanned(nanoseconds / 1e9, found.value)

    def tracker(self, name: str, npages: int, pages: NDArray[np.int64]) -> Tracker:
        """Return a C program that tracks memory of its own; there must be a compiler."""
        assert self._trackers is not None
        return Tracker([str(self._trackers), name, str(npages), str(len(pages))], pages)

    def _scan(self, start: int, end: int) -> Scanned:
        argument = abi.PmScanArg(
            size=96,
            flags=abi.Scan.WP_MATCHING | abi.Scan.CHECK_WPASYNC,
            end=end,
            vec=self._vector.ctypes.data,
            vec_len=REGIONS,
            category_mask=abi.Category.WRITTEN,
            return_mask=abi.Category.WRITTEN,
        )
        seconds, pages = 0.0, 0
        while start < end:
            argument.start = start
            begin = time.perf_counter()
            # Safe: as above.
            count = fcntl.ioctl(self._pagemap, abi.PAGEMAP_SCAN, argument)
            seconds += time.perf_counter() - begin
            regions = self._vector[:count]
            pages += int((regions["end"] - regions["start"]).sum()) // PAGE_SIZE
            start = argument.walk_end
        return Scanned(seconds, pages)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._pagemap)
        self._folder.cleanup()


class Round(NamedTuple):
    """What a C tracker's round took, in seconds, and the pages that it found."""

    first_stores: float
    later_stores: float
    find: float
    found: int


class Tracker:
    """A running trackers.c; a context manager."""

    def __init__(self, command: list[str], pages: NDArray[np.int64]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # noqa: S603 - our own program
        self._send(pages.tobytes())

    def round(self) -> Round:
        """Let it store, find and arm once."""
        self._send(b".")
        assert self._process.stdout is not None
        first, later, find, found = map(int, self._process.stdout.readline().split())
        return Round(first / 1e9, later / 1e9, find / 1e9, found)

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._process:
            if self._process.stdin is not None:
                self._process.stdin.close()


def compile_c(compiler: str, source: str, output: Path, *flags: str) -> str | None:
    """Compile one of the sources beside this file; return what is wrong with it."""
    command: list[Any] = [compiler, "-O2", *flags, "-o", output, _HERE / source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own program
    return f"{compiler}: {done.stderr.strip().splitlines()[0]}" if done.returncode else None

"""scribblers.c in buffers of this process, and logs that follow them: free running, and compared at stops."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dirtylog
from address_space import ANONYMOUS, HUGE, HUGETLB, NORESERVE, PAGE, PRIVATE, SHARED, Area
from built import built

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from dirtylog import DirtyLog

THREADS = 5
MADV_HUGEPAGE = 14
_SPARSE_BYTES = 64 << 30
_SPARSE_WINDOWS = 1024
_PIECE = 4096
_PRESENT = np.uint64(1 << 63)


class _Area(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_long) for name in ("address", "page_size", "window", "stride", "count", "discards"))


class Scribbled:
    """One buffer: where it is stored to, and the logs of it, each with a copy of what it has reported."""

    def __init__(self, name: str, area: Area, window: int, stride: int, *, discards: bool) -> None:
        self.name = name
        self.area = area
        self.stored = _Area(area.address, area.page_size, window, stride, (area.npages - window) // stride + 1, discards)
        self.copies: list[Copy] = []


class Copy:
    """A log of a buffer, and what somebody has who copies only what it reports."""

    def __init__(self, name: str, octets: NDArray[np.uint8], log: DirtyLog, runs: list[tuple[int, int]]) -> None:
        self.name = name
        self._log = log
        self._runs = runs
        slot = log.memory.slots[0]
        self._page_size = slot.page_size
        self._start = slot.host_address
        # Reserved only, as the buffer may be: what was never copied takes no memory.
        memory = mmap.mmap(-1, slot.nbytes, flags=PRIVATE | ANONYMOUS | NORESERVE)
        self._copy: NDArray[np.uint8] = np.ndarray((slot.npages, slot.page_size), np.uint8, memory)
        self._pages: NDArray[np.uint8] = octets.reshape(-1, slot.page_size)
        there = self._there()
        self._copy[there] = self._pages[there]
        self.reports = 0
        self.compared = 0

    def follow(self) -> None:
        """Take what is reported."""
        pages = self._log.get(0).pages()
        self._copy[pages] = self._log.memory.read(0, pages)
        self.reports += len(pages)

    def lost(self) -> list[int]:
        """Return the pages that are not what the copy has. Nobody may be storing."""
        there = self._there()
        self.compared += len(there)
        wrong = [
            part[(self._copy[part] != self._pages[part]).any(axis=1)]
            for part in (there[first : first + _PIECE] for first in range(0, len(there), _PIECE))
        ]
        if self._log.memory.slots[0].anonymous:
            # What is not there reads as zeros; to read it would make it be there.
            gone = np.setdiff1d(self._there(self._copy.ctypes.data), there)
            wrong.append(gone[self._copy[gone].any(axis=1)])
        return [page for part in wrong for page in part.tolist()]

    def _there(self, start: int = 0) -> NDArray[np.int64]:
        """Return the pages of the runs that are there: of a buffer with a file behind it, all."""
        if not self._log.memory.slots[0].anonymous:
            return np.concatenate([np.arange(first, first + npages) for first, npages in self._runs])
        each, base = self._page_size // PAGE, (start or self._start) // PAGE
        found = []
        with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
            for first, npages in self._runs:
                entries = np.frombuffer(os.pread(file.fileno(), npages * each * 8, (base + first * each) * 8), np.uint64)
                found.append(first + np.flatnonzero(((entries & _PRESENT) != 0).reshape(-1, each).any(axis=1)))
        return np.concatenate(found)


def _plain(stack: ExitStack) -> Scribbled:
    return Scribbled("plain", stack.enter_context(Area.map(8192)), 32, 32, discards=True)


def _transparent_huge(stack: ExitStack) -> Scribbled:
    area = stack.enter_context(Area.map(8 * HUGE // PAGE, align=HUGE))
    area.advise(MADV_HUGEPAGE)
    return Scribbled("thp", area, 48, 40, discards=True)


def _huge(stack: ExitStack) -> Scribbled:
    try:
        area = stack.enter_context(Area.map(3, PRIVATE | ANONYMOUS | HUGETLB, page_size=HUGE))
    except OSError as error:
        pytest.skip(f"no huge pages are free: {error.strerror}")
    return Scribbled("hugetlb", area, 1, 1, discards=False)


def _sparse(stack: ExitStack) -> Scribbled:
    area = stack.enter_context(Area.map(_SPARSE_BYTES // PAGE, PRIVATE | ANONYMOUS | NORESERVE))
    area.advise(15)  # no huge pages: a store is to bring one page
    return Scribbled("sparse", area, 16, (area.npages - 16) // _SPARSE_WINDOWS, discards=True)


def _shared(stack: ExitStack) -> Scribbled:
    return Scribbled("shared", stack.enter_context(Area.map(4096, SHARED | ANONYMOUS)), 32, 32, discards=False)


KINDS: dict[str, Callable[[ExitStack], Scribbled]] = {
    "plain": _plain,
    "thp": _transparent_huge,
    "hugetlb": _huge,
    "sparse": _sparse,
    "shared": _shared,
}


class Scribbling:
    """Threads that store to buffers of some kinds, which are logged and compared until it has been enough."""

    def __init__(self, kinds: list[str], seed: int) -> None:
        self._kinds = kinds
        self._seed = seed
        self.copies: list[Copy] = []
        self.stops = 0
        self.rounds = 0
        self.discards = 0

    def run(self, seconds: float, reports: int = 0, *, between_stops: float = 0.5) -> None:
        """Log for so long, and until so many pages have been reported. Nothing may be lost."""
        library = _library()
        with ExitStack() as stack:
            found = [KINDS[kind](stack) for kind in self._kinds]
            source = os.memfd_create("source")
            stack.callback(os.close, source)
            os.write(source, np.random.default_rng(self._seed).bytes(1 << 20))
            self.copies = [copy for one in found for copy in _logs_of(one, stack)]
            areas = (_Area * len(found))(*(one.stored for one in found))
            crew = library.scribble_start(areas, len(found), THREADS, source, 300, self._seed)
            try:
                began = stopped = time.monotonic()
                while time.monotonic() - began < seconds or self.reports < reports:
                    self._follow()
                    if time.monotonic() - stopped > between_stops:
                        library.scribble_hold(crew)
                        self._compare()
                        library.scribble_go(crew)
                        stopped = time.monotonic()
                library.scribble_hold(crew)
                self._compare()
            finally:
                self.discards = library.scribble_stop(crew)

    @property
    def reports(self) -> int:
        return sum(copy.reports for copy in self.copies)

    def _follow(self) -> None:
        self.rounds += 1
        for copy in self.copies:
            copy.follow()

    def _compare(self) -> None:
        self.stops += 1
        self._follow()
        for copy in self.copies:
            lost = copy.lost()
            assert not lost, f"{len(lost)} pages of {copy.name} lost, seed {self._seed}: {lost[:20]}"

    def __str__(self) -> str:
        kinds = ", ".join(f"{copy.name} {copy.reports}" for copy in self.copies)
        return (
            f"{self.reports} pages reported in {self.rounds} rounds ({kinds}); {self.stops} stops, "
            f"{sum(copy.compared for copy in self.copies)} pages compared, 0 lost; {self.discards} discards"
        )


def _logs_of(one: Scribbled, stack: ExitStack) -> list[Copy]:
    """Log all of a buffer, and a part of it once more: what one log takes it must give to the other."""
    octets, stored = one.area.octets, one.stored
    sparse = one.name == "sparse"
    # Of a sparse buffer it would take long to look at all that is not there.
    windows = [(number * stored.stride, stored.window) for number in range(stored.count)] if sparse else [(0, one.area.npages)]
    copies = [Copy(one.name, octets, stack.enter_context(dirtylog.track(octets, port="uffd")), windows)]
    if one.name in ("plain", "thp", "sparse"):
        # The part begins and ends within what is stored to, and in the middle of huge pages.
        first, npages = (0, stored.stride * 100 + 8) if sparse else (100, 1900)
        part = octets[first * PAGE : (first + npages) * PAGE]
        inside = [*windows[:100], (npages - 8, 8)] if sparse else [(0, npages)]
        copies.append(Copy(f"{one.name}-part", part, stack.enter_context(dirtylog.track(part, port="uffd")), inside))
    return copies


def _library() -> Any:
    library = ctypes.CDLL(str(built("scribblers.c", "-shared", "-fPIC")))
    library.scribble_start.restype = ctypes.c_void_p
    library.scribble_start.argtypes = (ctypes.c_void_p, ctypes.c_long, ctypes.c_long, ctypes.c_int, ctypes.c_long, ctypes.c_uint64)
    for name in ("scribble_hold", "scribble_go", "scribble_stop"):
        getattr(library, name).argtypes = (ctypes.c_void_p,)
    library.scribble_stop.restype = ctypes.c_long
    return library

"""What the benchmarks of checkpoints share: a disk that is one, an array that is full, and the bare cost of a save."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from buffer_scene import PAGE_SIZE, touched_buffer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from numpy.typing import NDArray

_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}
_WORDS = PAGE_SIZE // 8
_BATCH_PAGES = (1 << 20) // PAGE_SIZE


@contextlib.contextmanager
def on_disk() -> Iterator[Path]:
    """Yield an empty folder on a disk: where temporary files are, or beside this file if that is memory."""
    here = Path(__file__).parent
    places = [place for place in (tempfile.gettempdir(), str(here)) if _file_system(place) not in _IN_MEMORY]
    with tempfile.TemporaryDirectory(prefix="dirtylog-bench-", dir=(places or [str(here)])[0]) as folder:
        yield Path(folder)
    os.sync()


def _file_system(place: str) -> str:
    """Return the type of the file system that a folder lies on."""
    device = os.stat(place).st_dev  # noqa: PTH116 - a number, not a file
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == wanted:
            return rest.split()[0]
    return "unknown"


def pages_that_fit(folder: Path, most: int, *, copies_in_memory: int, copies_on_disk: int) -> int:
    """Return ``most`` pages, halved until so many copies of them fit."""
    available = {line.split(":")[0]: int(line.split()[1]) << 10 for line in Path("/proc/meminfo").read_text().splitlines()}
    disk = os.statvfs(folder)
    room = min(available["MemAvailable"] // copies_in_memory, disk.f_bavail * disk.f_frsize // copies_on_disk)
    while most * PAGE_SIZE > room:
        most //= 2
    return most


def full_array(npages: int) -> NDArray[np.uint64]:
    """Return uint64[npages, words of a page] of which every page is there, and none is zero, nor as another."""
    array = touched_buffer(npages).view(np.uint64).reshape(npages, _WORDS)
    array[:] = np.random.default_rng(7).integers(1, 1 << 62, _WORDS)
    array[:, 0] = np.arange(1, npages + 1)
    return array


class Rewritten:
    """An array of which other pages are written each round."""

    def __init__(self, array: NDArray[np.uint64]) -> None:
        self.array = array
        self._random = np.random.default_rng(2**16)

    def write(self, dirty: int) -> NDArray[np.int64]:
        """Write to so many pages at random, and return them, ascending."""
        pages = np.sort(self._random.permutation(len(self.array))[:dirty])
        self.array[pages, 1] += np.uint64(1)
        return pages


class BareCost(NamedTuple):
    """Seconds of a bare save."""

    whole: float
    sync: float


class BareSaver:
    """Copies known pages into a buffer and writes that, a megabyte at a time, and syncs once; a context manager."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._buffer = np.empty((_BATCH_PAGES, PAGE_SIZE), np.uint8)

    def save(self, array: NDArray[np.uint64], pages: NDArray[np.int64]) -> BareCost:
        """Save pages of an array into the file, which is empty before and after."""
        octets = array.view(np.uint8)
        begin = time.perf_counter()
        for at in range(0, len(pages), _BATCH_PAGES):
            some = pages[at : at + _BATCH_PAGES]
            batch = np.take(octets, some, axis=0, out=self._buffer[: len(some)], mode="clip")
            written = os.pwrite(self._descriptor, batch.reshape(-1).data, at * PAGE_SIZE)
            assert written == batch.nbytes
        synced = time.perf_counter()
        os.fdatasync(self._descriptor)
        end = time.perf_counter()
        os.ftruncate(self._descriptor, 0)
        return BareCost(end - begin, end - synced)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._descriptor)

"""What people use to save an array again and again, beside checkpoints of what was written."""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

import dirtylog
from buffer_scene import PAGE_SIZE, why_no_uffd
from checkpoint_scene import Rewritten, full_array, on_disk, pages_that_fit
from dirtylog.size import format_size
from report import Section, Spread, Target, alternate

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_PAGES = 1 << 18
_QUICK_PAGES = 1 << 15
_SHARE = 0.01
_CHUNK_PAGES = (1 << 20) // PAGE_SIZE
_STEP_PAGES = 16 * _CHUNK_PAGES
_LOG = "dirtylog"
_FULL_TIMES = 30
_SEARCH_TIMES = 6


class _Result(NamedTuple):
    """Seconds of a save, and how many of them the program stands still."""

    whole: float
    stall: float


class _Way(Protocol):
    """One way to save the array so that it is on the disk."""

    searches: bool
    """Whether it finds out what was written by looking at everything, and saves just that; the others save everything."""

    def save(self) -> _Result: ...


def checkpoint_rivals(*, quick: bool) -> Section:
    """Measure saves of an array of which 1 % was written, each way."""
    rounds = 3 if quick else 5
    with on_disk() as folder, contextlib.ExitStack() as stack:
        npages = pages_that_fit(folder, _QUICK_PAGES if quick else _PAGES, copies_in_memory=4, copies_on_disk=16)
        section = Section(
            f"Ways to save {format_size(npages * PAGE_SIZE)} of which 1 % was written",
            f"{int(npages * _SHARE)} pages at random are written, then each way saves the array, in turn, on the same disk, until "
            f"all is there: fsync or its like. {rounds} rounds, elapsed time, everything else synced before. Stall: how long the "
            "program must stand still. numpy.save, torch.save: all of it into a new file. zarr: all of it, uncompressed, in chunks "
            "of 1 MiB, as dirtylog's batches are. fork: a child writes all of it. xxh3: a hash of each page, or chunk of 64 KiB, "
            "against the one before, as tools for backups do; what differs is written. shadow copy: NumPy's comparison of all "
            "pages with a copy; what differs is written, and renewed in the copy. Ratios of the medians to dirtylog's.",
        )
        reason = why_no_uffd()
        if reason is not None:
            section.rows.append({"way": reason})
            return section
        array = full_array(npages)
        ways, missing = _ways(stack, folder, array)
        results = _measure(ways, Rewritten(array), int(npages * _SHARE), rounds)
    ours = Spread.of(one.whole for one in results[_LOG]).median
    times: dict[bool, dict[str, float]] = {False: {}, True: {}}
    for name, found in results.items():
        whole = Spread.of(one.whole * 1e3 for one in found)
        stall = Spread.of(one.stall * 1e3 for one in found)
        ratio = whole.median / (ours * 1e3)
        section.rows.append({"way": name, "save, ms": whole, "stall, ms": stall, "to dirtylog's": f"{ratio:.1f}"})
        if name != _LOG:
            times[ways[name].searches][name] = 100 / ratio
    section.rows += [{"way": name, "save, ms": why, "stall, ms": "", "to dirtylog's": ""} for name, why in missing.items()]
    section.targets += [
        Target(f"a save in at most a {_FULL_TIMES}th of the time of a full one", 100 / _FULL_TIMES, "% of it", times[False]),
        Target(f"a save in at most a {_SEARCH_TIMES}th of the time of a search", 100 / _SEARCH_TIMES, "% of it", times[True]),
    ]
    return section


def _measure(ways: dict[str, _Way], rewritten: Rewritten, dirty: int, rounds: int) -> dict[str, list[_Result]]:
    """Return what each way took. One round comes first: it touches memory."""
    results: dict[str, list[_Result]] = {name: [] for name in ways}
    last = -1
    for number, name in alternate(tuple(ways), rounds + 1):
        if number != last:
            rewritten.write(dirty)
            last = number
        os.sync()
        result = ways[name].save()
        if number:
            results[name].append(result)
    return results


def _ways(stack: contextlib.ExitStack, folder: Path, array: NDArray[np.uint64]) -> tuple[dict[str, _Way], dict[str, str]]:
    checkpointer = stack.enter_context(dirtylog.Checkpointer({"array": array}, folder / "store"))
    checkpointer.save()
    ways: dict[str, _Way] = {
        _LOG: _Checkpoints(checkpointer),
        "numpy.save": _NumpySave(folder / "array.npy", array),
        "fork and dump": _Fork(folder / "forked", array),
        "shadow copy": _Shadow(folder / "compared", array),
    }
    missing: dict[str, str] = {}
    for name, module, make in (
        ("xxh3 of each page", "xxhash", lambda: _Hashes(folder / "pages", array, 1)),
        ("xxh3 of 64 KiB", "xxhash", lambda: _Hashes(folder / "chunks", array, (64 << 10) // PAGE_SIZE)),
        ("zarr", "zarr", lambda: _Zarr(folder / "array.zarr", array)),
        ("torch.save", "torch", lambda: _TorchSave(folder / "array.pt", array)),
    ):
        try:
            importlib.import_module(module)
        except ImportError:
            missing[name] = f"skipped: {module} is not installed"
        else:
            ways[name] = make()
    return ways, missing


class _Checkpoints:
    searches = False

    def __init__(self, checkpointer: dirtylog.Checkpointer) -> None:
        self._checkpointer = checkpointer

    def save(self) -> _Result:
        begin = time.perf_counter()
        self._checkpointer.save()
        return _all_of(begin)


class _NumpySave:
    searches = False

    def __init__(self, path: Path, array: NDArray[np.uint64]) -> None:
        self._path, self._array = path, array

    def save(self) -> _Result:
        begin = time.perf_counter()
        with self._path.open("wb") as file:
            np.save(file, self._array)
            os.fsync(file.fileno())
        result = _all_of(begin)
        self._path.unlink()
        return result


class _TorchSave:
    searches = False

    def __init__(self, path: Path, array: NDArray[np.uint64]) -> None:
        self._path, self._torch = path, importlib.import_module("torch")
        self._tensor = self._torch.from_numpy(array.view(np.int64))

    def save(self) -> _Result:
        begin = time.perf_counter()
        with self._path.open("wb") as file:
            self._torch.save(self._tensor, file)
            file.flush()
            os.fsync(file.fileno())
        result = _all_of(begin)
        self._path.unlink()
        return result


class _Zarr:
    searches = False

    def __init__(self, path: Path, array: NDArray[np.uint64]) -> None:
        zarr: Any = importlib.import_module("zarr")
        self._array = array
        self._saved = zarr.create_array(
            store=str(path), shape=array.shape, dtype=array.dtype, chunks=(_CHUNK_PAGES, array.shape[1]), compressors=None
        )

    def save(self) -> _Result:
        begin = time.perf_counter()
        self._saved[:] = self._array
        os.sync()  # it has a file a chunk
        return _all_of(begin)


class _Fork:
    searches = False

    def __init__(self, path: Path, array: NDArray[np.uint64]) -> None:
        self._path, self._array = path, array

    def save(self) -> _Result:
        begin = time.perf_counter()
        child = os.fork()
        if not child:
            self._dump()
        stall = time.perf_counter() - begin
        _, status = os.waitpid(child, 0)
        whole = time.perf_counter() - begin
        assert status == 0
        self._path.unlink()
        return _Result(whole, stall)

    def _dump(self) -> None:
        status = 1
        try:
            with self._path.open("wb", buffering=0) as file:
                for at in range(0, len(self._array), _STEP_PAGES):
                    _write_all(file.fileno(), self._array[at : at + _STEP_PAGES])
                os.fsync(file.fileno())
            status = 0
        finally:
            os._exit(status)


class _Searching:
    """Writes to the end of a file what it finds to have changed."""

    searches = True

    def __init__(self, path: Path, array: NDArray[np.uint64]) -> None:
        self._array = array
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _write(self, rows: NDArray[np.uint64], changed: NDArray[np.int64], step: int) -> None:
        for at in range(0, len(changed), step):
            _write_all(self._descriptor, rows[changed[at : at + step]])


class _Hashes(_Searching):
    def __init__(self, path: Path, array: NDArray[np.uint64], pages: int) -> None:
        super().__init__(path, array)
        self._rows = array.reshape(len(array) // pages, -1)
        self._digest = importlib.import_module("xxhash").xxh3_64_intdigest
        self._hashes = self._all()

    def _all(self) -> NDArray[np.uint64]:
        digest, size, octets = self._digest, self._rows.shape[1] * 8, self._rows.reshape(-1).view(np.uint8).data
        return np.array([digest(octets[at : at + size]) for at in range(0, len(octets), size)], np.uint64)

    def save(self) -> _Result:
        begin = time.perf_counter()
        hashes = self._all()
        self._write(self._rows, np.flatnonzero(hashes != self._hashes), max(1, (1 << 20) // (self._rows.shape[1] * 8)))
        self._hashes = hashes
        os.fsync(self._descriptor)
        return _all_of(begin)


class _Shadow(_Searching):
    def __init__(self, path: Path, array: NDArray[np.uint64]) -> None:
        super().__init__(path, array)
        self._copy = array.copy()

    def save(self) -> _Result:
        begin = time.perf_counter()
        for at in range(0, len(self._array), _STEP_PAGES):
            now, before = self._array[at : at + _STEP_PAGES], self._copy[at : at + _STEP_PAGES]
            changed = np.flatnonzero((now != before).any(axis=1))
            before[changed] = now[changed]
            self._write(now, changed, _CHUNK_PAGES)
        os.fsync(self._descriptor)
        return _all_of(begin)


def _all_of(begin: float) -> _Result:
    whole = time.perf_counter() - begin
    return _Result(whole, whole)


def _write_all(descriptor: int, rows: NDArray[np.uint64]) -> None:
    octets = rows.reshape(-1).view(np.uint8).data
    while octets:
        octets = octets[os.write(descriptor, octets) :]

"""What people use to find the written pages of a buffer when they have no dirty log, beside one."""

from __future__ import annotations

import contextlib
import importlib
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

import dirtylog
from buffer_scene import PAGE_SIZE, Bare, some_pages, touched_buffer, why_no_uffd
from dirtylog.guests.host import host_memory
from dirtylog.size import format_size
from report import Section, Spread, Target, alternate

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from buffer_scene import Tracker
    from dirtylog.dirty_log import DirtyLog

_PAGES = 1 << 18
_QUICK_PAGES = 1 << 16
_NEEDED = 12 << 30
"""The buffers, copies, scratch and C programs of a GiB each, and room."""
_TIMES = 50
_LOG = "dirtylog"


class _Result(NamedTuple):
    """What one round took, in seconds."""

    stores: float
    harvest: float


class _Way(Protocol):
    """One way to find out: it stores to the pages, then finds them and gets ready for the next round, and checks their number."""

    def __call__(self) -> _Result: ...


def buffer_alternatives(*, quick: bool) -> Section:
    """Measure rounds of stores and of finding them again, each way."""
    npages = _QUICK_PAGES if quick or (host_memory() or 0) < _NEEDED else _PAGES
    rounds, dirty = 3 if quick else 9, npages // 100
    section = Section(
        f"12. Ways to find 1 % of {format_size(npages * PAGE_SIZE)}",
        f"A loop stores to {dirty} pages at random; then they are found, and made ready to be found again: the harvest. dirtylog: "
        "a get. compare: NumPy's comparison with a copy, of which the pages that differ are renewed: all pages at once, one by "
        "one, or as dirtylog's port compare does it. xxhash: a hash of each page against the one before. mprotect: a C program "
        "whose handler of SIGSEGV notes a page and makes it writable; the harvest protects all again. fork: a C program whose "
        "child holds the memory as it was, so that written pages are copied; the harvest reads which those are from "
        "/proc/self/pagemap, and makes a new child. In turn, the counts checked, elapsed time, "
        f"{rounds} rounds. A round is the stores and the harvest; ratios of the medians to dirtylog's.",
    )
    reason = why_no_uffd()
    if reason is not None:
        section.rows.append({"way": reason})
        return section
    results: dict[str, list[_Result]] = {}
    with contextlib.ExitStack() as stack:
        ways = _ways(stack, npages, some_pages(npages, dirty))
        # One round first: it touches memory.
        for number, name in alternate(tuple(ways), rounds + 1):
            result = ways[name]()
            if number:
                results.setdefault(name, []).append(result)
    section.rows += _rows({name: results[name] for name in ways}, dirty)
    harvests = {name: Spread.of(one.harvest for one in found).median for name, found in results.items()}
    section.targets.append(
        Target(
            f"a get in at most a {_TIMES}th of the time of a comparison with NumPy",
            100 / _TIMES,
            "% of it",
            {name: 100 * harvests[_LOG] / harvests[name] for name in harvests if name.startswith("compare")},
        )
    )
    return section


def _rows(results: dict[str, list[_Result]], dirty: int) -> list[dict[str, Any]]:
    rows = []
    base: tuple[float, float] | None = None
    for name, found in results.items():
        harvest = Spread.of(one.harvest * 1e3 for one in found)
        whole = Spread.of((one.stores + one.harvest) * 1e3 for one in found)
        base = base or (harvest.median, whole.median)
        rows.append(
            {
                "way": name,
                "harvest, ms": harvest,
                "first store, us": Spread.of(one.stores / dirty * 1e6 for one in found),
                "round, ms": whole,
                "harvest to dirtylog's": f"{harvest.median / base[0]:.1f}",
                "round to dirtylog's": f"{whole.median / base[1]:.1f}",
            }
        )
    return rows


def _ways(stack: contextlib.ExitStack, npages: int, pages: NDArray[np.int64]) -> dict[str, _Way]:
    bare = stack.enter_context(Bare())
    tracked, plain = touched_buffer(npages), touched_buffer(npages)
    log = stack.enter_context(dirtylog.track(tracked, port="uffd"))
    ways: dict[str, _Way] = {_LOG: _Found(bare, tracked, pages, _getting(log))}
    copied = stack.enter_context(dirtylog.track(plain, port="compare"))
    ways["compare, all at once"] = _Found(bare, plain, pages, _Copy(plain).at_once)
    ways["compare, page by page"] = _Found(bare, plain, pages, _Copy(plain).one_by_one)
    ways["compare, dirtylog's port"] = _Found(bare, plain, pages, _getting(copied))
    with contextlib.suppress(ImportError):
        ways["xxhash"] = _Found(bare, plain, pages, _Hashes(plain).compare)
    if bare.why_not is None:
        for name in ("mprotect", "fork"):
            ways[f"{name}, C"] = _Tracked(stack.enter_context(bare.tracker(name, npages, pages)), len(pages))
    return ways


class _Found:
    """Stores to a buffer of this process, and a function that returns the pages it finds."""

    def __init__(
        self, bare: Bare, buffer: NDArray[np.uint8], pages: NDArray[np.int64], find: Callable[[], NDArray[np.int64]]
    ) -> None:
        self._bare = bare
        self._buffer = buffer
        self._pages = pages
        self._find = find

    def __call__(self) -> _Result:
        # Each way finds what it has stored itself: others have stored to the same pages, and counted on other values.
        value = int(self._buffer[self._pages[0] * PAGE_SIZE]) + 1
        self._find()
        stores = self._bare.store(self._buffer, self._pages, value)
        begin = time.perf_counter()
        found = self._find()
        harvest = time.perf_counter() - begin
        assert len(found) == len(self._pages)
        return _Result(stores, harvest)


class _Tracked:
    """Stores to the memory of a C program."""

    def __init__(self, program: Tracker, dirty: int) -> None:
        self._program = program
        self._dirty = dirty

    def __call__(self) -> _Result:
        done = self._program.round()
        assert done.found == self._dirty
        return _Result(done.first_stores, done.find)


def _getting(log: DirtyLog) -> Callable[[], NDArray[np.int64]]:
    return lambda: log.get(0).pages()


class _Copy:
    """A buffer's contents as they were."""

    def __init__(self, buffer: NDArray[np.uint8]) -> None:
        self._pages = buffer.reshape(-1, PAGE_SIZE)
        self._shadow = self._pages.copy()

    def at_once(self) -> NDArray[np.int64]:
        """Compare everything, and look for the pages with a difference."""
        return self._renew(np.flatnonzero((self._pages != self._shadow).any(axis=1)))

    def one_by_one(self) -> NDArray[np.int64]:
        """Compare each page by itself, which needs no scratch memory."""
        pairs = enumerate(zip(self._pages, self._shadow, strict=True))
        return self._renew(np.array([page for page, (now, before) in pairs if not np.array_equal(now, before)], np.int64))

    def _renew(self, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        self._shadow[pages] = self._pages[pages]
        return pages


class _Hashes:
    """A hash of each of a buffer's pages, as it was. ImportError where there is no xxhash."""

    def __init__(self, buffer: NDArray[np.uint8]) -> None:
        self._hash: Callable[[object], int] = importlib.import_module("xxhash").xxh3_64_intdigest
        self._pages = [buffer[start : start + PAGE_SIZE].data for start in range(0, len(buffer), PAGE_SIZE)]
        self._before = self._all()

    def compare(self) -> NDArray[np.int64]:
        """Hash every page again."""
        now = self._all()
        changed = np.flatnonzero(now != self._before)
        self._before = now
        return changed

    def _all(self) -> NDArray[np.uint64]:
        return np.fromiter(map(self._hash, self._pages), np.uint64, len(self._pages))

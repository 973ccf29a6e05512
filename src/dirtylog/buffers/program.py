"""A buffer of this process that a thread of it writes, so that what logs buffers can be tried without a program of one's own."""

from __future__ import annotations

import mmap
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.buffers.memory import BufferMemory
from dirtylog.buffers.track import empty
from dirtylog.errors import DirtyLogError, InvalidArgumentError
from dirtylog.guests.host import host_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Order = Callable[[NDArray[np.int64]], NDArray[np.int64]]

STORES_PER_SECOND = 50_000
"""Of the writer: 205 MB/s of pages of 4 KiB, where it stores to each of them once."""
PERIOD = 2.0
"""Seconds of each phase of program "phases"."""
_BATCH = 512
_REST = 0.002
_HOT = 32
_SEED = 1


def _sweep(npages: int, period: int) -> Order:  # noqa: ARG001 - one signature for all
    """Write page after page, over and over."""
    return lambda numbers: numbers % npages


def _random(npages: int, period: int) -> Order:  # noqa: ARG001 - as above
    """Write the pages in a pseudo-random order, every one before any is written again."""
    order = np.random.default_rng(_SEED).permutation(npages)
    return lambda numbers: order[numbers % npages]


def _hotset(npages: int, period: int) -> Order:  # noqa: ARG001 - as above
    """Write the pages of a 32nd in the middle over and over."""
    hot = max(1, npages // _HOT)
    return lambda numbers: (npages - hot) // 2 + numbers % hot


def _phases(npages: int, period: int) -> Order:
    """Write the hot set for a period, then sweep for one, on from where the last sweep ended."""
    hot, sweep = _hotset(npages, period), _sweep(npages, period)

    def order(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        phase, within = np.divmod(numbers, period)
        return np.where(phase % 2, sweep(phase // 2 * period + within), hot(numbers))

    return order


PROGRAMS: dict[str, Callable[[int, int], Order] | None] = {
    "sweep": _sweep,
    "random": _random,
    "hotset": _hotset,
    "idle": None,
    "phases": _phases,
}
"""By name: a function of (number of pages, stores in a period) that gives the page of each store by its number; None: no stores."""


@dataclass(frozen=True, slots=True)
class WriterStats:
    """Counters. ``writes`` are the stores that the writer has made, by its own count: each to one page."""

    writes: int


class WrittenBuffer(BufferMemory):
    """A zeroed buffer of ``nbytes``, whole pages, and a thread that writes it; a :class:`~dirtylog.memory.Memory`.

    It starts paused. A store writes its own number, counted from 1, to the first 8 bytes of its page: no page ever has the
    contents again that it had. ``page_of`` gives the page of each store by its number from 0. The writer keeps time: at each batch
    it makes as many stores as ``stores_per_second`` asks for by then, in running time, unless that is more than it can.
    ``period`` is that of program "phases", in seconds.

    Raises :class:`InvalidArgumentError`; :class:`UnsupportedError` or :class:`AccessDeniedError` where ``port`` cannot be had.
    """

    def __init__(
        self,
        nbytes: int,
        program: str = "sweep",
        *,
        port: str = "auto",
        stores_per_second: float = STORES_PER_SECOND,
        period: float = PERIOD,
    ) -> None:
        if program not in PROGRAMS:
            raise InvalidArgumentError(f"unknown program {program!r}; the programs of a buffer are: {', '.join(PROGRAMS)}")
        if not (stores_per_second > 0 and period > 0):
            raise InvalidArgumentError(f"{stores_per_second} stores per second, a period of {period} seconds: both are above 0")
        npages = _whole_pages(nbytes)
        words = _zeroed(npages)
        super().__init__(words, port=port)
        make = PROGRAMS[program]
        self.page_of = None if make is None else make(npages, max(1, round(stores_per_second * period)))
        self._first_words = words[:, 0]
        self._rate = stores_per_second
        self._writes = 0
        # Who holds it keeps the writer from storing. It takes no other lock meanwhile, nor does a log take this one.
        self._turn = threading.Condition()
        self._running = self._ended = False
        self._since, self._writes_then = 0.0, 0
        self._writer: threading.Thread | None = None

    @property
    def stats(self) -> WriterStats:
        """What was counted so far. What has been counted has been stored."""
        return WriterStats(self._writes)

    @property
    def paused(self) -> bool:
        """Whether the writer stands still."""
        return not self._running

    def pause(self) -> None:
        """Return when the writer stands still."""
        with self._turn:
            self._running = False

    def resume(self) -> None:
        """Let it write on."""
        self._open_pages()
        with self._turn:
            if self._running:
                return
            self._running = True
            self._since, self._writes_then = time.monotonic(), self._writes
            self._turn.notify()
            if self._writer is None and self.page_of is not None:
                self._writer = threading.Thread(target=self._write, name="dirtylog-writer", daemon=True)
                self._writer.start()

    def end(self) -> None:
        """Let it come to its end: the writer stands still."""
        self.pause()

    def close(self) -> None:
        """End the writer, and let the buffer go. Stop the log first. A second call does nothing."""
        # Before anything that an interrupt could end: the writer ends then all the same.
        self._ended = True
        try:
            with self._turn:
                self._running = False
                self._turn.notify()
            if self._writer is not None:
                self._writer.join()
            self._first_words = np.empty(0, np.uint64)
        finally:
            super().close()

    def _write(self) -> None:
        with self._turn:
            while not self._ended:
                if self._running:
                    self._store_batch()
                # A short rest between batches: whoever waits for the turn, or for Python's lock, gets it.
                self._turn.wait(_REST if self._running else None)

    def _store_batch(self) -> None:
        assert self.page_of is not None  # noqa: S101 - the writer is started with a program that stores
        due = self._writes_then + int((time.monotonic() - self._since) * self._rate)
        numbers = np.arange(self._writes, min(due, self._writes + _BATCH), dtype=np.int64)
        self._first_words[self.page_of(numbers)] = numbers + 1
        self._writes += len(numbers)


def _whole_pages(nbytes: int) -> int:
    npages, rest = divmod(nbytes, mmap.PAGESIZE)
    if npages < 1 or rest:
        raise InvalidArgumentError(f"a buffer of {nbytes} bytes: it must be whole pages of {mmap.PAGESIZE}, and at least one")
    return npages


def _zeroed(npages: int) -> NDArray[np.uint64]:
    nbytes, total = npages * mmap.PAGESIZE, host_memory()
    if total is not None and nbytes > total:
        raise InvalidArgumentError(f"a buffer of {nbytes} bytes: this host has {total} bytes of memory")
    try:
        return empty((npages, mmap.PAGESIZE // 8), np.uint64)
    except (OSError, OverflowError, ValueError) as error:
        code = error.errno if isinstance(error, OSError) else None
        raise DirtyLogError(
            f"the host cannot map a buffer of {nbytes} bytes", errno=code, reason=str(error), remedy="ask for less memory"
        ) from error

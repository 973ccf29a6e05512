"""A log in rounds: let the source run for a while, get, and so on."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.errors import TargetGoneError

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dirtylog.bitmap import DirtyBitmap
    from dirtylog.dirty_log import DirtyLog
    from dirtylog.epoch import Consumer
    from dirtylog.memslot import MemorySlot


@dataclass(frozen=True, slots=True)
class Round:
    """What one round found.

    ``seconds`` is how long writes were gathered, ``get_seconds`` how long the gets took. ``began`` is when it began, by
    :func:`time.perf_counter`.
    """

    number: int
    seconds: float
    get_seconds: float
    dirty: dict[MemorySlot, DirtyBitmap]
    began: float

    @property
    def dirty_pages(self) -> int:
        """How many pages were reported."""
        return sum(bitmap.count() for bitmap in self.dirty.values())

    @property
    def dirty_bytes(self) -> int:
        """How many bytes these pages have."""
        return sum(bitmap.count() * slot.page_size for slot, bitmap in self.dirty.items())

    def runs(self) -> NDArray[np.int64]:
        """Return the runs of dirty pages as rows of (first frame number, number of pages), slot by slot.

        A frame number is the address in pages: guest-physical, or of a process. Where slots have pages of several sizes it counts
        the smallest.
        """
        unit = min((slot.page_size for slot in self.dirty), default=1)
        rows = [
            (bitmap.runs() + np.array((slot.base_gfn, 0))) * (slot.page_size // unit)
            for slot, bitmap in self.dirty.items()
            if bitmap
        ]
        return np.concatenate(rows) if rows else np.empty((0, 2), np.int64)


def rounds(
    log: DirtyLog, count: int | None, interval: float, *, consumer: Consumer | None = None, over: threading.Event | None = None
) -> Iterator[Round]:
    """Yield ``count`` rounds (None: without end) of ``interval`` seconds.

    The log is on, and the source runs; it is not stopped in between. Each round begins its gets with an update of the slots: one
    that is new reports all that it holds. A source that comes to its end has a last round, whatever ``count`` is; one that vanishes
    in the middle has a last one with what could still be had, and then the :class:`TargetGoneError` is raised.

    The pages are those that ``get`` has, or with ``consumer`` its own. When ``over`` is set the round is the last and ends at once.
    """
    began = time.perf_counter()
    for number in itertools.count(1) if count is None else range(1, count + 1):
        left = max(0.0, began + interval - time.perf_counter())
        ending = log.memory.ending(left) if over is None else over.wait(left) or log.memory.ending(0)
        before = time.perf_counter()
        dirty: dict[MemorySlot, DirtyBitmap] = {}
        gone: TargetGoneError | None = None
        try:
            if consumer is not None:
                with consumer.epoch() as epoch:
                    dirty = {log.memory.slots[number]: bitmap for number, bitmap in epoch.dirty.items()}
            else:
                log.update()
                for slot in log.memory.slots:
                    if slot.dirty_bitmap is not None:
                        dirty[slot] = log.get(slot.id)
        except TargetGoneError as error:
            gone = error
        if dirty or gone is None:
            yield Round(number, before - began, time.perf_counter() - before, dirty, began)
        if gone is not None:
            raise gone
        if ending:
            return
        began = before

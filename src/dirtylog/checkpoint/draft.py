"""A checkpoint that is being made: pages are gathered into batches, and become a checkpoint at the commit."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.checkpoint.codecs import Adaptive, codec
from dirtylog.checkpoint.pages import ZERO, PageMap, pack
from dirtylog.checkpoint.rows import BatchRow, CheckpointRow
from dirtylog.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from dirtylog.checkpoint.store import Checkpoint, SlotLayout, Store

BATCH_BYTES = 1 << 20


class Draft:
    """A checkpoint that is being made. All of it goes through one buffer of :data:`BATCH_BYTES`, or of one page that is larger."""

    def __init__(self, store: Store, compression: str) -> None:
        self._store = store
        self._compress = Adaptive(codec(compression))
        self._place = store.index.facts().next_place
        self._buffer = np.empty((0, 0), np.uint8)
        self._filled = 0
        self._batches: list[BatchRow] = []
        self._segments: dict[int, int] = {}
        self._maps: dict[int, PageMap] = {}
        self._done = 0
        self.expected = 0
        """How many bytes of pages it is known to take."""
        self.progress: Callable[[int, int], None] = lambda _done, _expected: None
        self.stored = 0
        """How many bytes were written so far."""

    def zeros(self, key: int, npages: int) -> None:
        """Begin a slot with zero pages: those that are not written later are zero."""
        self._maps[key] = PageMap.zeros(npages)

    def has(self, key: int) -> bool:
        """Return whether it has pages of a slot already."""
        return key in self._maps

    def write(
        self,
        key: int,
        pages: NDArray[np.int64],
        page_size: int,
        read: Callable[[NDArray[np.int64], NDArray[np.uint8]], object],
    ) -> None:
        """Take pages of a slot, ascending; those taken before count no more.

        ``read`` fills uint8[k, page_size] with the contents of so many of them.
        """
        if page_size != self._buffer.shape[1]:
            self._flush()
            self._buffer = np.empty((max(1, BATCH_BYTES // page_size), page_size), np.uint8)
        # Runs at once, for pages are many.
        parts: list[PageMap] = []
        at = 0
        while at < len(pages):
            some = pages[at : at + len(self._buffer) - self._filled]
            into = self._buffer[self._filled : self._filled + len(some)]
            read(some, into)
            parts.append(PageMap(some, np.ones(len(some), np.int64), self._keep(into)).joined())
            at += len(some)
            self._done += into.nbytes
            self.progress(self._done, self.expected)
            if self._filled == len(self._buffer):
                self._flush()
        taken = PageMap.one_after_another(parts)
        self._maps[key] = self._maps[key].under(taken) if key in self._maps else taken

    def _keep(self, contents: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Keep what is not zero of pages that were just read into the buffer, and return the places of all."""
        zero = _zero_pages(contents)
        stored = len(contents) - int(np.count_nonzero(zero))
        if stored < len(contents):
            contents[:stored] = contents[~zero]
        places = np.full(len(contents), ZERO, np.int64)
        places[~zero] = np.arange(self._place, self._place + stored)
        self._place += stored
        self._filled += stored
        return places

    def _flush(self) -> None:
        """Write the buffer as a batch."""
        if not self._filled:
            return
        contents = self._buffer[: self._filled]
        sums = self._store.checksum.of_pages(contents)
        name, data = self._compress.compress(contents.reshape(-1).data)
        segment, offset, end = self._store.append(data)
        first = self._place - self._filled
        self._batches.append(BatchRow(0, segment, offset, end - offset, name, contents.shape[1], first, self._filled, None, sums))
        self._segments[segment] = end
        self.stored += end - offset
        self._filled = 0

    def commit(
        self,
        slots: Sequence[SlotLayout],
        *,
        parent: Checkpoint | None,
        note: str = "",
        extra: bytes = b"",
    ) -> int:
        """Make it a checkpoint, and return its id. It has all pages of ``parent`` that were not written, or stands alone."""
        known = set() if parent is None else {slot.key for slot in parent.slots}
        for slot in slots:
            if slot.key not in known and (slot.key not in self._maps or not self._maps[slot.key].covers(slot.npages)):
                raise InvalidArgumentError(f"not all pages of {slot.label} were written, and no checkpoint before has it")
        self._flush()
        self._store.sync()
        npages = sum(one.count() for one in self._maps.values())
        stored = sum(one.nonzero() for one in self._maps.values())
        with self._store.transaction() as index:
            number, batch = index.next_checkpoint(), index.next_batch()
            index.put_batches([row._replace(batch=batch + at) for at, row in enumerate(self._batches)])
            for segment, nbytes in self._segments.items():
                index.put_segment(segment, nbytes)
            facts = index.facts()
            next_slot = max(facts.next_slot, *(slot.key + 1 for slot in slots), 0)
            index.put_facts(facts._replace(next_place=self._place, next_slot=next_slot))
            row = CheckpointRow(
                id=number,
                parent=None if parent is None else parent.id,
                created=time.time(),
                note=note,
                whole=int(parent is None),
                npages=npages,
                zeros=npages - stored,
                stored=self.stored,
                layout=json.dumps([asdict(slot) for slot in slots]),
                extra=extra,
                map=pack(self._maps),
            )
            index.put_checkpoint(row)
        return number

    def abort(self) -> None:
        """Give up: what was written is no more."""
        self._store.give_up()


def _zero_pages(contents: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which pages are zero. Most are not, and show it in their first octets."""
    words = contents.view(np.uint64)
    zero = words[:, 0] == 0
    if zero.any():
        maybe = np.flatnonzero(zero)
        zero[maybe] = ~words[maybe].any(axis=1)
    return np.asarray(zero)

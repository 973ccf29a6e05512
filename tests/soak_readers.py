"""The readers of a soak: each takes what a log reports to it, into a copy of its own, or fails in the middle of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dirtylog import DirtyBitmap
from interrupts import interrupt
from oracle import Copy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from random import Random

    from numpy.typing import NDArray

    from dirtylog import Consumer, DirtyLog, Memory, MemorySlot
    from dirtylog.epoch import Epoch

_GRANULE = 64
"""Of the pages that a clear begins and ends at."""


class Reader(ABC):
    """One that reads a log and keeps a copy. It is used by one thread at a time."""

    def __init__(self, name: str, memory: Memory, log: DirtyLog, rng: Random) -> None:
        self.copy = Copy(name)
        self._memory = memory
        self._log = log
        self._rng = rng

    def begin(self) -> None:
        """Read everything; what is written from now on must be reported."""
        self.copy.keep(())
        for slot in self._memory.slots:
            self.copy.begin(slot, self._memory.read(slot.id, np.arange(slot.npages)))

    @abstractmethod
    def take(self) -> None:
        """Take all that is reported, and copy it."""

    @abstractmethod
    def interrupted(self, step: int) -> None:
        """Do the same, and be interrupted, as by Ctrl-C, at point number ``step`` where that can happen, if there are so many."""

    def _logged(self) -> list[MemorySlot]:
        slots = list(self._memory.slots)
        self.copy.keep(slots)
        return [slot for slot in slots if slot.dirty_bitmap is not None]

    def _copy(self, slot: MemorySlot, dirty: DirtyBitmap) -> None:
        if dirty:
            pages = dirty.pages()
            self.copy.take(slot, pages, self._memory.read(slot.id, pages))


def compare(
    memory: Memory, readers: Iterable[Reader], contents: Callable[[MemorySlot], Iterator[tuple[int, NDArray[np.uint8]]]]
) -> None:
    """Have each reader take what is left, once, and compare its copy with ``contents``. Nobody writes meanwhile.

    One after the other: to watch memory may make one mapping of several, and then the next update makes another slot of what it
    is in, although nobody has written; a reader is given that with its next take.
    """
    for reader in readers:
        reader.take()
        for slot in memory.slots:
            for first, there in contents(slot):
                reader.copy.compare(slot, first, there)


class GetReader(Reader):
    """Takes with ``get``."""

    def take(self) -> None:
        self._log.update()
        for slot in self._logged():
            out = DirtyBitmap(slot.npages) if self._rng.random() < 0.5 else None
            self._copy(slot, self._log.get(slot.id, out))

    def interrupted(self, step: int) -> None:
        self._log.update()
        for slot in self._logged():
            # What was interrupted after the last step has its answer in here.
            out = DirtyBitmap(slot.npages)
            interrupt(partial(self._log.get, slot.id, out), step)
            self._copy(slot, out)


class ClearReader(Reader):
    """Takes with ``get`` and ``clear``, in pieces of random lengths: manual protect."""

    def take(self) -> None:
        for slot, first, mask in self._pieces():
            self._log.clear(slot.id, first, mask)
            self._copy_piece(slot, first, mask)

    def interrupted(self, step: int) -> None:
        for slot, first, mask in self._pieces():
            interrupt(partial(self._log.clear, slot.id, first, mask), step)
            # Whether they were cleared before the interrupt or not: who is not sure copies them.
            self._copy_piece(slot, first, mask)

    def _pieces(self) -> list[tuple[MemorySlot, int, DirtyBitmap]]:
        pieces = []
        for slot in self._logged():
            pages = self._log.get(slot.id).pages()
            step = _GRANULE * self._rng.randint(1, -(-slot.npages // _GRANULE))
            for first in range(0, slot.npages, step):
                npages = min(step, slot.npages - first)
                mine = pages[(pages >= first) & (pages < first + npages)]
                pieces.append((slot, first, DirtyBitmap.from_pages(npages, mine - first)))
        return pieces

    def _copy_piece(self, slot: MemorySlot, first: int, mask: DirtyBitmap) -> None:
        self._copy(slot, DirtyBitmap.from_pages(slot.npages, mask.pages() + first))


class ConsumerError(Exception):
    """What a consumer raises in the middle of its epoch: the disk is full, the peer is gone."""


class EpochReader(Reader):
    """Takes in the epochs of a consumer, which it commits; or it fails in one, whose pages must come again."""

    def __init__(self, name: str, memory: Memory, log: DirtyLog, rng: Random) -> None:
        super().__init__(name, memory, log, rng)
        self._consumer: Consumer = log.consumer(name)

    def take(self) -> None:
        self._through(self._consumer.epoch())

    def interrupted(self, step: int) -> None:
        epoch = self._consumer.epoch()
        interrupt(partial(self._through, epoch), step)
        epoch.rollback()

    def rolls_back(self) -> None:
        """Take, and say that it did not work."""
        with self._consumer.epoch() as epoch:
            self._part(epoch.dirty)
            epoch.rollback()

    def raises(self) -> None:
        """Take, and raise."""
        with suppress(ConsumerError), self._consumer.epoch() as epoch:
            self._part(epoch.dirty)
            raise ConsumerError

    def _through(self, epoch: Epoch) -> None:
        with epoch:
            self._follow(epoch.dirty)

    def _part(self, dirty: Mapping[int, DirtyBitmap]) -> None:
        """Copy some of it before it fails."""
        self._follow({slot: bitmap for slot, bitmap in dirty.items() if self._rng.random() < 0.5})

    def _follow(self, dirty: Mapping[int, DirtyBitmap]) -> None:
        self.copy.keep(self._memory.slots)
        for slot_id, bitmap in dirty.items():
            self._copy(self._memory.slots[slot_id], bitmap)

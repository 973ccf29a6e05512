"""Fast reset: a guest goes back to where it was by putting back only what was written since.

Under the log's lock, in this order: the baseline's consumer takes what was written, which gives it to everybody else too; pages
that were pending for it before are made dirty for the others again; the pages are put back; the registers are put back; the
consumer commits.

Why this order. *The others before the pages*: to put a page back is a write too, and whoever copied what the guest had
written there must copy it again; the other way round an interrupt between the two would lose that. *All under the log's
lock*: else a reader could take a page between its mark and its contents. *The commit last*: whatever ends a reset early rolls the
consumer's epoch back, and the next reset puts all of it back again.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from dirtylog.errors import DirtyLogError, InvalidArgumentError, UnsupportedError
from dirtylog.guests.machine import Machine

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

    from dirtylog.bitmap import DirtyBitmap
    from dirtylog.dirty_log import DirtyLog
    from dirtylog.guests.vcpu import VcpuSnapshot
    from dirtylog.memslot import MemorySlot

# Up to so many pages are passed over for one that is put back.
_DENSE = 256
_numbers = itertools.count(1)


class Baseline:
    """A guest as it is now: a copy of its memory, and its vCPUs' registers. The guest must be paused, and logged by ``log``.

    It is one more consumer of the log: others lose no page to it. Several baselines may stand side by side. A context
    manager: leaving it lets the copy go.
    """

    def __init__(self, log: DirtyLog) -> None:
        memory = log.memory
        if not isinstance(memory, Machine):
            raise UnsupportedError("only a guest can be reset", reason=f"a {type(memory).__name__} has no vCPUs")
        self.memory: Machine[Any] = memory
        self._log = log
        self._closed = False
        name = f"baseline {next(_numbers)}"
        try:
            self._consumer = log.consumer(name)
            self._epoch = self._consumer.epoch()
            with log._lock, self._epoch as epoch:  # noqa: SLF001 - see above: a baseline is a part of the log
                self._vcpus = self._snapshots()
                self._slots = [_SlotCopy(memory, slot) for slot in memory.slots]
                self._check_slots(epoch.dirty)
        except BaseException:
            log.consumer(name).close()
            raise

    @property
    def nbytes(self) -> int:
        """The length of the copy."""
        return sum(copy.slot.nbytes for copy in self._slots)

    def reset(self) -> int:
        """Put back every page that was written since, and the vCPUs' registers; return the number of pages.

        The guest must be paused, and have the slots that it had. Afterwards its memory is the baseline's byte for byte, as far
        as its log sees all writes. The pages put back are clean for this baseline and dirty for every other reader of the log. If
        it is interrupted, or fails, the next reset puts back what this one would have.
        """
        if self._closed:
            raise DirtyLogError("this baseline is closed")
        with self._log._lock:  # noqa: SLF001 - see above
            self.memory.check_paused()
            # One that an interrupt at its very end left open.
            self._epoch.rollback()
            earlier = self._given_earlier()
            self._epoch = self._consumer.epoch()
            with self._epoch as epoch:
                self._check_slots(epoch.dirty)
                changed = []
                for copy in self._slots:
                    dirty = epoch.dirty[copy.slot.id]
                    pages = dirty.pages()
                    if len(pages):
                        if earlier:
                            self._log.mark_for_others(copy.slot, dirty, self._consumer)
                        with self.memory.port.mmu_lock:
                            copy.put_back(pages)
                        changed.append(pages + copy.slot.base_gfn)
                for vcpu, snapshot in zip(self.memory.vcpus, self._vcpus, strict=True):
                    vcpu.put_back(snapshot, changed)
        return sum(map(len, changed))

    def close(self) -> None:
        """Let the copy go, and leave the log. A second call does nothing."""
        self._closed = True
        self._consumer.close()
        self._slots, self._vcpus = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _snapshots(self) -> list[VcpuSnapshot]:
        self.memory.check_paused()
        return [vcpu.snapshot() for vcpu in self.memory.vcpus]

    def _check_slots(self, dirty: dict[int, DirtyBitmap]) -> None:
        now = [(slot, slot.base_gfn) for slot in self.memory.slots]
        if now != [(copy.slot, copy.base_gfn) for copy in self._slots]:
            raise InvalidArgumentError("the guest's slots are not those that the baseline was taken of", remedy="take a new one")
        silent = [slot.id for slot, _ in now if slot.id not in dirty]
        if silent:
            raise InvalidArgumentError(
                f"slot {silent[0]} is not being logged: nobody knows what is written to it",
                slot=silent[0],
                remedy="start the DirtyLog, which it takes a baseline of",
            )

    def _given_earlier(self) -> bool:
        """Return whether pages are pending already. Others may have done with those; what is taken now is as new to them."""
        # What an interrupt left as taken is pending too.
        return bool(self._consumer.pending._taken) or any(map(self._is_pending, self._slots))  # noqa: SLF001 - see above

    def _is_pending(self, copy: _SlotCopy) -> bool:
        # Not by asking for the slot's pages: that would make the slot known, of which all is pending while it is not.
        pages = self._consumer.pending._pending.get(copy.slot)  # noqa: SLF001 - see above
        return pages is None or pages.any()


class _SlotCopy:
    """A copy of one slot's memory. A page is one item of it, so that NumPy moves it in one piece."""

    def __init__(self, memory: Machine[Any], slot: MemorySlot) -> None:
        self.slot = slot
        self.base_gfn = slot.base_gfn
        contents = memory.contents(slot)
        page = np.dtype((np.void, contents.shape[1]))
        self._live = contents.view(page)[:, 0]
        self._copy: NDArray[np.void] = self._live.copy()

    def put_back(self, pages: NDArray[np.int64]) -> None:
        """Write these pages' contents of then."""
        first, end = int(pages[0]), int(pages[-1]) + 1
        if end - first > _DENSE * len(pages):
            self._live[pages] = self._copy[pages]
            return
        # In one pass, where the other way makes two: twice as fast, while there are not too many pages to pass over.
        chosen = np.zeros(end - first, np.bool_)
        chosen[pages - first] = True
        np.copyto(self._live[first:end], self._copy[first:end], where=chosen)

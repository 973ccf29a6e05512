"""The hooks that a source of writes gives to the generic dirty log: the part that really differs.

A port derives from :class:`ProtectPort` when a page is logged by taking its write permission (or its hardware dirty bit)
away, from :class:`SyncPort` when hardware or a log area already holds the answer, and from :class:`KernelPort` when a kernel
keeps the bitmap and does it all. The hooks are abstract: a port that
lacks one cannot be constructed, which is where a missing Kconfig symbol would stop a kernel build.
"""

from __future__ import annotations

import enum
import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from dirtylog.words import words_of_range

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray

    from dirtylog.memslot import MemorySlot
    from dirtylog.words import DirtyWords


class Exactness(enum.Enum):
    """How what a source reports relates to what was written."""

    EXACT = "exact"
    """Reported and written are the same set."""
    SUPERSET = "superset"
    """Everything written is reported, and perhaps more."""


class Port(ABC):
    """What the generic functions ask of any source.

    ``mmu_lock`` guards the slots' bitmaps and the port's translations together. Whoever marks a page holds it.
    """

    name: ClassVar[str]
    exactness: ClassVar[Exactness] = Exactness.EXACT
    blind_spots: ClassVar[tuple[str, ...]] = ()
    has_bitmap: ClassVar[bool] = True
    """False for a ring without a bitmap: a get is then refused with ENXIO."""

    mmu_lock: AbstractContextManager[object]

    def __init__(self) -> None:
        self.mmu_lock = threading.Lock()

    @abstractmethod
    def start_logging(self, slot: MemorySlot) -> None:
        """Make every page of a slot whose bit is clear log its next write. Called with mmu_lock held; a flush follows always."""

    @abstractmethod
    def stop_logging(self, slot: MemorySlot) -> None:
        """End the logging of a slot, whose bitmap is gone. Called with mmu_lock held; a flush follows."""

    def mark_contents(self, slot: MemorySlot) -> None:
        """Set the bit of each page that may hold something, for readers that have not met the slot. Called with mmu_lock held.

        Right after :meth:`start_logging`. A page left out reads as zeros, and logs its next write.
        """
        assert slot.dirty_bitmap is not None  # noqa: S101 - logging has just been started
        slot.dirty_bitmap.merge(words_of_range(0, slot.npages))

    @abstractmethod
    def flush_tlbs(self, slot: MemorySlot) -> None:
        """Drop every cached translation of the slot, and return when no vCPU can use one any more.

        Called without mmu_lock, for a vCPU may need it to get to where it can answer.
        """


class ProtectPort(Port):
    """A port whose pages are logged by protecting them: it goes with ``get_dirty_log_protect``."""

    def start_logging_all_set(self, slot: MemorySlot) -> None:
        """Begin to log a slot whose bits are all set: none has to be protected before it is cleared. Else as above."""

    def sync_dirty_log(self, slot: MemorySlot) -> None:
        """Move what a hardware buffer holds into the slot's bitmap. Called without mmu_lock. Most ports have no such buffer."""

    @abstractmethod
    def enable_log_dirty(self, slot: MemorySlot, words: DirtyWords) -> None:
        """Make the next write to each page of ``words`` be logged. Called with mmu_lock held; a flush follows.

        KVM's kvm_arch_mmu_enable_log_dirty_pt_masked. To protect more pages than asked is legal, fewer is a lost write.
        """


class SyncPort(Port):
    """A port whose hardware or log area holds the answer: it goes with ``get_dirty_log``."""

    @abstractmethod
    def sync_dirty_log(self, slot: MemorySlot) -> None:
        """Move what was logged for this slot into its bitmap, and re-arm those pages. Called without mmu_lock; a flush follows."""


class KernelPort(Port):
    """A port behind which a kernel keeps the dirty bitmap and runs the four steps: it goes with ``fetch_dirty_log``.

    The slot's own bitmap has only what this process marks itself.
    """

    @abstractmethod
    def fetch_dirty_log(self, slot: MemorySlot, words: NDArray[np.uint64]) -> None:
        """Overwrite ``words``, all of the slot's bitmap, with the dirty pages, which are clear and armed again on return.

        Called with mmu_lock held; no flush follows. On an error nothing was taken.
        """

    def flush_tlbs(self, slot: MemorySlot) -> None:
        """Do nothing: the kernel flushes before its calls return."""

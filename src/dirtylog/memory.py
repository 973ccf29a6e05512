"""What every source gives: slots, a port, and the contents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from dirtylog.memslot import MemorySlot, SlotTable
    from dirtylog.port import Exactness, KernelPort, ProtectPort, SyncPort


class Memory(Protocol):
    """A memory whose writes can be logged.

    ``blind_spots`` lists, in words, the writes that this source cannot see.
    """

    @property
    def slots(self) -> SlotTable:
        """The slots, and slots_lock."""

    @property
    def port(self) -> ProtectPort | SyncPort | KernelPort:
        """How this memory logs."""

    @property
    def exactness(self) -> Exactness:
        """Whether reported and written are the same."""

    @property
    def blind_spots(self) -> tuple[str, ...]:
        """The writes that this source cannot see."""

    @property
    def incomplete(self) -> tuple[str, ...]:
        """Why writes may have been missed, beyond the blind spots: what is known to be so here and now. Empty if nothing is."""

    @property
    def faults(self) -> int | None:
        """Page faults that this source has taken since it was opened, as far as is known; None where nobody counts.

        Those that logging costs are among them.
        """

    @property
    def held(self) -> int:
        """Bytes that hold something: what a first full copy would have to move."""

    def update_slots(self) -> list[MemorySlot]:
        """Bring the slot table up to date, and return the slots that are to be logged and are not yet. slots_lock is held.

        :class:`TargetGoneError` when the memory is gone.
        """

    def read(self, slot: int, pages: ArrayLike, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Return the contents of ``pages`` (offsets in the slot) as uint8[k, page_size]."""

    def write(self, slot: int, pages: ArrayLike, data: ArrayLike) -> None:
        """Write uint8[k, page_size] to ``pages``, and log them: these are writes too."""

    def ending(self, seconds: float) -> bool:
        """Wait so long, or less if the source comes to its end; return whether it has, and stands still for a last get."""

    @property
    def paused(self) -> bool:
        """Whether it stands still by :meth:`pause`, or because it was never let run. A buffer whose writers are others never is."""

    def pause(self) -> None:
        """Return when nothing of the source runs."""

    def resume(self) -> None:
        """Let it run."""

    def close(self) -> None:
        """End it and give everything back. A second call does nothing."""

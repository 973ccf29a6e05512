"""Puts checkpoints back, each page read once and verified."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dirtylog.checkpoint.contents import Contents
from dirtylog.checkpoint.store import Store
from dirtylog.checkpoint.vcpus import unpack_vcpus
from dirtylog.errors import CorruptDataError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from dirtylog.checkpoint.pages import PageMap
    from dirtylog.checkpoint.store import Checkpoint, SlotLayout
    from dirtylog.memory import Memory
    from dirtylog.memslot import MemorySlot

_CHUNK_PAGES = 1 << 14
_TRIES = 3
_T = TypeVar("_T")


def reading(store: Store, read: Callable[[Contents], _T]) -> _T:
    """Call ``read`` with the contents of a store, again if its writer has moved them meanwhile."""
    for attempt in range(_TRIES):
        contents = Contents(store)
        try:
            return read(contents)
        except CorruptDataError:
            if attempt == _TRIES - 1 or store.index.batches() == contents.rows:
                raise
        finally:
            contents.close()
    raise AssertionError


def read_slot(store: Store, pages: PageMap, out: NDArray[np.uint8]) -> None:
    """Fill ``out``, uint8[npages, page_size], with all pages of a slot."""
    _, places = pages.places()

    def read(contents: Contents) -> None:
        for at in range(0, len(places), _CHUNK_PAGES):
            contents.read(places[at : at + _CHUNK_PAGES], out[at : at + _CHUNK_PAGES])

    reading(store, read)


def restore_memory(memory: Memory, path: str | Path, number: int | None = None) -> Checkpoint:
    """Put a checkpoint of a store, by default the newest, into a memory that stands still, and return it.

    Its slots must be as they were. Only pages that differ are written, each verified; a guest's vCPUs get their states back too.

    Raises :class:`InvalidArgumentError` where the slots are others, :class:`CorruptDataError`.
    """
    with Store(path) as store:
        checkpoint = store.checkpoint(number)
        put_back(store, checkpoint, [(memory, slot, "") for slot in memory.slots])
        return checkpoint


def put_back(store: Store, checkpoint: Checkpoint, slots: Sequence[tuple[Memory, MemorySlot, str]]) -> None:
    """Put a checkpoint into memories: rows of (memory, slot, the name of an array or ""). Only pages that differ are written."""
    pairs = [(layout, *_matching(layout, slots, checkpoint)) for layout in checkpoint.slots]
    maps = store.maps(checkpoint.id)
    states = unpack_vcpus(checkpoint.extra)
    for layout, memory, slot in pairs:
        _, places = maps[layout.key].places()
        # Bounded by bytes: pages of a slot may be large.
        step = max(1, (_CHUNK_PAGES << 10) // slot.page_size)
        buffer = np.empty((min(step, slot.npages), slot.page_size), np.uint8)

        def read(
            contents: Contents,
            memory: Memory = memory,
            slot: MemorySlot = slot,
            places: NDArray[np.int64] = places,
            step: int = step,
            buffer: NDArray[np.uint8] = buffer,
        ) -> None:
            for at in range(0, slot.npages, step):
                pages = np.arange(at, min(at + step, slot.npages))
                saved = buffer[: len(pages)]
                contents.read(places[at : at + step], saved)
                differs = (memory.read(slot.id, pages) != saved).any(axis=1)
                if differs.any():
                    memory.write(slot.id, pages[differs], saved[differs])

        reading(store, read)
    memories = list(dict.fromkeys(memory for memory, _, name in slots if not name))
    for one, state in zip(memories, states, strict=False):
        load: Any = getattr(one, "load_vcpu_states", None)
        if load is not None and state:
            load(state)


def _matching(
    layout: SlotLayout, slots: Sequence[tuple[Memory, MemorySlot, str]], checkpoint: Checkpoint
) -> tuple[Memory, MemorySlot]:
    for memory, slot, name in slots:
        same_name = name == layout.name if layout.array is not None or name else slot.id == layout.id
        if same_name:
            if (slot.npages, slot.page_size) == (layout.npages, layout.page_size):
                return memory, slot
            raise InvalidArgumentError(
                f"{layout.label} has {slot.npages} pages of {slot.page_size} bytes, and checkpoint {checkpoint.id} has "
                f"{layout.npages} of {layout.page_size}",
                slot=slot.id,
            )
    raise InvalidArgumentError(
        f"checkpoint {checkpoint.id} has {layout.label}, and this memory has not",
        remedy="restore it into a memory of the same slots, or into files",
    )

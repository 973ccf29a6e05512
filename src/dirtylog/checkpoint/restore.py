"""Puts checkpoints back, each page read once and verified."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from dirtylog.checkpoint.contents import Contents
from dirtylog.checkpoint.pages import ZERO
from dirtylog.checkpoint.store import Store
from dirtylog.checkpoint.vcpus import unpack_vcpus
from dirtylog.errors import CorruptDataError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from dirtylog.checkpoint.pages import PageMap
    from dirtylog.checkpoint.store import Checkpoint, SlotLayout
    from dirtylog.memory import Memory
    from dirtylog.memslot import MemorySlot

_ZERO_BYTES = 4 << 20
"""So much is looked at in one go of what was zero."""
_TRIES = 10
_T = TypeVar("_T")


def reading(store: Store, read: Callable[[Contents], _T]) -> _T:
    """Call ``read`` with the contents of a store, again if its writer has moved them meanwhile."""
    for attempt in range(_TRIES):
        contents = Contents(store)
        try:
            return read(contents)
        except CorruptDataError:
            if attempt == _TRIES - 1 or store.index.batches_by_soundness()[0] == contents.rows:
                raise
        finally:
            contents.close()
    raise AssertionError


@contextmanager
def staying(store: Store, number: int) -> Iterator[None]:
    """Tell what goes wrong within it as what it is if the checkpoint has been dropped by the store's writer meanwhile."""
    try:
        yield
    except CorruptDataError as error:
        if number in store.index.ids():
            raise
        raise InvalidArgumentError(f"checkpoint {number} was dropped while it was read", remedy="restore another one") from error


def read_slot(store: Store, pages: PageMap, out: NDArray[np.uint8]) -> None:
    """Fill ``out``, uint8[npages, page_size], with all pages of a slot."""
    _, places = pages.places()
    reading(store, lambda contents: contents.read(places, out))


def write_slot(store: Store, pages: PageMap, page_size: int, descriptor: int) -> None:
    """Write all pages of a slot into a file of its length. Zero ones are left as they are: the file must be new."""
    _, places = pages.places()

    def write(which: NDArray[np.int64], saved: NDArray[np.uint8]) -> None:
        begins = np.flatnonzero(np.diff(which, prepend=-2) != 1).tolist()
        for begin, end in zip(begins, [*begins[1:], len(which)], strict=True):
            octets, at = saved[begin:end].reshape(-1).data, int(which[begin]) * page_size
            while octets:
                count = os.pwrite(descriptor, octets, at)
                octets, at = octets[count:], at + count

    reading(store, lambda contents: contents.give(places, page_size, write))


def give_slot(store: Store, pages: PageMap, page_size: int, take: Callable[[NDArray[np.int64], NDArray[np.uint8]], object]) -> None:
    """Give all pages of a slot to ``take``: ascending numbers and uint8[k, page_size]. Two threads call it.

    Where the store's writer moves pages meanwhile, some come twice.
    """
    _, places = pages.places()
    reading(store, lambda contents: contents.give(places, page_size, take))
    for which, nothing in _zero_pages(places, page_size):
        take(which, nothing)


def _zero_pages(places: NDArray[np.int64], page_size: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    zeros = np.flatnonzero(places == ZERO)
    step = max(1, _ZERO_BYTES // page_size)
    nothing = np.zeros((min(step, len(zeros)), page_size), np.uint8)
    for at in range(0, len(zeros), step):
        which = zeros[at : at + step]
        yield which, nothing[: len(which)]


def differing(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which pages differ, of two times uint8[k, page_size]."""
    return np.asarray((one.view(np.uint64) != other.view(np.uint64)).any(axis=1))


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
    states = unpack_vcpus(checkpoint.extra)
    with staying(store, checkpoint.id):
        maps = store.maps(checkpoint.id)
        for layout, memory, slot in pairs:
            _put_slot(store, maps[layout.key], memory, slot)
    memories = list(dict.fromkeys(memory for memory, _, name in slots if not name))
    for one, state in zip(memories, states, strict=False):
        load: Any = getattr(one, "load_vcpu_states", None)
        if load is not None and state:
            load(state)


def _put_slot(store: Store, pages: PageMap, memory: Memory, slot: MemorySlot) -> None:
    """Put all pages of a slot into a memory, from this thread alone: not every memory takes them from any."""
    _, places = pages.places()

    def put(which: NDArray[np.int64], saved: NDArray[np.uint8]) -> None:
        differs = differing(memory.read(slot.id, which), saved)
        if differs.any():
            memory.write(slot.id, which[differs], saved[differs])

    def read(contents: Contents) -> None:
        for which, saved in contents.each(places, slot.page_size):
            put(which, saved)

    reading(store, read)
    for which, nothing in _zero_pages(places, slot.page_size):
        put(which, nothing)


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

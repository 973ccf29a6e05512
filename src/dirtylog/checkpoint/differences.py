"""What two checkpoints of a store have different."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dirtylog.bitmap import DirtyBitmap
from dirtylog.checkpoint.restore import reading

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dirtylog.checkpoint.pages import PageMap
    from dirtylog.checkpoint.store import SlotLayout, Store


class SlotDifference(NamedTuple):
    """Pages of a slot that differ: rows of (first page, number of pages). ``only`` is the checkpoint that alone has the slot."""

    slot: SlotLayout
    runs: NDArray[np.int64]
    only: int | None


def diff(store: Store, first: int, second: int) -> list[SlotDifference]:
    """Return what two checkpoints have different, slot by slot. Pages are compared by their checksums."""
    slots = [{_identity(slot): slot for slot in store.checkpoint(number).slots} for number in (first, second)]
    maps = [store.maps(number) for number in (first, second)]
    found: list[SlotDifference] = []
    for identity in {**slots[0], **slots[1]}:
        here = [number for number, one in zip((first, second), slots, strict=True) if identity in one]
        if len(here) == 1:
            slot = slots[(first, second).index(here[0])][identity]
            found.append(SlotDifference(slot, np.array([[0, slot.npages]]), here[0]))
            continue
        pages = _differing(store, maps[0][slots[0][identity].key], maps[1][slots[1][identity].key])
        if len(pages):
            slot = slots[1][identity]
            found.append(SlotDifference(slot, DirtyBitmap.from_pages(slot.npages, pages).runs(), None))
    return found


def _identity(slot: SlotLayout) -> tuple[str, int, int, int]:
    """Return what makes slots of two runs the same one."""
    return slot.name, slot.base_gfn if slot.array is None else 0, slot.npages, slot.page_size


def _differing(store: Store, one: PageMap, other: PageMap) -> NDArray[np.int64]:
    """Return the pages whose places, and then whose checksums, differ."""
    (_, mine), (_, theirs) = one.places(), other.places()
    pages = np.flatnonzero(mine != theirs)
    sums = reading(store, lambda contents: (contents.sums(mine[pages]), contents.sums(theirs[pages])))
    return pages[[before != after for before, after in zip(*sums, strict=True)]]

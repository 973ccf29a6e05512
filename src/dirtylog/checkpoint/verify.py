"""Checks a store: every page against its checksum, and that every checkpoint has all of its pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dirtylog.checkpoint.contents import Contents, places_of
from dirtylog.checkpoint.pages import ZERO, PageMap, unpack
from dirtylog.errors import DirtyLogError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from dirtylog.checkpoint.store import Checkpoint, Store


class Difference(NamedTuple):
    """What is not as it was saved: pages of a slot in the checkpoint that brought them, or, without these, what else is wrong."""

    checkpoint: int | None
    slot: str
    first: int | None
    npages: int
    reason: str


def verify(store: Store, progress: Callable[[int, int], None] = lambda _done, _total: None) -> list[Difference]:
    """Return all that is wrong with a store. ``progress`` is told how many bytes of how many are done."""
    found = [Difference(None, "index", None, 0, problem) for problem in store.index.quick_check()]
    contents = Contents(store)
    try:
        wrong = _wrong_places(contents, progress)
        known = np.concatenate([places_of(row) for row in contents.rows]) if contents.rows else np.empty(0, np.int64)
        wrong_places = np.array(sorted(wrong), np.int64)
        for row in store.index.checkpoints():
            checkpoint = store.checkpoint(row.id)
            try:
                maps = unpack(row.map)
                store.maps(row.id)
            except DirtyLogError as error:
                found.append(Difference(row.id, "", None, 0, str(error)))
                continue
            for key, one in maps.items():
                found += _of_slot(checkpoint, key, one, known, wrong_places, wrong)
    finally:
        contents.close()
    return found


def _wrong_places(contents: Contents, progress: Callable[[int, int], None]) -> dict[int, str]:
    """Return the places whose pages do not verify, and why."""
    total = sum(row.npages * row.page_size for row in contents.rows)
    wrong: dict[int, str] = {}
    done = 0
    for row in contents.rows:
        places = places_of(row)
        out = np.empty((row.npages, row.page_size), np.uint8)

        def bad(which: NDArray[np.int64], why: str, places: NDArray[np.int64] = places) -> None:
            wrong.update(dict.fromkeys(places[which].tolist(), why))

        contents.read(places, out, bad=bad)
        done += row.npages * row.page_size
        progress(done, total)
    return wrong


def _of_slot(
    checkpoint: Checkpoint,
    key: int,
    one: PageMap,
    known: NDArray[np.int64],
    wrong_places: NDArray[np.int64],
    wrong: dict[int, str],
) -> list[Difference]:
    """Return what is wrong with the pages that a checkpoint brought to one slot."""
    pages, places = one.places()
    lost = ~np.isin(places, known) & (places != ZERO)
    bad = np.isin(places, wrong_places) | lost
    if not bad.any():
        return []
    label = next((slot.label for slot in checkpoint.slots if slot.key == key), f"slot key {key}")
    found = []
    runs = PageMap.of([(pages[bad], np.full(int(bad.sum()), ZERO))])
    for first, npages in zip(runs.first.tolist(), runs.npages.tolist(), strict=True):
        place = int(places[np.searchsorted(pages, first)])
        found.append(Difference(checkpoint.id, label, first, npages, wrong.get(place, "no batch has its contents")))
    return found

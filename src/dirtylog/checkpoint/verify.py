"""Checks a store: every page against its checksum, and that every checkpoint has all of its pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dirtylog.checkpoint.contents import Contents, places_of
from dirtylog.checkpoint.index import chain
from dirtylog.checkpoint.pages import ZERO, PageMap, unpack
from dirtylog.checkpoint.store import checkpoint_of
from dirtylog.errors import CorruptDataError, DirtyLogError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from dirtylog.checkpoint.rows import BatchRow
    from dirtylog.checkpoint.store import Checkpoint, Store

_TRIES = 10


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
    try:
        wrong = _wrong_places(store, progress)
        with store.index.reading():
            rows, damaged = store.index.batches_by_soundness()
            found += [Difference(None, "index", None, 0, f"batch {number} does not have its checksum") for number in damaged]
            known = np.concatenate([places_of(row) for row in rows]) if rows else np.empty(0, np.int64)
            for number in store.index.ids():
                found += _of_checkpoint(store, number, known, wrong)
    except CorruptDataError as error:
        found.append(Difference(None, "index", None, 0, str(error)))
    return found


def _wrong_places(store: Store, progress: Callable[[int, int], None]) -> dict[int, str]:
    """Return the places whose pages do not verify, and why."""
    contents = Contents(store)
    try:
        total = sum(row.npages * row.page_size for row in contents.rows)
        done = 0
        wrong: dict[int, str] = {}
        for row in contents.rows:
            wrong |= _wrong_in(contents, row, places_of(row))
            done += row.npages * row.page_size
            progress(done, total)
        for _ in range(_TRIES):
            # What the writer has moved meanwhile looks the same: it is looked for where it is now.
            now = Contents(store)
            if not wrong or now.rows == contents.rows:
                now.close()
                break
            contents.close()
            contents = now
            wrong = _still_wrong(contents, np.array(sorted(wrong), np.int64))
    finally:
        contents.close()
    return wrong


def _wrong_in(contents: Contents, row: BatchRow, places: NDArray[np.int64]) -> dict[int, str]:
    """Return which of these places, of one batch, do not verify."""
    wrong: dict[int, str] = {}

    def bad(which: NDArray[np.int64], why: str) -> None:
        wrong.update(dict.fromkeys(places[which].tolist(), why))

    contents.read(places, np.empty((len(places), row.page_size), np.uint8), bad=bad)
    return wrong


def _still_wrong(contents: Contents, places: NDArray[np.int64]) -> dict[int, str]:
    """Return which of these places do not verify. Those that no batch has any more are dead, or told of as missing."""
    wrong: dict[int, str] = {}
    for row in contents.rows:
        here = np.intersect1d(places_of(row), places)
        if len(here):
            wrong |= _wrong_in(contents, row, here)
    return wrong


def _of_checkpoint(store: Store, number: int, known: NDArray[np.int64], wrong: dict[int, str]) -> list[Difference]:
    """Return what is wrong with what a checkpoint brought."""
    try:
        (row, *_) = chain(store.index, number)
        checkpoint = checkpoint_of(row)
        maps = unpack(row.map)
        store.maps(number)
    except DirtyLogError as error:
        return [Difference(number, "", None, 0, str(error))]
    places = np.array(sorted(wrong), np.int64)
    return [one for key, pages in maps.items() for one in _of_slot(checkpoint, key, pages, known, places, wrong)]


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

"""Which checkpoints stay, and how the room of the others is had back. Both may be cut off at any instant, and done again.

To drop a checkpoint moves what it brought to those that come right after it, in the index alone, in one transaction. Pages that no
checkpoint has any more are then dead. A segment of which too little is alive is written anew: its live pages go to the end of
another segment, which is synced; then the index says where they are now; then the old segment is removed.
"""

from __future__ import annotations

import re
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dirtylog.checkpoint import segments
from dirtylog.checkpoint.codecs import NONE, Adaptive, codec
from dirtylog.checkpoint.contents import Contents, packed_places, places_of
from dirtylog.checkpoint.pages import ZERO, pack, unpack
from dirtylog.checkpoint.store import checkpoint_of
from dirtylog.errors import CorruptDataError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from dirtylog.checkpoint.rows import BatchRow, CheckpointRow
    from dirtylog.checkpoint.store import Checkpoint, Store

LIVE_SHARE = 0.5
"""A segment of which less than this is alive is written anew."""
_PERIODS = {"hourly": 3600, "daily": 86400, "weekly": 7 * 86400}
_RULE = re.compile(r"(last|hourly|daily|weekly)[ :=]([0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class Keep:
    """Which checkpoints to keep: the ``last`` so many, and the newest of each of so many hours, days, weeks that have one."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0

    @classmethod
    def of(cls, rules: Iterable[str]) -> Keep:
        """Return it from rules such as "last 10" and "hourly 24", which add up."""
        counts: dict[str, int] = {}
        for rule in rules:
            match = _RULE.fullmatch(rule.strip())
            if match is None or not int(match[2]):
                raise InvalidArgumentError(f"keep {rule!r}: write last, hourly, daily or weekly, and a number above 0: 'last 10'")
            counts[match[1]] = int(match[2])
        return cls(**counts)

    def chosen(self, checkpoints: Sequence[Checkpoint]) -> set[int]:
        """Return the ids of those that stay, of all of a store; the newest always does."""
        newest_first = sorted(checkpoints, key=lambda one: one.id, reverse=True)
        kept = {one.id for one in newest_first[: max(1, self.last)]}
        for name, length in _PERIODS.items():
            periods: dict[int, int] = {}
            for one in newest_first:
                # By the clock of this place: a day ends at midnight here.
                periods.setdefault(int((one.created - time.timezone) // length), one.id)
            kept |= set(list(periods.values())[: getattr(self, name)])
        return kept


class Freed(NamedTuple):
    """What was dropped: how many checkpoints, and how many bytes of segments."""

    checkpoints: int
    nbytes: int


def prune(store: Store, keep: Keep, *, live_share: float = LIVE_SHARE) -> Freed:
    """Drop all checkpoints but those to keep, and get their room back."""
    store.check_writable()
    everything = store.checkpoints()
    kept = keep.chosen(everything)
    for one in everything:
        if one.id not in kept:
            _drop(store, one.id)
    return Freed(len(everything) - len(kept), collect(store, live_share=live_share))


def _drop(store: Store, number: int) -> None:
    """Drop one checkpoint: those whose parent it is get its pages, where they have none of their own."""
    with store.transaction() as index:
        dropped = index.checkpoint(number)
        if dropped is None:
            return
        for child in index.children(number):
            index.put_checkpoint(_with_pages_of(dropped, child))
        index.drop_checkpoint(number)


def _with_pages_of(dropped: CheckpointRow, child: CheckpointRow) -> CheckpointRow:
    older, newer = unpack(dropped.map), unpack(child.map)
    slots = _keys(child)
    maps = {key: one for key, one in newer.items() if key in slots}
    for key, one in older.items():
        if key in slots:
            maps[key] = one.under(maps[key]) if key in maps else one
    npages, stored = sum(one.count() for one in maps.values()), sum(one.nonzero() for one in maps.values())
    return child._replace(
        parent=dropped.parent, whole=dropped.whole, npages=npages, zeros=npages - stored, stored=child.stored, map=pack(maps)
    )


def _keys(row: CheckpointRow) -> set[int]:
    return {slot.key for slot in checkpoint_of(row).slots}


def collect(store: Store, *, live_share: float = LIVE_SHARE) -> int:
    """Write segments anew of which too little is alive, and return how many bytes that freed.

    What cannot be read is left as it is, and nothing is done at all with an index that is damaged: :class:`CorruptDataError`.
    """
    alive = _live_places(store.index.checkpoints())
    in_segment: dict[int, list[tuple[BatchRow, NDArray[np.bool_]]]] = {segment: [] for segment in store.index.segments()}
    for row in store.index.batches():
        in_segment[row.segment].append((row, np.isin(places_of(row), alive)))
    goes = {
        segment: nbytes
        for segment, nbytes in sorted(store.index.segments().items())
        if sum(row.nbytes * int(mask.sum()) / row.npages for row, mask in in_segment[segment]) < live_share * nbytes
    }
    if goes and (problems := store.index.quick_check()):
        raise CorruptDataError(f"the index of {str(store.path)!r} is damaged: nothing is removed", reason=problems[0])
    freed = 0
    for segment in goes:
        store.avoid(segment)
    try:
        for segment, nbytes in goes.items():
            # Verify names what cannot be read; a decompression may need all of a batch.
            with suppress(CorruptDataError):
                freed += nbytes - _rewrite(store, segment, in_segment[segment])
    except BaseException:
        store.give_up()
        raise
    return freed


def _live_places(rows: Sequence[CheckpointRow]) -> NDArray[np.int64]:
    """Return the places that some checkpoint has. What one brought it also has, so no chain has to be followed."""
    found = [one.places()[1] for row in rows for one in unpack(row.map).values()]
    places = np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)
    return np.asarray(places[places != ZERO])


def _rewrite(store: Store, segment: int, kept: Sequence[tuple[BatchRow, NDArray[np.bool_]]]) -> int:
    """Move the live pages of a segment to the end of another one, and remove it; return how many bytes they take there."""
    moved: list[BatchRow] = []
    lengths: dict[int, int] = {}
    contents = Contents(store)
    try:
        for row, mask in kept:
            if not mask.any():
                continue
            changed, data = _without_dead(store, contents, row, mask)
            number, offset, end = store.append(data)
            moved.append(changed._replace(segment=number, offset=offset, nbytes=end - offset))
            lengths[number] = end
    finally:
        contents.close()
    store.sync()
    with store.transaction() as index:
        index.put_batches(moved)
        for row, mask in kept:
            if not mask.any():
                index.drop_batch(row.batch)
        for number, nbytes in lengths.items():
            index.put_segment(number, nbytes)
        index.drop_segment(segment)
    segments.drop(store.folder, segment)
    return sum(row.nbytes for row in moved)


def _without_dead(store: Store, contents: Contents, row: BatchRow, mask: NDArray[np.bool_]) -> tuple[BatchRow, bytes | memoryview]:
    """Return a batch with its live pages alone. Their sums go with them: a page that is damaged stays known as that."""
    if mask.all():
        return row, contents.stored(row)
    pages = np.ascontiguousarray(contents.batch(row)[mask])
    size = store.checksum.nbytes
    sums = np.frombuffer(row.sums, np.uint8).reshape(row.npages, size)[mask].tobytes()
    places = places_of(row)[mask]
    name, data = Adaptive(codec(row.codec)).compress(pages.reshape(-1).data)
    return (
        row._replace(codec=name, first=int(places[0]), npages=len(places), places=packed_places(places), sums=sums),
        data if name != NONE else bytes(data),
    )

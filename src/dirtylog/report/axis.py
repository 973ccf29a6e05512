"""One axis for all memory that was written: slot after slot by address, without what was never written between them.

Everything is counted in *pages* of the smallest page size that the recording has. Slots of one name that touch or overlap, such as
the pieces of a heap that grew, or a mapping that went and came back, share one *region* of the axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dirtylog.memslot import MemorySlot

_CUTS = 32
"""A region is cut at no more gaps than that, the longest: scattered writes would make regions without end."""
_SHORT = 16
_NOTABLE = 8
"""A gap is cut out of a region if it is longer than what was written there, and than this fraction of all that was."""


class Writes(NamedTuple):
    """Runs of pages that a round wrote, int64[k] each, by round and then by page, no two of a round overlapping.

    ``end`` is the page after the last, ``rounds`` the row of the round in the recording's table.
    """

    rounds: NDArray[np.int64]
    first: NDArray[np.int64]
    end: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Region:
    """Pages ``start`` to ``start + npages`` of the axis, whose first lies at ``address``, in bytes."""

    name: str
    label: str
    address: int
    start: int
    npages: int


@dataclass(frozen=True, slots=True)
class Axis:
    """The regions, ascending, and all writes."""

    regions: tuple[Region, ...]
    page_size: int
    writes: Writes

    @property
    def npages(self) -> int:
        """How long the axis is."""
        return self.regions[-1].start + self.regions[-1].npages if self.regions else 0

    def region_of(self, page: int) -> Region:
        """Return the region that has a page."""
        return self.regions[int(np.searchsorted([region.start for region in self.regions], page, "right")) - 1]

    def address_of(self, page: int) -> int:
        """Return the address of a page, in bytes."""
        region = self.region_of(page)
        return region.address + (page - region.start) * self.page_size


def label_of(slot: MemorySlot) -> str:
    """Return a short name for a slot."""
    if slot.name:
        return PurePosixPath(slot.name).name if slot.name.startswith("/") else slot.name
    if slot.permissions:
        return "anonymous"
    return f"slot {slot.id & 0xFFFF}" + (f" of space {slot.address_space}" if slot.address_space else "")


def lay_out(slots: Sequence[MemorySlot], runs: NDArray[Any]) -> Axis:
    """Return the axis for runs of slots: a structured array with the fields round, slot, first and npages."""
    if not len(runs):
        return Axis((), min((slot.page_size for slot in slots), default=1), Writes(*(np.empty(0, np.int64) for _ in range(3))))
    used = np.flatnonzero(np.bincount(runs["slot"])).tolist()
    page_size = min(slots[index].page_size for index in used)
    groups, offsets = _group([(index, slots[index]) for index in used], page_size)
    offset_of, scale_of = np.zeros(used[-1] + 1, np.int64), np.ones(used[-1] + 1, np.int64)
    for index, offset in offsets.items():
        offset_of[index], scale_of[index] = offset, slots[index].page_size // page_size
    first = offset_of[runs["slot"]] + runs["first"] * scale_of[runs["slot"]]
    writes = united(runs["round"].astype(np.int64), first, first + runs["npages"] * scale_of[runs["slot"]])
    starts, ends = _shown(groups, writes)
    kept = np.concatenate(([0], np.cumsum(ends - starts)))
    moved = (kept[:-1] - starts)[np.searchsorted(starts, writes.first, "right") - 1]
    regions = []
    owners = np.searchsorted([group.start for group in groups], starts, "right") - 1
    for owner, start, end, place in zip(owners.tolist(), starts.tolist(), ends.tolist(), kept.tolist(), strict=False):
        group = groups[owner]
        address = group.address + (start - group.start) * page_size
        regions.append(Region(group.slot.name, label_of(group.slot), address, place, end - start))
    return Axis(tuple(regions), page_size, Writes(writes.rounds, writes.first + moved, writes.end + moved))


def united(rounds: NDArray[np.int64], first: NDArray[np.int64], end: NDArray[np.int64]) -> Writes:
    """Return runs in order, those of a round that touch or overlap as one."""
    if not len(first):
        return Writes(rounds, first, end)
    span = int(end.max()) + 2  # so far apart that no two rounds touch
    key = first + rounds * span
    if (key[1:] < key[:-1]).any():
        order = np.argsort(key)
        rounds, first, end, key = rounds[order], first[order], end[order], key[order]
    reach = np.maximum.accumulate(end + rounds * span)
    fresh = np.concatenate(([True], key[1:] > reach[:-1]))
    starts = np.flatnonzero(fresh)
    last = np.concatenate((starts[1:], [len(first)])) - 1
    return Writes(rounds[starts], first[starts], reach[last] - rounds[starts] * span)


@dataclass(slots=True)
class _Group:
    """Slots of one kind that touch or overlap. ``start`` and ``npages`` are on an axis where nothing is left out."""

    slot: MemorySlot
    address: int
    start: int
    npages: int


def _group(slots: list[tuple[int, MemorySlot]], page_size: int) -> tuple[list[_Group], dict[int, int]]:
    """Return the groups by address, and for each slot's index where its first page lies."""
    members: list[tuple[_Group, list[tuple[int, MemorySlot]]]] = []
    for index, slot in sorted(slots, key=lambda item: (_kind(item[1]), _address(item[1]))):
        pages = slot.nbytes // page_size
        if members and _kind(members[-1][0].slot) == _kind(slot):
            group, inside = members[-1]
            offset = (_address(slot) - group.address) // page_size
            if offset <= group.npages:
                group.npages = max(group.npages, offset + pages)
                inside.append((index, slot))
                continue
        members.append((_Group(slot, _address(slot), 0, pages), [(index, slot)]))
    members.sort(key=lambda item: (item[0].slot.address_space, item[0].address))
    start, offsets = 0, {}
    for group, inside in members:
        group.start = start
        for index, slot in inside:
            offsets[index] = start + (_address(slot) - group.address) // page_size
        # A page between, so that runs of two groups never touch.
        start += group.npages + 1
    return [group for group, _ in members], offsets


def _kind(slot: MemorySlot) -> tuple[int, str, int, int]:
    # A guest's slots have no names: each is a region of its own.
    return slot.address_space, slot.name, slot.page_size, -1 if slot.permissions else slot.id


def _address(slot: MemorySlot) -> int:
    return slot.base_gfn * slot.page_size


def _shown(groups: list[_Group], writes: Writes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return starts and ends of what the axis keeps: the groups without long gaps where nothing was ever written."""
    ever = united(np.zeros(len(writes.first), np.int64), writes.first, writes.end)
    begins, finishes = np.array([group.start for group in groups]), np.array([group.start + group.npages for group in groups])
    owner = np.searchsorted(begins, ever.first, "right") - 1
    written = np.bincount(owner, ever.end - ever.first, minlength=len(groups)).astype(np.int64)
    gap = ever.first[1:] - ever.end[:-1]
    same = owner[1:] == owner[:-1]
    long = np.flatnonzero(same & (gap > np.maximum(np.maximum(written[owner[1:]], written.sum() // _NOTABLE), _SHORT)))
    cuts = np.union1d(long[np.argsort(gap[long])[-_CUTS:]], np.flatnonzero(~same))
    starts = ever.first[np.concatenate(([0], cuts + 1))]
    ends = ever.end[np.concatenate((cuts, [len(ever.end) - 1]))]
    # What is never written at the ends of a group stays, if it is short: a slot is then seen as it is.
    edge = np.maximum(written, _SHORT)
    owner = np.searchsorted(begins, starts, "right") - 1
    leads = np.concatenate(([True], owner[1:] != owner[:-1])) & (starts - begins[owner] <= edge[owner])
    trails = np.concatenate((owner[1:] != owner[:-1], [True])) & (finishes[owner] - ends <= edge[owner])
    return np.where(leads, begins[owner], starts), np.where(trails, finishes[owner], ends)

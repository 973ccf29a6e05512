"""Which slots the mappings of a process make: what stays, what goes, and what is new from one look to the next.

A slot stays as long as all that is mapped in its range is of one kind: the same file and name, private or shared alike. A hole in
it does no harm, nor does memory of the same kind that is mapped into that hole later: the port sees that it is not watched.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dirtylog.linux.mappings import Mapping
    from dirtylog.memslot import MemorySlot

_FRAGMENTS = 32
"""A mapping in more slots than that, for it grew so often, becomes one slot anew, and is reported as a whole once."""


class Kind(NamedTuple):
    """What must not change under a slot."""

    file: str
    name: str
    shared: bool

    @classmethod
    def of(cls, mapping: Mapping) -> Kind:
        """Return the kind of a mapping."""
        return cls(mapping.file, mapping.name, mapping.shared)


class Span(NamedTuple):
    """A range of addresses."""

    start: int
    end: int


@dataclass(slots=True)
class Placed:
    """A slot and what it was made for. ``holes`` are the parts of it where nothing is mapped."""

    slot: MemorySlot
    kind: Kind
    holes: tuple[Span, ...] = ()
    changed: tuple[Span, ...] = field(default=(), init=False)

    @property
    def start(self) -> int:
        """The address of the first byte."""
        return self.slot.host_address

    @property
    def end(self) -> int:
        """The address after the last byte."""
        return self.slot.host_address + self.slot.nbytes


class Piece(NamedTuple):
    """A part of a mapping that no slot has."""

    mapping: Mapping
    span: Span


class Plan(NamedTuple):
    """What to do to the slot table."""

    keep: list[Placed]
    remove: list[Placed]
    pieces: list[Piece]


def plan(placed: Sequence[Placed], mappings: Sequence[Mapping]) -> Plan:
    """Compare slots and mappings, each ascending by address, and say what changes. The kept slots' holes are brought up to date."""
    starts, ends = [one.start for one in mappings], [one.end for one in mappings]
    keep: list[Placed] = []
    remove: list[Placed] = []
    for one in placed:
        under = mappings[bisect.bisect_right(ends, one.start) : bisect.bisect_left(starts, one.end)]
        if under and all(Kind.of(mapping) == one.kind for mapping in under):
            _update_holes(one, under)
            keep.append(one)
        else:
            remove.append(one)
    keep, fragments = _without_fragments(keep, starts)
    return Plan(keep, remove + fragments, _uncovered(keep, mappings))


def _update_holes(one: Placed, under: Sequence[Mapping]) -> None:
    holes: list[Span] = []
    cursor = one.start
    for mapping in under:
        if mapping.start > cursor:
            holes.append(Span(cursor, mapping.start))
        cursor = mapping.end
    if cursor < one.end:
        holes.append(Span(cursor, one.end))
    # What was a hole counts as written as well: until now it was read as zeros, whatever had come there.
    one.changed = (*one.holes, *holes) if tuple(holes) != one.holes else ()
    one.holes = tuple(holes)
    one.slot.permissions = under[0].permissions


def _without_fragments(keep: list[Placed], starts: list[int]) -> tuple[list[Placed], list[Placed]]:
    """Part those slots off of which a mapping has too many."""
    by_mapping: dict[int, list[Placed]] = {}
    for one in keep:
        by_mapping.setdefault(bisect.bisect_right(starts, one.start), []).append(one)
    fragments = [one for several in by_mapping.values() if len(several) > _FRAGMENTS for one in several]
    if not fragments:
        return keep, []
    dropped = {id(one) for one in fragments}
    return [one for one in keep if id(one) not in dropped], fragments


def _uncovered(keep: list[Placed], mappings: Sequence[Mapping]) -> list[Piece]:
    pieces: list[Piece] = []
    index = 0
    for mapping in mappings:
        cursor = mapping.start
        while index < len(keep) and keep[index].end <= cursor:
            index += 1
        at = index
        while at < len(keep) and keep[at].start < mapping.end:
            if keep[at].start > cursor:
                pieces.append(Piece(mapping, Span(cursor, keep[at].start)))
            cursor = max(cursor, keep[at].end)
            at += 1
        if cursor < mapping.end:
            pieces.append(Piece(mapping, Span(cursor, mapping.end)))
    return pieces

"""The slots of a process, which follow its mappings."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, NamedTuple

from dirtylog.bitmap import DirtyBitmap
from dirtylog.compare import ComparePort
from dirtylog.errors import CoverageLostError
from dirtylog.linux.mappings import Mapping, PageSizes, read_mappings
from dirtylog.linux.pins import NO_PINS, Pins, pins_of
from dirtylog.linux.placement import Kind, Piece, Placed, Span, plan
from dirtylog.linux.preflight import runs_without_first
from dirtylog.linux.uffd_port import UffdPort
from dirtylog.log import stop_logging
from dirtylog.memslot import MEM_MAX_NR_PAGES, MemorySlot, SlotTable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dirtylog.errors import DirtyLogError
    from dirtylog.linux.mappings import Selection
    from dirtylog.linux.process_port import ProcessPort
    from dirtylog.linux.soft_dirty import SoftDirtyPort
    from dirtylog.memory import Memory
    from dirtylog.words import DirtyWords

_SLOTS_PER_SPACE = 1 << 15
_ADDRESS_SPACES = 1 << 15


class Skipped(NamedTuple):
    """A mapping that is not logged, and why."""

    mapping: Mapping
    reason: str


class ProcessSlots:
    """What of a process's memory is logged, and what not. ``table`` is the slot table."""

    def __init__(self, pid: int, selection: Selection) -> None:
        self.table = SlotTable(address_spaces=_ADDRESS_SPACES, slots_per_space=_SLOTS_PER_SPACE)
        self.placed: list[Placed] = []
        self.skipped: tuple[Skipped, ...] = ()
        self._pid = pid
        self._selection = selection
        self._numbers = 0
        self._pins: Pins = NO_PINS

    def follow(self, memory: Memory, port: ProcessPort | SoftDirtyPort | ComparePort) -> None:
        """Make slots of new mappings; drop those of mappings that are gone, or are others now."""
        found = read_mappings(self._pid)
        if not found and runs_without_first(self._pid):
            raise CoverageLostError(
                f"the first thread of process {self._pid} has left, and others run on",
                pid=self._pid,
                reason="the kernel shows its memory no longer by its number, and what they write is not seen",
            )
        mappings = [one for one in found if not one.of_the_kernel and one in self._selection]
        before, self._pins = self._pins, pins_of(self._pid)
        todo = plan(self.placed, mappings)
        added, skipped = self._make_slots(todo.pieces, port)
        self.placed = sorted((*todo.keep, *added), key=lambda one: one.start)
        self.skipped = tuple(skipped)
        self._settle(memory)
        self._mark_holes(todo.keep, port)
        if isinstance(port, UffdPort):
            # Those of the time before once more: the last that came into them may have come after the get.
            self._mark_pins(port, (*before.ranges, *self._pins.ranges))

    def forget(self, memory: Memory) -> None:
        """Drop every slot."""
        self.placed = []
        self._settle(memory)

    def holes(self, slot: MemorySlot) -> tuple[Span, ...]:
        """Return where in a slot nothing was mapped at the last look."""
        return next((one.holes for one in self.placed if one.slot is slot and one.holes), ())

    def gaps(self, port: ProcessPort | SoftDirtyPort | ComparePort) -> Iterator[str]:
        """Yield why writes may have been missed."""
        for mapping, reason in self.skipped:
            if mapping.permissions[1] == "w":
                yield f"{mapping.start:#x}-{mapping.end:#x} {mapping.name} is not logged: {reason}"
        if not isinstance(port, ComparePort):
            if self._pins.unexplained:
                yield f"{self._pins.unexplained} bytes are pinned for a device (VmPin), whose writes are not seen"
            shared = [one.slot for one in self.placed if one.kind.shared and one.slot.permissions[1] == "w"]
            if shared:
                example = shared[0].name or hex(shared[0].host_address)
                yield f"{len(shared)} mappings are shared (as {example}): what others write there is not seen"

    def _settle(self, memory: Memory) -> None:
        """Have just the slots in the table that are placed; should this be interrupted, the next makes up for it."""
        placed = {one.slot.id: one.slot for one in self.placed}
        gone = [slot for slot in self.table if slot.id not in placed]
        for slot in gone:
            stop_logging(memory, slot.id)
        self.table.change(gone, (slot for slot in placed.values() if self.table.get(slot.id) is None))

    def _make_slots(
        self, pieces: Iterable[Piece], port: ProcessPort | SoftDirtyPort | ComparePort
    ) -> tuple[list[Placed], list[Skipped]]:
        added: list[Placed] = []
        skipped: list[Skipped] = []
        for mapping, span in pieces:
            error = port.refuses(span.start, span.end - span.start)
            if error is not None:
                skipped.append(Skipped(mapping, _reason(error)))
            else:
                added += self._slots_of(mapping, span.start, span.end)
        if skipped:
            # What has gone meanwhile needs no slot.
            there = {mapping.start for mapping in read_mappings(self._pid)}
            skipped = [one for one in skipped if one.mapping.start in there]
        return added, skipped

    def _slots_of(self, mapping: Mapping, start: int, end: int) -> Iterator[Placed]:
        """Make the slots of a part of a mapping: one, unless it is larger than a slot can be."""
        page_size = PageSizes(self._pid).of(mapping)
        largest = MEM_MAX_NR_PAGES // 64 * 64 * page_size
        for first in range(start, end, largest):
            space, number = divmod(self._numbers, _SLOTS_PER_SPACE)
            self._numbers += 1
            slot = MemorySlot(
                space % _ADDRESS_SPACES << 16 | number,
                first // page_size,
                (min(end, first + largest) - first) // page_size,
                page_size,
                host_address=first,
                name=mapping.name,
                permissions=mapping.permissions,
                file_offset=mapping.offset + first - mapping.start,
                anonymous=mapping.anonymous,
            )
            yield Placed(slot, Kind.of(mapping))

    def _mark_holes(self, placed: Iterable[Placed], port: ProcessPort | SoftDirtyPort | ComparePort) -> None:
        """Count what has been unmapped in the middle of a slot as written: it reads as zeros now."""
        for one in placed:
            if one.changed:
                with port.mmu_lock:
                    if one.slot.dirty_bitmap is not None:
                        one.slot.dirty_bitmap.merge(_words(one.slot, one.changed))

    def _mark_pins(self, port: UffdPort, pinned: Iterable[tuple[int, int]]) -> None:
        """Count what is pinned for a device as written at every get."""
        spans = sorted((address, address + nbytes) for address, nbytes in pinned)
        port.always = {}
        for one in self.placed if spans else ():
            inside = [(max(start, one.start), min(end, one.end)) for start, end in spans if start < one.end and one.start < end]
            if inside:
                port.always[one.slot] = _words(one.slot, inside)


def _words(slot: MemorySlot, spans: Iterable[tuple[int, int]]) -> DirtyWords:
    """Return the pages of a slot that spans of addresses touch, which lie within it, ascending; two may share a page."""
    pages = DirtyBitmap(slot.npages)
    for start, end in spans:
        first = (start - slot.host_address) // slot.page_size
        pages.set_range(first, -(-(end - slot.host_address) // slot.page_size) - first)
    return pages.nonzero_words()


def _reason(error: DirtyLogError) -> str:
    reasons = {
        errno.EBUSY: "the process watches it with a userfaultfd of its own",
        errno.EPERM: "it maps a file that may not be written",
        errno.EINVAL: "the kernel does not watch that kind of memory",
    }
    return reasons.get(error.errno or 0, str(error))

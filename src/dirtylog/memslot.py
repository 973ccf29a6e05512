"""Memory slots and the table of them, with KVM's rules (KVM_SET_USER_MEMORY_REGION)."""

from __future__ import annotations

import enum
import errno
import itertools
import operator
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dirtylog.errors import BadSlotError, InvalidArgumentError, LoggingOffError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dirtylog.slotbitmap import SlotBitmap

KVM_USER_MEM_SLOTS = 32764
"""How many slots an address space has; x86's value, the smallest of KVM's architectures."""

MEM_MAX_NR_PAGES = (1 << 31) - 1
"""KVM_MEM_MAX_NR_PAGES: KVM's bit operations take 32-bit page numbers."""

MAX_GFN = 1 << 52
"""No guest frame number reaches this: 64-bit addresses of 4 KiB pages."""


class SlotFlags(enum.IntFlag):
    """The flags of a slot, with KVM's values."""

    NONE = 0
    LOG_DIRTY_PAGES = 1
    READONLY = 2


@dataclass(eq=False, slots=True)
class MemorySlot:
    """One run of guest-physical pages, logged as a whole.

    ``id`` is ``address_space << 16 | number``, as in KVM. ``base_gfn`` is the guest frame number of the first page, in pages
    of ``page_size`` bytes; ``host_address`` is where the first page lies for the source (KVM's userspace_addr; host-physical
    for an emulated guest). ``dirty_bitmap`` is there while the slot is being logged. A slot of a process has the ``name`` and the
    ``permissions`` of its mapping ("[heap]", "rw-p"), and of a file's the ``file_offset`` in bytes of the first page; where it is
    ``anonymous``, a page that is not there reads as zeros.
    """

    id: int
    base_gfn: int
    npages: int
    page_size: int = 4096
    flags: SlotFlags = SlotFlags.NONE
    host_address: int = 0
    name: str = ""
    permissions: str = ""
    file_offset: int = 0
    anonymous: bool = False
    dirty_bitmap: SlotBitmap | None = field(default=None, repr=False)
    readonly: bool = field(init=False, repr=False)
    """Whether the guest may only read. It never changes, and every miss asks: to test the flags would cost more than a walk."""

    def __post_init__(self) -> None:
        for name in ("id", "base_gfn", "npages", "page_size", "host_address"):
            setattr(self, name, operator.index(getattr(self, name)))
        self.readonly = bool(self.flags & SlotFlags.READONLY)
        if self.page_size < 1 or self.page_size & (self.page_size - 1):
            raise InvalidArgumentError(f"page size {self.page_size}: it must be a power of two")
        if not 1 <= self.npages <= MEM_MAX_NR_PAGES:
            raise InvalidArgumentError(
                f"a slot of {self.npages} pages: it must have 1 to {MEM_MAX_NR_PAGES} (2^31 - 1) pages", slot=self.id
            )
        if self.base_gfn < 0 or self.base_gfn > MAX_GFN - self.npages:
            raise InvalidArgumentError(
                f"{self.npages} pages from gfn {self.base_gfn:#x} do not lie between gfn 0 and {MAX_GFN:#x}",
                slot=self.id,
            )

    @property
    def address_space(self) -> int:
        """The address space: bits 16 and up of the id."""
        return self.id >> 16

    @property
    def printable_name(self) -> str:
        """The name as any encoder takes it: a file's may have any octets in it."""
        return self.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

    @property
    def end_gfn(self) -> int:
        """One past the last guest frame number."""
        return self.base_gfn + self.npages

    @property
    def nbytes(self) -> int:
        """The length in bytes."""
        return self.npages * self.page_size


class SlotTable:
    """The slots of one memory, by id.

    ``lock`` is slots_lock: whoever changes the table, or gets or clears a dirty log, holds it. Readers that only look a page
    up need no lock: the table is replaced as a whole, never changed in place.
    """

    def __init__(self, *, address_spaces: int = 1, slots_per_space: int = KVM_USER_MEM_SLOTS) -> None:
        self.lock = threading.RLock()
        self.address_spaces = address_spaces
        self.slots_per_space = slots_per_space
        self._slots: dict[int, MemorySlot] = {}

    def __iter__(self) -> Iterator[MemorySlot]:
        return iter(self._slots.values())

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, slot_id: int) -> MemorySlot:
        """Return the slot; :class:`BadSlotError` if the id is out of range, :class:`LoggingOffError` if there is none."""
        self.check_id(slot_id)
        slot = self._slots.get(slot_id)
        if slot is None:
            known = ", ".join(map(str, self._slots)) or "none"
            raise LoggingOffError(f"there is no slot {slot_id}; the slots are: {known}", slot=slot_id)
        return slot

    def get(self, slot_id: int) -> MemorySlot | None:
        """Return the slot, or None. Takes no lock."""
        return self._slots.get(slot_id)

    def logged(self, slot_id: int) -> tuple[MemorySlot, SlotBitmap]:
        """Return a slot that is being logged, and its bitmap; checks the id first, as KVM does."""
        slot = self[slot_id]
        if slot.dirty_bitmap is None:
            raise LoggingOffError(f"slot {slot_id} is not being logged", slot=slot_id, remedy="start the log first")
        return slot, slot.dirty_bitmap

    def check_id(self, slot_id: int) -> None:
        """Raise :class:`BadSlotError` unless both halves of the id are in range."""
        address_space, number = slot_id >> 16, slot_id & 0xFFFF
        if slot_id < 0 or address_space >= self.address_spaces or number >= self.slots_per_space:
            raise BadSlotError(
                f"slot id {slot_id:#x} is out of range: address spaces are 0 to {self.address_spaces - 1}, "
                f"slot numbers 0 to {self.slots_per_space - 1}",
                slot=slot_id,
            )

    def add(self, slot: MemorySlot) -> None:
        """Add a slot; :class:`BadSlotError` with EEXIST if its id is taken or it overlaps another of its address space."""
        with self.lock:
            self.check_place(slot, slot.base_gfn)
            if slot.id in self._slots:
                raise BadSlotError(f"slot {slot.id} exists already; remove it first", errno=errno.EEXIST, slot=slot.id)
            self._slots = {**self._slots, slot.id: slot}

    def remove(self, slot_id: int) -> MemorySlot:
        """Take a slot out of the table and return it."""
        with self.lock:
            slot = self[slot_id]
            self._slots = {key: other for key, other in self._slots.items() if key != slot_id}
            return slot

    def change(self, remove: Iterable[MemorySlot], add: Iterable[MemorySlot]) -> None:
        """Remove and add any number of slots in one step, or none of them: the errors are those of :meth:`add`."""
        with self.lock:
            gone = {slot.id for slot in remove}
            slots = {key: slot for key, slot in self._slots.items() if key not in gone}
            for slot in add:
                self.check_id(slot.id)
                if slot.id in slots:
                    raise BadSlotError(f"slot {slot.id} exists already; remove it first", errno=errno.EEXIST, slot=slot.id)
                slots[slot.id] = slot
            ordered = sorted(slots.values(), key=lambda slot: (slot.address_space, slot.base_gfn * slot.page_size))
            for before, slot in itertools.pairwise(ordered):
                end = before.base_gfn * before.page_size + before.nbytes
                if slot.address_space == before.address_space and slot.base_gfn * slot.page_size < end:
                    raise BadSlotError(f"slot {slot.id} overlaps slot {before.id}", errno=errno.EEXIST, slot=slot.id)
            self._slots = slots

    def check_move(self, slot_id: int, base_gfn: int) -> MemorySlot:
        """Return the slot if it may move to ``base_gfn``, or raise what :meth:`add` would."""
        slot = self[slot_id]
        if not 0 <= base_gfn <= MAX_GFN - slot.npages:
            raise InvalidArgumentError(
                f"{slot.npages} pages from gfn {base_gfn:#x} do not lie between gfn 0 and {MAX_GFN:#x}", slot=slot_id
            )
        self.check_place(slot, base_gfn)
        return slot

    def find(self, gfn: int, address_space: int = 0) -> MemorySlot | None:
        """Return the slot that holds a guest frame, or None. Takes no lock."""
        for slot in self._slots.values():
            if slot.base_gfn <= gfn < slot.base_gfn + slot.npages and slot.id >> 16 == address_space:
                return slot
        return None

    def check_place(self, slot: MemorySlot, base_gfn: int) -> None:
        """Raise :class:`BadSlotError` unless the slot's id is in range, and no other slot lies where it would."""
        self.check_id(slot.id)
        for other in self._slots.values():
            if other is slot or other.address_space != slot.address_space:
                continue
            if base_gfn < other.end_gfn and other.base_gfn < base_gfn + slot.npages:
                raise BadSlotError(
                    f"slot {slot.id} (gfn {base_gfn:#x} to {base_gfn + slot.npages - 1:#x}) overlaps slot {other.id} "
                    f"(gfn {other.base_gfn:#x} to {other.end_gfn - 1:#x})",
                    errno=errno.EEXIST,
                    slot=slot.id,
                )

"""What the ten ports of the software machine share: the miss path, and the flush of running vCPUs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from dirtylog.emulated.tables import TABLE_PAGE, TABLES, EntryFormat, RadixTables, gfn_chunks
from dirtylog.guests.vcpu import FlushTarget, leave_guest
from dirtylog.port import Port, ProtectPort, SyncPort

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dirtylog.memslot import MemorySlot, SlotTable
    from dirtylog.slotbitmap import SlotBitmap
    from dirtylog.words import DirtyWords

Translation = tuple[int, bool]
"""What a miss puts into a TLB: the host-physical address of the page, and whether stores may go through."""

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT


@dataclass(slots=True)
class PortStats:
    """Counters of one port. ``faults`` are misses that had to change a table; the rest of the misses only walked."""

    faults: int = 0
    huge_mappings: int = 0
    splits: int = 0
    flushes: int = 0


class TlbOwner(FlushTarget, Protocol):
    """A vCPU as a port sees it."""

    @property
    def in_guest(self) -> bool:
        """Whether guest code may be running on it now."""


class Translate(Protocol):
    """How a CPU asks for a translation: its vCPU's number, the guest frame number, and whether the access is a store."""

    def __call__(self, vcpu: int, gfn: int, write: bool, /) -> Translation | None: ...  # noqa: FBT001, D102 - the hot path takes no keywords


class SoftwarePort(Port):
    """A port of the software machine: it owns the second-stage tables, and answers the vCPUs' TLB misses from them."""

    blind_spots: ClassVar[tuple[str, ...]] = (
        "writes by this process straight into the guest's mapping, other than through Memory.write",
    )
    isa: ClassVar[str]
    """The instruction set of this port's guests, a name in :mod:`dirtylog.emulated.isa`, or "trace"."""
    how: ClassVar[str]
    """What logs a page, in a few words."""
    max_gfn: ClassVar[int]
    """No guest frame number reaches this."""
    max_host_address: ClassVar[int] = TABLES
    """No host-physical address of guest memory reaches this."""

    def __init__(self, slots: SlotTable, vcpus: Sequence[TlbOwner]) -> None:
        super().__init__()
        self.slots = slots
        self.vcpus = vcpus
        self.stats = PortStats()

    @abstractmethod
    def translate(self, vcpu: int, gfn: int, write: bool) -> Translation | None:  # noqa: FBT001 - the hot path takes no keywords
        """Answer a TLB miss of a vCPU; None if the guest may not make this access.

        This is where a page is logged: under mmu_lock the bit is set, then the permission given, then the page mapped.
        """

    @abstractmethod
    def unmap(self, slot: MemorySlot) -> None:
        """Forget every translation of a slot that moves or goes. Called with mmu_lock held; a flush follows."""

    def tlb_flushed(self, vcpu: int) -> None:
        """Learn that a vCPU has just flushed its TLB; called on its own thread, without mmu_lock."""

    def flush_tlbs(self, slot: MemorySlot) -> None:  # noqa: ARG002 - these TLBs are flushed whole
        """Have every vCPU flush, and return when each has done so or is sure to before it runs guest code."""
        self.stats.flushes += 1
        leave_guest(self.vcpus)


class SoftwareProtectPort(SoftwarePort, ProtectPort):
    """A software port that goes with ``get_dirty_log_protect``."""


class SoftwareSyncPort(SoftwarePort, SyncPort):
    """A software port that goes with ``get_dirty_log``."""


class RadixPort(SoftwarePort):
    """A port whose translations are a tree of tables."""

    format: ClassVar[EntryFormat]
    leaf_table_bytes: ClassVar[int] = TABLE_PAGE

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "format" in cls.__dict__:
            cls.max_gfn = 1 << sum(cls.format.index_bits)

    def __init__(self, slots: SlotTable, vcpus: Sequence[TlbOwner]) -> None:
        super().__init__(slots, vcpus)
        self.tables = RadixTables(self.format, leaf_table_bytes=self.leaf_table_bytes)
        # The format's masks, looked up once for the miss path.
        form = self.format
        self._present, self._write, self._permission = form.present, form.write, form.write | form.protect
        self._address_mask, self._protect_mask = form.address_mask, ~form.protect
        self._address_left, self._address_right = max(0, form.address_shift), max(0, -form.address_shift)

    def translate(self, vcpu: int, gfn: int, write: bool) -> Translation | None:  # noqa: ARG002, FBT001 - as declared
        """Walk, and where the walk finds no entry or no permission, fault."""
        with self.mmu_lock:
            if gfn >= self.max_gfn:
                return None
            offset, entry, block = self.tables.walk(gfn)
            if not entry & self._present or (write and entry & self._permission != self._write):
                fixed = self._fault(gfn, write, offset, entry, block)
                if fixed is None:
                    return None
                entry, block = fixed
            address = (entry & self._address_mask) << self._address_left >> self._address_right
            if block:
                address = self.tables.page_in_block(address, gfn)
            return address, entry & self._permission == self._write

    def start_logging(self, slot: MemorySlot) -> None:
        """Write-protect the slot. Blocks stay, without permission, until a write splits them."""
        for gfns in gfn_chunks(slot.base_gfn, slot.npages):
            self.tables.revoke(gfns)

    def stop_logging(self, slot: MemorySlot) -> None:
        """Drop split tables, so that the next miss maps a block again."""
        if self.format.block is not None:
            self.tables.free_leaf_tables(slot.base_gfn, slot.npages)

    def unmap(self, slot: MemorySlot) -> None:
        """Make every entry of the slot not present."""
        self.tables.unmap(slot.base_gfn, slot.npages)

    def _fault(self, gfn: int, write: bool, offset: int, entry: int, block: bool) -> tuple[int, bool] | None:  # noqa: FBT001 - hot path
        """Map a page, or give it write permission, and log the write; return (entry, is it a block)."""
        form, memory = self.format, self.tables.memory
        slot = self.slots.find(gfn)
        if slot is None or (write and slot.readonly):
            return None
        self.stats.faults += 1
        bitmap = slot.dirty_bitmap
        if not entry & form.present:
            offset, entry, block = self._new_entry(slot, gfn)
            if write or (bitmap is None and not slot.readonly):
                entry = (entry | self._write) & self._protect_mask
        else:
            if block and bitmap is not None:
                self.tables.split(offset)
                self.stats.splits += 1
                block, offset = False, self.tables.leaf(gfn)
                entry = memory.load(offset)
            entry = (entry | self._write) & self._protect_mask
        if write and bitmap is not None:
            self._log_write(slot, bitmap, gfn, offset)
        memory.codec.pack_into(memory.buffer, offset, entry)
        return entry, block

    def _log_write(self, slot: MemorySlot, bitmap: SlotBitmap, gfn: int, offset: int) -> None:  # noqa: ARG002 - for other ports
        """Log a page whose leaf at ``offset`` is about to get write permission."""
        bitmap.mark(gfn - slot.base_gfn)

    def _new_entry(self, slot: MemorySlot, gfn: int) -> tuple[int, int, bool]:
        """Return (offset, entry without write permission, is it a block) for a page that is not mapped yet."""
        form, pages = self.format, self.tables.block_pages
        first = gfn & ~(pages - 1)
        address = slot.host_address + ((first - slot.base_gfn) << PAGE_SHIFT)
        if (
            form.block is not None
            and slot.dirty_bitmap is None  # while it is logged, a slot is mapped page by page
            and slot.base_gfn <= first
            and first + pages <= slot.end_gfn
            and not address & ((pages << PAGE_SHIFT) - 1)
        ):
            offset = self.tables.block(gfn)
            if offset is not None:
                self.stats.huge_mappings += 1
                bits = form.block | form.protect | (0 if slot.readonly else form.writable_slot_block)
                return offset, form.leaf_entry(address, bits), True
        address += (gfn - first) << PAGE_SHIFT
        bits = form.leaf | form.protect | (0 if slot.readonly else form.writable_slot)
        return self.tables.leaf(gfn), form.leaf_entry(address, bits), False


class RadixProtectPort(RadixPort, SoftwareProtectPort):
    """A port that logs a page by taking the write permission of its entry in a tree of tables."""

    def enable_log_dirty(self, slot: MemorySlot, words: DirtyWords) -> None:
        """Write-protect the pages of ``words``. A block that holds one is protected whole (KVM a216e24fc947)."""
        self.tables.revoke(words.pages() + slot.base_gfn)

"""x86: extended page tables (EPT), four levels of 512 entries.

=======  =====================================================================================
bits     meaning
=======  =====================================================================================
0        R, readable
1        W, writable; **taken away to log a page**
2        X, executable
5:3      memory type of a leaf (6: write-back)
7        PS: the entry is a block, 2 MiB at the third level
8        A, accessed
9        D, dirty; **cleared to log a page** where the processor keeps it, with a modification log
51:12    address
57       software: host-writable, the host may write the page
58       software: MMU-writable, the page may be given write permission again
=======  =====================================================================================

Sources: Intel SDM volume 3C, 29.3.3 (EPT) and 29.3.6 (page-modification logging); Linux arch/x86/include/asm/vmx.h,
arch/x86/kvm/mmu/spte.h, and vmx_flush_pml_buffer in arch/x86/kvm/vmx/vmx.c.

:class:`X86Port` takes the W bit away. :class:`X86PmlPort` is the variant for processors that keep the D bit: a page stays
writable, its D bit is cleared, and the processor appends the address of each page whose D bit it sets to a log of 512
entries that it fills from the last entry down; a full log is an exit in which KVM empties it. Blocks are still
write-protected, so that what is logged is always a 4 KiB page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from dirtylog.emulated.port import PAGE_SHIFT, RadixProtectPort, Translation
from dirtylog.emulated.tables import EntryFormat, gfn_chunks
from dirtylog.words import words_of_pages

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dirtylog.emulated.port import TlbOwner
    from dirtylog.memslot import MemorySlot, SlotTable
    from dirtylog.words import DirtyWords

READ = 1 << 0
WRITE = 1 << 1
EXECUTE = 1 << 2
WRITE_BACK = 6 << 3
PAGE_SIZE_BIT = 1 << 7
ACCESSED = 1 << 8
DIRTY = 1 << 9
HOST_WRITABLE = 1 << 57
MMU_WRITABLE = 1 << 58

PML_ENTRIES = 512


class X86Port(RadixProtectPort):
    """EPT without accessed and dirty bits: a page is logged by its W bit."""

    name = "x86"
    how = "EPT W bit"
    isa = "x86"
    format: ClassVar[EntryFormat] = EntryFormat(
        byte_order="little",
        index_bits=(9, 9, 9, 9),
        address_mask=(1 << 52) - 4096,
        leaf=READ | EXECUTE | WRITE_BACK,
        present=READ | WRITE | EXECUTE,
        table=READ | WRITE | EXECUTE,
        table_present=READ | WRITE | EXECUTE,
        write=WRITE,
        writable_slot=HOST_WRITABLE | MMU_WRITABLE,
        writable_slot_block=HOST_WRITABLE | MMU_WRITABLE,
        block=READ | EXECUTE | WRITE_BACK | PAGE_SIZE_BIT,
        block_mask=PAGE_SIZE_BIT,
    )


class X86PmlPort(X86Port):
    """EPT with accessed and dirty bits: a page is logged by its D bit and the page-modification log."""

    name = "x86-pml"
    how = "EPT D bit, modification log"

    def __init__(self, slots: SlotTable, vcpus: Sequence[TlbOwner]) -> None:
        super().__init__(slots, vcpus)
        self._logs: dict[int, PageModificationLog] = {}

    def translate(self, vcpu: int, gfn: int, write: bool) -> Translation | None:  # noqa: FBT001 - as declared
        """As the processor does it: set A, and on a write D; a page whose D bit rises goes into the vCPU's log."""
        form, memory = self.format, self.tables.memory
        with self.mmu_lock:
            if gfn >= self.max_gfn:
                return None
            offset, entry, block = self.tables.walk(gfn)
            if not entry & form.present or (write and not entry & WRITE):
                fixed = self._fault(gfn, write, offset, entry, block)
                if fixed is None:
                    return None
                offset, entry, block = self.tables.walk(gfn)
            elif write and not entry & DIRTY:
                self._log(vcpu, gfn)  # a fault has set the page's bit itself
            entry |= ACCESSED | DIRTY if write else ACCESSED
            memory.store(offset, entry)
            address = form.address(entry)
            if block:
                address = self.tables.page_in_block(address, gfn)
            # A store through a translation cached with D clear walks again to set it.
            return address, entry & (WRITE | DIRTY) == WRITE | DIRTY

    def enable_log_dirty(self, slot: MemorySlot, words: DirtyWords) -> None:
        """Clear the D bits of the pages; write-protect blocks."""
        self._clean(words.pages() + slot.base_gfn)

    def start_logging(self, slot: MemorySlot) -> None:
        """Clear the D bits of the slot; write-protect blocks."""
        for gfns in gfn_chunks(slot.base_gfn, slot.npages):
            self._clean(gfns)

    def stop_logging(self, slot: MemorySlot) -> None:
        """Empty the logs of what they hold for this slot, so that no later log finds it."""
        self._drain_all()
        super().stop_logging(slot)

    def unmap(self, slot: MemorySlot) -> None:
        """Empty the logs first: the addresses in them are of the slot's place before the change."""
        self._drain_all()
        super().unmap(slot)

    def sync_dirty_log(self, slot: MemorySlot) -> None:  # noqa: ARG002 - a log is emptied whole
        """Empty every vCPU's log into the bitmaps."""
        with self.mmu_lock:
            self._drain_all()

    def _drain_all(self) -> None:
        for log in self._logs.values():
            self._drain(log)

    def _clean(self, gfns: NDArray[np.int64]) -> None:
        words = self.tables.memory.words
        leaves, blocks = self.tables.locate(gfns)
        words[leaves] &= np.uint64(~DIRTY & (1 << 64) - 1)
        words[blocks] &= np.uint64(~WRITE & (1 << 64) - 1)

    def _log(self, vcpu: int, gfn: int) -> None:
        slot = self.slots.find(gfn)
        if slot is None or slot.dirty_bitmap is None:
            return
        log = self._logs.setdefault(vcpu, PageModificationLog())
        if log.index < 0:  # full: the exit in which KVM empties it
            self._drain(log)
        log.entries[log.index] = gfn << PAGE_SHIFT
        log.index -= 1

    def _drain(self, log: PageModificationLog) -> None:
        gfns = log.gfns()
        for slot in self.slots:
            if slot.dirty_bitmap is not None:
                here = gfns[(gfns >= slot.base_gfn) & (gfns < slot.end_gfn)]
                slot.dirty_bitmap.merge(words_of_pages(here - slot.base_gfn))
        log.clear()


class PageModificationLog:
    """One vCPU's log: guest-physical addresses, filled from entry 511 down; ``index`` is the next free entry."""

    def __init__(self) -> None:
        self.entries = np.zeros(PML_ENTRIES, "<u8")
        self.index = PML_ENTRIES - 1

    def gfns(self) -> NDArray[np.int64]:
        """Return the logged guest frame numbers, oldest first."""
        return self.entries[self.index + 1 :][::-1].astype(np.int64) >> PAGE_SHIFT

    def clear(self) -> None:
        """Empty the log."""
        self.index = PML_ENTRIES - 1

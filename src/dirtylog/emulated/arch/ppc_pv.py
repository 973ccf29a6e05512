"""ppc pv (PR): KVM without hardware support; the host keeps shadow entries in its own 32-bit hashed page table.

A shadow entry is two big-endian words; eight make a group, chosen by a hash:

===================  =========================================================================
word, mask           meaning
===================  =========================================================================
0: 0x80000000        V, valid
0: 0x7fffff80        VSID, the virtual segment id
0: 0x40              H, the entry lies in its secondary group
0: 0x3f              API, the top six bits of the page's number in its 256 MiB segment
1: 0xfffff000        RPN, the real page
1: 0x100, 0x080      R and C, always set by the host
1: 0x010             M, memory coherence
1: 0x003             PP: 2 read-write, 3 read-only
===================  =========================================================================

A page is marked dirty when an entry that permits writing is made for it. Reading the log drops **all the slot's shadow
entries**, so that the next write to any page needs a new one. Only stores get an entry that permits writing here; the kernel
gives one to loads of writable pages too, and so reports pages that were only read.

Sources: PowerPC Programming Environments Manual, 7.6 (hashed page tables); Linux arch/powerpc/kvm/book3s_32_mmu_host.c
(kvmppc_mmu_map_page), arch/powerpc/kvm/book3s_mmu_hpte.c (kvmppc_mmu_pte_pflush), arch/powerpc/kvm/book3s_pr.c
(kvm_vm_ioctl_get_dirty_log_pr).
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.emulated.hashed import GROUP, HashedTable
from dirtylog.emulated.port import PAGE_SHIFT, SoftwareSyncPort, Translation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dirtylog.emulated.port import TlbOwner
    from dirtylog.memslot import MemorySlot, SlotTable

VALID = 0x8000_0000
SECONDARY = 0x40
REAL_PAGE = 0xFFFF_F000
REFERENCED = 0x100
CHANGED = 0x080
COHERENT = 0x010
PP_READ_WRITE = 2
PP_READ_ONLY = 3
PP_MASK = 3

FIRST_VSID = 0x1000
# With more than this share of the table in use all of it is dropped, which takes less time, and costs other slots a fault a page.
_MANY = 16
NGROUPS = 1 << 14  # 1 MiB: a full group loses an entry, which costs a fault and nothing else


def _first_word(gfn: int) -> int:
    return VALID | FIRST_VSID + (gfn >> 16) << 7 | (gfn & 0xFFFF) >> 10


def _hash(gfn: int) -> int:
    return FIRST_VSID + (gfn >> 16) ^ gfn & 0xFFFF


class PpcPvPort(SoftwareSyncPort):
    """Shadow HPT: a page is marked when it gets an entry that permits writing; the flush drops the slot's entries."""

    name = "ppc-pv"
    how = "dropped shadow entries"
    isa = "ppc32"
    max_gfn = 1 << 20
    max_host_address = 1 << 32

    def __init__(self, slots: SlotTable, vcpus: Sequence[TlbOwner]) -> None:
        super().__init__(slots, vcpus)
        self.table = HashedTable(4, NGROUPS, tag=_first_word, hash_of=_hash, secondary=SECONDARY)
        # The entries in use, so that dropping them costs what is mapped: KVM keeps lists for the same reason.
        self._used = array("q")

    def translate(self, vcpu: int, gfn: int, write: bool) -> Translation | None:  # noqa: ARG002, FBT001 - as declared
        """Search the shadow entries; where there is none, or none that permits it, make one."""
        with self.mmu_lock:
            if gfn >= self.max_gfn:  # the hash would take it for another frame
                return None
            found = self.table.find(gfn)
            if found is None or (write and found[1] & PP_MASK != PP_READ_WRITE):
                second = self._map(gfn, write, found)
                if second is None:
                    return None
            else:
                second = found[1]
            return second & REAL_PAGE, second & PP_MASK == PP_READ_WRITE

    def sync_dirty_log(self, slot: MemorySlot) -> None:
        """Nothing to do: pages are marked as they are mapped."""

    def start_logging(self, slot: MemorySlot) -> None:
        """Drop the slot's entries. The flush that follows does so again: this one is under the same lock as the new bitmap."""
        self.unmap(slot)

    def stop_logging(self, slot: MemorySlot) -> None:
        """Nothing to do: entries without permission get it at the next store."""

    def unmap(self, slot: MemorySlot) -> None:
        """Drop the slot's shadow entries."""
        if len(self._used) > len(self.table.frames) // _MANY:
            self.table.clear()
            self._used = array("q")
            return
        used = np.array(self._used)
        gfns = self.table.frames[used]
        here = (gfns >= slot.base_gfn) & (gfns < slot.end_gfn)
        self.table.invalidate(used[here])
        self._used = array("q", used[~here].tobytes())

    def flush_tlbs(self, slot: MemorySlot) -> None:
        """Drop the slot's shadow entries, then the translations that were loaded from them."""
        with self.mmu_lock:
            self.unmap(slot)
        super().flush_tlbs(slot)

    def _map(self, gfn: int, write: bool, found: tuple[int, int] | None) -> int | None:  # noqa: FBT001 - hot path
        slot = self.slots.find(gfn)
        if slot is None or (write and slot.readonly):
            return None
        self.stats.faults += 1
        address = slot.host_address + (gfn - slot.base_gfn << PAGE_SHIFT)
        writable = not slot.readonly and (write or slot.dirty_bitmap is None)
        second = address | REFERENCED | CHANGED | COHERENT | (PP_READ_WRITE if writable else PP_READ_ONLY)
        if write and slot.dirty_bitmap is not None:
            slot.dirty_bitmap.mark(gfn - slot.base_gfn)
        if found is not None:
            self.table.set_second(found[0], second)
        else:
            entry = self.table.insert(gfn, second)
            if entry is None:
                # What makes room was logged when it was entered: a translation loaded from it is flushed by the next get.
                group, tag = self.table.primary(gfn)
                self.table.write(group * GROUP, gfn, tag, second)
            else:
                self._used.append(entry)
        return second

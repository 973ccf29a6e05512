"""Each port, and the generic get, broken on purpose: the scenario below must see it, and must find nothing in the real ones.

The scenario keeps a copy of a slot from what the log reports. Stores and host writes come before a get, in the middle of it
(at every place where mmu_lock is not held), and after it; some go through translations that were cached before. In the end
the copy must equal the memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dirtylog import DirtyBitmap
from dirtylog.emulated.arch import PORTS
from dirtylog.emulated.arch.ia64 import Ia64Port
from dirtylog.emulated.arch.s390 import S390Port
from dirtylog.log import get_dirty_log, get_dirty_log_protect, start_logging
from dirtylog.port import ProtectPort
from dirtylog.slotbitmap import SlotBitmap
from scene import SLOT, Scene

if TYPE_CHECKING:
    from collections.abc import Callable

    from dirtylog.emulated.arch.ppc_hv import PpcHvPort
    from dirtylog.emulated.port import SoftwareProtectPort, SoftwareSyncPort
    from dirtylog.words import DirtyWords

    type_of_port = type[SoftwareProtectPort | SoftwareSyncPort]
    Middle = Callable[[], None]
    Get = Callable[[Scene, Middle], DirtyBitmap]

HOT, COLD, HOST, FRESH, LAST = 3, 70, 64, 100, 130


def real_get(scene: Scene, middle: Middle) -> DirtyBitmap:
    """The generic function that goes with the port; the middle comes when the snapshot is copied, before the flush."""
    result = DirtyBitmap(scene.slot.npages)

    def copy(snapshot: DirtyBitmap) -> None:
        result.assign(snapshot)
        middle()

    get = get_dirty_log_protect if isinstance(scene.memory.port, ProtectPort) else get_dirty_log
    get(scene.memory, SLOT, copy)
    return result


def lost_pages(port: type_of_port, get: Get = real_get) -> set[int]:
    scene = Scene(port)
    # Mapped and written before logging starts, so that translations are cached and blocks or entries exist.
    for page in (HOT, COLD, HOST, LAST, 0, 1):
        scene.store(page)
    start_logging(scene.memory, SLOT)
    scene.copy = scene.contents()
    scene.store(HOT)
    scene.store(LAST, vcpu=1)
    scene.consume(get(scene, lambda: _write_in_the_middle(scene)))
    scene.store(HOT)
    scene.store(HOT, vcpu=1)
    scene.store(LAST)
    scene.store(COLD + 1, vcpu=1)
    scene.consume(get(scene, lambda: None))
    scene.store(HOT)
    scene.store(COLD, vcpu=1)
    scene.store(FRESH)
    scene.consume(real_get(scene, lambda: None))
    return scene.lost()


def _write_in_the_middle(scene: Scene) -> None:
    scene.store(HOT, vcpu=1)  # in the snapshot, by a vCPU without a translation for it
    scene.store(COLD)  # not in the snapshot
    scene.host_write(HOST)


@pytest.mark.parametrize("name", PORTS)
def test_the_real_ports_lose_nothing(name: str) -> None:
    assert lost_pages(PORTS[name]) == set()


# --- the order of the generic steps


def protect_before_clear(scene: Scene, middle: Middle) -> DirtyBitmap:
    """KVM's bug of 2010: the pages are protected, and only then their bits are cleared."""
    port, bitmap = scene.memory.port, scene.slot.dirty_bitmap
    assert bitmap is not None
    assert isinstance(port, ProtectPort)
    result = DirtyBitmap(scene.slot.npages)
    with scene.memory.slots.lock:
        port.sync_dirty_log(scene.slot)
        with port.mmu_lock:
            words = bitmap.read()
            port.enable_log_dirty(scene.slot, words)
        middle()
        with port.mmu_lock:
            bitmap.exchange()
            bitmap.commit()
        result.set_words(words)
        port.flush_tlbs(scene.slot)
    return result


def copy_then_wipe(scene: Scene, middle: Middle) -> DirtyBitmap:
    """Copy and memset, which KVM had on mips until 2016: what is set in between is wiped."""
    port, bitmap = scene.memory.port, scene.slot.dirty_bitmap
    assert bitmap is not None
    result = DirtyBitmap(scene.slot.npages)
    with scene.memory.slots.lock:
        port.sync_dirty_log(scene.slot)
        with port.mmu_lock:
            words = bitmap.read()
        middle()
        with port.mmu_lock:
            bitmap.exchange()
            bitmap.commit()
            if isinstance(port, ProtectPort):
                port.enable_log_dirty(scene.slot, words)
        result.set_words(words)
        port.flush_tlbs(scene.slot)
    return result


def never_protect(scene: Scene, middle: Middle) -> DirtyBitmap:
    """Take the snapshot and forget step 2."""
    port, bitmap = scene.memory.port, scene.slot.dirty_bitmap
    assert bitmap is not None
    result = DirtyBitmap(scene.slot.npages)
    port.sync_dirty_log(scene.slot)
    with port.mmu_lock:
        result.set_words(bitmap.exchange())
        bitmap.commit()
    middle()
    port.flush_tlbs(scene.slot)
    return result


PROTECT_PORTS = [name for name, port in PORTS.items() if issubclass(port, ProtectPort)]


@pytest.mark.parametrize("name", PROTECT_PORTS)
def test_protect_before_clear_is_caught(name: str) -> None:
    assert lost_pages(PORTS[name], protect_before_clear)


@pytest.mark.parametrize("name", PORTS)
def test_copy_then_wipe_is_caught(name: str) -> None:
    assert HOST in lost_pages(PORTS[name], copy_then_wipe)


@pytest.mark.parametrize("name", PROTECT_PORTS)
def test_a_get_that_does_not_re_arm_is_caught(name: str) -> None:
    assert lost_pages(PORTS[name], never_protect)


# --- the ports


def mutant(name: str, **changes: Any) -> type_of_port:
    """Return a port with some methods replaced."""
    port: type_of_port = type(f"Broken{PORTS[name].__name__}", (PORTS[name],), changes)
    return port


@pytest.mark.parametrize("name", PORTS)
def test_no_flush_is_caught(name: str) -> None:
    assert lost_pages(mutant(name, flush_tlbs=lambda _self, _slot: None))


def mark_the_neighbour(name: str) -> type_of_port:
    """The right page is armed, but the bit of the page after it is set."""

    class Neighbour(PORTS[name]):  # type: ignore[misc, valid-type]  # the base is chosen at run time
        def translate(self, vcpu: int, gfn: int, write: bool) -> Any:
            slot = self.slots.find(gfn)
            before = DirtyBitmap(slot.npages)
            if slot.dirty_bitmap is not None:
                before.set_words(slot.dirty_bitmap.read())
            found = super().translate(vcpu, gfn, write)
            if slot.dirty_bitmap is not None:
                after = DirtyBitmap(slot.npages)
                after.set_words(slot.dirty_bitmap.read())
                fresh = (after - before).pages()
                slot.dirty_bitmap.exchange()
                slot.dirty_bitmap.commit()
                before.set_pages((fresh + 1) % slot.npages)
                slot.dirty_bitmap.merge(before.nonzero_words())
            return found

    return Neighbour


@pytest.mark.parametrize("name", ["x86", "arm", "arm64", "mips", "riscv", "loongarch", "ppc-pv"])
def test_the_wrong_bit_of_the_bitmap_is_caught(name: str) -> None:
    """The ports that mark the bitmap on a fault; the others' logs are below."""
    assert lost_pages(mark_the_neighbour(name))


WRONG_BITS = {"x86": 1 << 58, "arm": 1 << 10, "arm64": 1 << 6, "mips": 1 << 2, "riscv": 1 << 7, "loongarch": 1 << 9}
"""A bit beside the one that lets a store through: MMU-writable, access flag, read, accessed, dirty, software writeable."""


@pytest.mark.parametrize("name", WRONG_BITS)
def test_taking_the_wrong_bit_of_the_entry_is_caught(name: str) -> None:
    def enable_log_dirty(self: Any, slot: Any, words: Any) -> None:
        for entries in self.tables.locate(words.pages() + slot.base_gfn):
            self.tables.memory.words[entries] &= np.uint64(~WRONG_BITS[name] & (1 << 64) - 1)

    assert lost_pages(mutant(name, enable_log_dirty=enable_log_dirty))


def test_x86_pml_clearing_the_accessed_bit_instead_of_dirty_is_caught() -> None:
    def clean(self: Any, gfns: Any) -> None:
        leaves, _ = self.tables.locate(gfns)
        self.tables.memory.words[leaves] &= np.uint64(~(1 << 8) & (1 << 64) - 1)

    assert lost_pages(mutant("x86-pml", _clean=clean))


def test_x86_pml_that_is_not_drained_is_caught() -> None:
    assert lost_pages(mutant("x86-pml", sync_dirty_log=lambda _self, _slot: None))


def test_s390_protecting_with_the_wrong_bit_is_caught() -> None:
    def collect(self: Any, slot: Any, bitmap: Any) -> None:
        tables = self.tables
        self.tables = WrongBit(tables)
        S390Port._collect(self, slot, bitmap)
        self.tables = tables

    class WrongBit:
        """The port's tables, but for what takes the permission: it sets 0x100 for 0x200."""

        def __init__(self, tables: Any) -> None:
            self._tables = tables

        def __getattr__(self, name: str) -> Any:
            return getattr(self._tables, name)

        def revoke_entries(self, index: Any) -> None:
            self._tables.memory.words[index] |= np.uint64(0x100)

    assert lost_pages(mutant("s390", _collect=collect))


def test_ppc_hv_reading_referenced_instead_of_changed_is_caught() -> None:
    def collect(self: Any, slot: Any, bitmap: Any) -> None:
        referenced = self._bytes(14)  # R is 0x100: the low bit of the byte before C's
        entries = np.flatnonzero(referenced & 1)
        if bitmap is not None:
            bitmap.merge(_words(self.table.frames[entries] - slot.base_gfn))
        referenced[entries] &= np.uint8(0xFE)

    assert lost_pages(mutant("ppc-hv", _collect=collect))


def test_ppc_hv_that_does_not_force_c_of_a_paused_guest_is_caught() -> None:
    def write_back_late(self: PpcHvPort) -> None:
        for late in self._late.values():
            self._set_changed(late.old)
            late.old, late.young = late.young, set()

    assert lost_pages(mutant("ppc-hv", _write_back_late=write_back_late))


def test_ia64_that_sets_the_wrong_bit_of_the_area_is_caught() -> None:
    def collect(self: Any, slot: Any, bitmap: Any) -> None:
        right = SlotBitmap(slot.npages)
        Ia64Port._collect(self, slot, right)
        if bitmap is not None:
            bitmap.merge(_words((right.read().pages() + 1) % slot.npages))

    assert lost_pages(mutant("ia64", _collect=collect))


def wiping(port: Any) -> Any:
    """Return a sync that clears the hardware's log and marks nothing."""

    def sync(self: Any, slot: Any) -> None:
        with self.mmu_lock:
            port._collect(self, slot, None)

    return sync


@pytest.mark.parametrize("name", ["ppc-hv", "s390", "ia64"])
def test_a_sync_that_wipes_without_marking_is_caught(name: str) -> None:
    assert lost_pages(mutant(name, sync_dirty_log=wiping(PORTS[name])))


@pytest.mark.parametrize("name", ["ppc-pv", "ia64"])
def test_translations_that_outlive_the_log_read_are_caught(name: str) -> None:
    """These ports must drop shadow entries, or purge, not only the TLBs."""

    def flush_only(self: Any, _slot: Any) -> None:
        for vcpu in self.vcpus:
            vcpu.request_flush()

    assert lost_pages(mutant(name, flush_tlbs=flush_only))


def _words(pages: Any) -> DirtyWords:
    return DirtyBitmap.from_pages(1 << 20, pages).nonzero_words()

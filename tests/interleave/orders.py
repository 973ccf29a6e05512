"""Gets that do the four steps in another order, or leave one out; and ports that log a page at the wrong moment."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from dirtylog import DirtyBitmap
from dirtylog.emulated.arch.x86 import X86Port
from dirtylog.port import ProtectPort

if TYPE_CHECKING:
    from collections.abc import Callable

    from dirtylog import MemorySlot
    from dirtylog.emulated.port import RadixProtectPort
    from dirtylog.slotbitmap import SlotBitmap
    from dirtylog.words import DirtyWords
    from interleave.explorer import Run
    from interleave.scenes import GuestScene

    Copy = Callable[[DirtyBitmap], None]


def _bitmap(scene: GuestScene) -> SlotBitmap:
    assert scene.slot.dirty_bitmap is not None
    return scene.slot.dirty_bitmap


def _take(scene: GuestScene) -> DirtyWords:
    """Make steps 1 and 2 as they should be, whichever kind of port it is."""
    port = scene.memory.port
    port.sync_dirty_log(scene.slot)
    with port.mmu_lock:
        words = _bitmap(scene).exchange()
        if isinstance(port, ProtectPort):
            port.enable_log_dirty(scene.slot, words)
    return words


def _pages(scene: GuestScene, words: DirtyWords) -> DirtyBitmap:
    return DirtyBitmap.from_words(scene.slot.npages, words)


def flush_then_copy(scene: GuestScene, copy: Copy) -> None:
    """Exchange steps 3 and 4."""
    with scene.memory.slots.lock:
        words = _take(scene)
        if words:
            scene.memory.port.flush_tlbs(scene.slot)
        copy(_pages(scene, words))
        _bitmap(scene).commit()


def flush_after_slots_lock(scene: GuestScene, copy: Copy) -> None:
    """Let slots_lock go before the flush, to hold it for less long."""
    with scene.memory.slots.lock:
        words = _take(scene)
        pages = _pages(scene, words)
        copy(pages)
        _bitmap(scene).commit()
    if pages:
        scene.memory.port.flush_tlbs(scene.slot)


def no_flush(scene: GuestScene, copy: Copy) -> None:
    """Leave step 4 out."""
    with scene.memory.slots.lock:
        copy(_pages(scene, _take(scene)))
        _bitmap(scene).commit()


def protect_before_clear(scene: GuestScene, copy: Copy) -> None:
    """Protect, and clear later (KVM on x86, until edde99ce0529)."""
    port, bitmap = scene.memory.port, _bitmap(scene)
    assert isinstance(port, ProtectPort)
    with scene.memory.slots.lock:
        with port.mmu_lock:
            words = bitmap.read()
            port.enable_log_dirty(scene.slot, words)
        with port.mmu_lock:
            bitmap.exchange()
            bitmap.commit()
        copy(_pages(scene, words))
        port.flush_tlbs(scene.slot)


def copy_then_wipe(scene: GuestScene, copy: Copy) -> None:
    """Copy the bitmap, and wipe it in a second step (KVM on mips and others, until the generic function)."""
    port, bitmap = scene.memory.port, _bitmap(scene)
    assert isinstance(port, ProtectPort)
    with scene.memory.slots.lock:
        with port.mmu_lock:
            words = bitmap.read()
        copy(_pages(scene, words))
        with port.mmu_lock:
            bitmap.exchange()
            bitmap.commit()
            port.enable_log_dirty(scene.slot, words)
        port.flush_tlbs(scene.slot)


def flush_if_changed(scene: GuestScene, copy: Copy) -> None:
    """Flush only if a permission was taken away just now."""
    port = scene.memory.port
    assert isinstance(port, ProtectPort)
    with scene.memory.slots.lock:
        with port.mmu_lock:
            words = _bitmap(scene).exchange()
            changed = any(writable(scene, page) for page in _pages(scene, words).pages().tolist())
            port.enable_log_dirty(scene.slot, words)
        copy(_pages(scene, words))
        _bitmap(scene).commit()
        if changed:
            port.flush_tlbs(scene.slot)


def writable(scene: GuestScene, page: int) -> bool:
    """Return whether the tables let a page be written."""
    tables = cast("RadixProtectPort", scene.memory.port).tables
    form = tables.format
    entry = tables.walk(scene.slot.base_gfn + page)[1]
    return bool(entry & form.present and entry & (form.write | form.protect) == form.write)


def protect_for_another_reason(scene: GuestScene) -> None:
    """Take the permission of page 0 away, as KVM does of a page that the guest makes a page table, and flush somewhat later."""
    port = scene.memory.port
    assert isinstance(port, ProtectPort)
    words = DirtyBitmap(scene.slot.npages)
    words.set_range(0, 1)
    with port.mmu_lock:
        port.enable_log_dirty(scene.slot, words.nonzero_words())
    scene.run.step("puts its flush off")
    port.flush_tlbs(scene.slot)


# --- ports: when a page is logged


class MarksAfterMapping(X86Port):
    """Gives the permission, lets mmu_lock go, and logs the page then."""

    run: Run
    _late: list[tuple[SlotBitmap, int]]

    def translate(self, vcpu: int, gfn: int, write: bool) -> tuple[int, bool] | None:
        self._late = []
        found = super().translate(vcpu, gfn, write)
        for bitmap, page in self._late:
            self._mark(bitmap, page)
        return found

    def _log_write(self, slot: MemorySlot, bitmap: SlotBitmap, gfn: int, offset: int) -> None:  # noqa: ARG002 - as declared
        self._late.append((bitmap, gfn - slot.base_gfn))

    def _mark(self, bitmap: SlotBitmap, page: int) -> None:
        with self.mmu_lock:
            bitmap.mark(page)


class MarksWithoutLock(MarksAfterMapping):
    """Logs the page before it gives the permission, but without mmu_lock: it loads the word, sets the bit, and stores the word."""

    def translate(self, vcpu: int, gfn: int, write: bool) -> tuple[int, bool] | None:
        slot = self.slots.find(gfn)
        if write and slot is not None and slot.dirty_bitmap is not None:
            self._mark(slot.dirty_bitmap, gfn - slot.base_gfn)
        return X86Port.translate(self, vcpu, gfn, write)

    def _log_write(self, slot: MemorySlot, bitmap: SlotBitmap, gfn: int, offset: int) -> None:
        pass

    def _mark(self, bitmap: SlotBitmap, page: int) -> None:
        # What is guarded by mmu_lock is touched: that is what the steps depend on.
        self.run.step(f"loads the word of page {page} from the bitmap", writes=["mmu_lock"])
        word = bitmap._current_view[page >> 6]
        self.run.step(f"stores the word with the bit of page {page}", writes=["mmu_lock"])
        bitmap._current_view[page >> 6] = word | 1 << (page & 63)
        bitmap._flags_view[page >> 6] = True


def tell_port(scene: GuestScene) -> None:
    """Let a port of this file make steps."""
    cast("MarksAfterMapping", scene.memory.port).run = scene.run

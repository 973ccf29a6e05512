"""The error table: which errno, in which order of checks, and that nothing is lost on any of them."""

from __future__ import annotations

import errno
import itertools
import mmap
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dirtylog import (
    BadSlotError,
    CopyFaultError,
    DirtyBitmap,
    DirtyLog,
    InvalidArgumentError,
    LoggingOffError,
    UnsupportedError,
)
from dirtylog.emulated.arch import PORTS
from dirtylog.emulated.arch.x86 import X86Port
from dirtylog.port import ProtectPort
from interrupts import interrupt
from scene import NPAGES, SLOT, Scene

if TYPE_CHECKING:
    from collections.abc import Callable

    from dirtylog import MemorySlot

PROTECT_PORTS = [name for name, port in PORTS.items() if issubclass(port, ProtectPort)]


@pytest.mark.parametrize("slot", [-1, 32764, 0xFFFF, 1 << 16, 1 << 40])
def test_a_slot_id_out_of_range_is_einval_even_when_logging_is_off(slot: int) -> None:
    log = DirtyLog(Scene(X86Port).memory)
    for call in (lambda: log.get(slot), lambda: log.clear(slot, 1, DirtyBitmap(1))):
        with pytest.raises(BadSlotError) as caught:
            call()
        assert caught.value.errno == errno.EINVAL
        assert caught.value.slot == slot


def test_no_slot_and_logging_off_are_enoent_before_a_bad_range_is_looked_at() -> None:
    log = DirtyLog(Scene(X86Port).memory)
    calls: list[Callable[[], object]] = [
        lambda: log.get(SLOT),
        lambda: log.get(7),
        lambda: log.clear(SLOT, 1, DirtyBitmap(1)),
        lambda: log.clear(7, 1, DirtyBitmap(1)),
    ]
    for call in calls:
        with pytest.raises(LoggingOffError) as caught:
            call()
        assert caught.value.errno == errno.ENOENT


class RingOnlyPort(X86Port):
    """A ring without a bitmap."""

    has_bitmap = False


def test_a_ring_without_a_bitmap_is_enxio_after_einval_and_enoent() -> None:
    log = DirtyLog(Scene(RingOnlyPort).memory)
    with pytest.raises(BadSlotError):
        log.get(-1)
    with pytest.raises(LoggingOffError):
        log.get(SLOT)
    with log:
        for call in (lambda: log.get(SLOT), lambda: log.clear(SLOT, 1, DirtyBitmap(1))):
            with pytest.raises(UnsupportedError) as caught:
                call()
            assert caught.value.errno == errno.ENXIO


# NPAGES is 131: three words, the last of three pages.
BAD_RANGES = [
    (1, 64),
    (63, 64),
    (65, 66),
    (0, 63),
    (0, 65),
    (64, 1),
    (64, 66),
    (128, 2),
    (0, 192),
    (128, 4),
    (192, 0),
    (1 << 62, 64),
    (-64, 64),
]
GOOD_RANGES = [(0, 64), (0, 128), (0, 131), (64, 64), (64, 67), (128, 3), (0, 0), (64, 0), (128, 0)]


@pytest.mark.parametrize(("first", "npages"), BAD_RANGES)
def test_a_misaligned_or_too_long_clear_is_einval_and_clears_nothing(first: int, npages: int) -> None:
    scene = Scene(X86Port)
    with DirtyLog(scene.memory, manual_protect=True) as log:
        scene.store(0)
        scene.store(130)
        mask = DirtyBitmap(npages)
        mask.set_range(0, npages)
        with pytest.raises(InvalidArgumentError) as caught:
            log.clear(SLOT, first, mask)
        assert caught.value.errno == errno.EINVAL
        assert log.get(SLOT) == DirtyBitmap.from_pages(NPAGES, [0, 130])


@pytest.mark.parametrize(("first", "npages"), GOOD_RANGES)
@pytest.mark.parametrize("name", PROTECT_PORTS)
def test_a_clear_takes_just_its_range(name: str, first: int, npages: int) -> None:
    scene = Scene(PORTS[name])
    with DirtyLog(scene.memory, manual_protect=True) as log:
        for page in range(NPAGES):
            scene.store(page)
        mask = DirtyBitmap(npages)
        mask.set_range(0, npages)
        log.clear(SLOT, first, mask)
        left = DirtyBitmap.from_pages(NPAGES, [page for page in range(NPAGES) if not first <= page < first + npages])
        assert log.get(SLOT) == left
        scene.store(first)
        scene.store(min(first + max(npages, 1) - 1, NPAGES - 1))
        assert min(first + max(npages, 1) - 1, NPAGES - 1) in log.get(SLOT), "what was cleared is armed again"


@pytest.mark.parametrize("name", PROTECT_PORTS)
def test_a_clear_touches_only_bits_that_are_dirty(name: str) -> None:
    """Set bits that are not dirty, and bits past the end, do nothing; dirty bits outside the mask survive."""
    scene = Scene(PORTS[name])
    with DirtyLog(scene.memory, manual_protect=True) as log:
        scene.store(3)
        scene.store(64)
        seen = log.get(SLOT)
        scene.store(70)  # between the get and the clear
        mask = DirtyBitmap.from_pages(NPAGES, [*seen.pages().tolist(), 99])
        mask.words[-1] |= np.uint64(1) << np.uint64(63)  # past the end, which the kernel ignores too
        log.clear(SLOT, 0, mask)
        assert log.get(SLOT) == DirtyBitmap.from_pages(NPAGES, [70])
        scene.store(99)
        assert log.get(SLOT) == DirtyBitmap.from_pages(NPAGES, [70, 99])


@pytest.mark.parametrize("name", PROTECT_PORTS)
def test_clear_works_in_automatic_mode_too(name: str) -> None:
    scene = Scene(PORTS[name])
    with DirtyLog(scene.memory) as log:
        scene.store(3)
        scene.store(5)
        log.clear(SLOT, 0, DirtyBitmap.from_pages(NPAGES, [3]))
        assert log.get(SLOT) == DirtyBitmap.from_pages(NPAGES, [5])


def unwritable(npages: int) -> DirtyBitmap:
    """Return a bitmap whose words lie in memory that may not be written: the place that copy_to_user fails on."""
    bitmap = DirtyBitmap(npages)
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ)
    bitmap._words = np.frombuffer(page, np.uint64)[: len(bitmap.words)]
    return bitmap


@pytest.mark.parametrize("name", PORTS)
def test_a_copy_that_faults_loses_nothing_and_flushes(name: str) -> None:
    scene = Scene(PORTS[name])
    with DirtyLog(scene.memory) as log:
        consumer = log.consumer("other")
        scene.store(3)
        scene.store(130, vcpu=1)
        flushes = scene.memory.stats.flushes
        with pytest.raises(CopyFaultError) as caught:
            log.get(SLOT, out=unwritable(NPAGES))
        assert caught.value.errno == errno.EFAULT
        assert caught.value.slot == SLOT
        assert isinstance(caught.value.__cause__, ValueError)
        assert scene.memory.stats.flushes > flushes
        assert all(not vcpu.cpu._tlb for vcpu in scene.vcpus), "the translations that were cached are gone"
        scene.store(3)
        scene.store(7)
        assert log.get(SLOT) == DirtyBitmap.from_pages(NPAGES, [3, 7, 130])
        with consumer.epoch() as epoch:
            assert epoch.dirty[SLOT] == DirtyBitmap.from_pages(NPAGES, [3, 7, 130])


@pytest.mark.parametrize("name", PORTS)
def test_an_interrupt_in_the_middle_of_a_get_loses_nothing(name: str) -> None:
    """Ctrl-C may come anywhere: here while the snapshot is being copied, and while the TLBs are being flushed."""
    scene = Scene(PORTS[name])
    with DirtyLog(scene.memory) as log:
        scene.store(3)

        class Interrupted(DirtyBitmap):
            def assign(self, _words: object) -> None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            log.get(SLOT, out=Interrupted(NPAGES))
        scene.store(4)

        flush = scene.memory.port.flush_tlbs
        calls = iter([KeyboardInterrupt])

        def interrupted_flush(slot: MemorySlot) -> None:
            flush(slot)
            for error in calls:
                raise error

        scene.memory.port.flush_tlbs = interrupted_flush  # type: ignore[method-assign]  # once, it is interrupted
        with pytest.raises(KeyboardInterrupt):
            log.get(SLOT)
        scene.store(5)
        assert log.get(SLOT) == DirtyBitmap.from_pages(NPAGES, [3, 4, 5])


def test_an_out_bitmap_of_another_length_is_refused_before_anything_is_taken() -> None:
    scene = Scene(X86Port)
    with DirtyLog(scene.memory) as log:
        scene.store(3)
        with pytest.raises(InvalidArgumentError, match="130 pages"):
            log.get(SLOT, out=DirtyBitmap(130))
        out = DirtyBitmap.from_pages(NPAGES, [99])
        assert log.get(SLOT, out=out) is out
        assert out == DirtyBitmap.from_pages(NPAGES, [3]), "the whole of out is overwritten"


def test_initially_all_set_without_manual_protect_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="manual_protect"):
        DirtyLog(Scene(X86Port).memory, initially_all_set=True)


def test_a_second_log_of_one_memory_is_refused() -> None:
    scene = Scene(X86Port)
    with DirtyLog(scene.memory) as log:
        with pytest.raises(InvalidArgumentError, match="logged already"):
            DirtyLog(scene.memory).start()
        scene.store(1)
        assert log.get(SLOT).count() == 1


def test_a_port_that_lacks_a_hook_cannot_be_constructed() -> None:
    class NoProtection(ProtectPort):
        name = "no-protection"

        def start_logging(self, slot: object) -> None: ...

        def stop_logging(self, slot: object) -> None: ...

        def flush_tlbs(self, slot: object) -> None: ...

    with pytest.raises(TypeError, match="enable_log_dirty"):
        NoProtection()  # type: ignore[abstract]  # that is the point


@pytest.mark.parametrize("name", PORTS)
def test_a_get_that_is_interrupted_at_any_point_loses_nothing(name: str) -> None:
    """What the interrupted get has not delivered, the next one has; and every page is armed again."""
    for step in itertools.count():
        scene = Scene(PORTS[name])
        log = DirtyLog(scene.memory)
        log.start()
        for page in (3, 64, 130):
            scene.store(page)
        scene.host_write(5)
        out = DirtyBitmap(NPAGES)
        interrupted = interrupt(lambda log=log, out=out: log.get(SLOT, out), step)  # type: ignore[misc]  # bound early
        found = log.get(SLOT) | out
        assert found == DirtyBitmap.from_pages(NPAGES, [3, 5, 64, 130]), f"interrupted at point {step}"
        for page in (3, 64, 130):
            scene.store(page)
        assert log.get(SLOT) == DirtyBitmap.from_pages(NPAGES, [3, 64, 130]), f"interrupted at point {step}: not armed again"
        if not interrupted:
            break
    assert step > 30, "the points were not seen"

"""The kernel's three logs on real KVM, step by step: what is reported is what was stored, and nothing gets lost on the way."""

from __future__ import annotations

import contextlib
import itertools
import mmap
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dirtylog import CopyFaultError, DirtyBitmap, DirtyLog, InvalidArgumentError, LoggingOffError, SlotFlags, UnsupportedError
from dirtylog.guests.programs import Pattern
from dirtylog.kvm.guest import HIGH_RAM_SLOT, make_kvm_guest
from dirtylog.kvm.memory import KvmMemory
from dirtylog.options import Backing, KvmOptions, Log
from interrupts import interrupt
from kvm_here import needs_kvm
from kvm_scene import LOGS, NPAGES, ROM_SLOT, KvmScene

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs_kvm
RAM = 0
every_log = pytest.mark.parametrize("log", LOGS)


@every_log
@pytest.mark.parametrize("npages", [1, 3, 40, 63, 64, 65, 131, 1024, 1027, 1087, 4096])
def test_the_log_is_exactly_what_the_guest_stored(log: str, npages: int) -> None:
    generator = np.random.default_rng(npages)
    with KvmScene(log, npages=npages) as scene, DirtyLog(scene.memory) as dirty_log:
        assert not dirty_log.get(RAM).any(), "nothing was stored yet"
        for _ in range(4):
            pages = np.unique(generator.integers(0, npages, min(npages, 20))).tolist()
            scene.stores(pages, vcpu=int(generator.integers(2)))
            assert dirty_log.get(RAM).pages().tolist() == pages
            assert not dirty_log.get(RAM).any(), "a second get finds nothing"
        scene.loop(Pattern(base=0, mask=(1 << npages.bit_length() - 1) - 1, count=npages))
        assert dirty_log.get(RAM).runs().tolist() == [[0, 1 << npages.bit_length() - 1]]
        assert not dirty_log.get(ROM_SLOT).any(), "the guest's tables and program are read-only"


@every_log
def test_two_vcpus_on_two_slots(log: str) -> None:
    """Slots with other ids and bases, behind the hole: every entry finds its slot by the whole of its id."""
    with KvmScene(log) as scene:
        high = scene.memory.add_slot(300, 1 << 20, 70)
        with DirtyLog(scene.memory) as dirty_log:
            scene.store(130, vcpu=0)
            scene.loop(Pattern(base=high.base_gfn << 12, mask=31, count=20), vcpu=1)
            assert dirty_log.get(RAM).pages().tolist() == [130]
            assert dirty_log.get(300).runs().tolist() == [[0, 20]]
            scene.loop(Pattern(base=(high.base_gfn + 69) << 12, count=1), vcpu=0)
            assert not dirty_log.get(RAM).any()
            assert dirty_log.get(300).pages().tolist() == [69]


@every_log
def test_what_this_process_writes_is_in_the_log(log: str, tmp_path: Path) -> None:
    """The kernel does not see it: Memory.write, and a device that reads a file into guest memory."""
    source = tmp_path / "disk"
    source.write_bytes(bytes(range(1, 251)) * 40)
    with KvmScene(log) as scene, DirtyLog(scene.memory) as dirty_log, source.open("rb", buffering=0) as disk:
        consumer = dirty_log.consumer("other")
        scene.host_write(7)
        scene.store(8)
        with scene.memory.host_write((64 << 12) - 5, 10) as view:
            assert disk.readinto(view) == 10
        assert dirty_log.get(RAM).pages().tolist() == [7, 8, 63, 64]
        assert scene.memory.read(RAM, [63])[0, -5:].tolist() == [1, 2, 3, 4, 5]
        with contextlib.suppress(OSError), scene.memory.host_write(3 << 12, 1) as view:
            view[0] = 1
            raise OSError
        with scene.memory.host_write(5 << 12, 0):
            pass
        assert dirty_log.get(RAM).pages().tolist() == [3], "what a device wrote before it failed is written"
        with consumer.epoch() as epoch:
            assert epoch.dirty[RAM].pages().tolist() == [3, 7, 8, 63, 64]


@every_log
def test_a_get_in_the_middle_of_a_host_write_does_not_take_its_bit(log: str) -> None:
    with KvmScene(log) as scene, DirtyLog(scene.memory) as dirty_log:
        with scene.memory.host_write(9 << 12, 4096) as view:
            scene.consume(dirty_log.get(RAM))
            view[:] = bytes([5]) * 4096
        scene.consume(dirty_log.get(RAM))
        assert not scene.lost()


def test_host_writes_outside_memory_are_refused() -> None:
    with KvmScene("bitmap") as scene:
        for address, nbytes in ((NPAGES << 12, 1), ((NPAGES << 12) - 4, 8), (1 << 50, 1)):
            with (
                pytest.raises(InvalidArgumentError, match=f"{address:#x} cannot be written"),
                scene.memory.host_write(address, nbytes),
            ):
                pass


def unwritable(npages: int) -> DirtyBitmap:
    bitmap = DirtyBitmap(npages)
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ)
    bitmap._words = np.frombuffer(page, np.uint64)[: len(bitmap.words)]
    return bitmap


@every_log
def test_a_copy_that_faults_loses_nothing(log: str) -> None:
    with KvmScene(log) as scene, DirtyLog(scene.memory) as dirty_log:
        scene.stores([3, 130])
        scene.host_write(4)
        with pytest.raises(CopyFaultError):
            dirty_log.get(RAM, out=unwritable(NPAGES))
        scene.stores([3, 7])
        assert dirty_log.get(RAM).pages().tolist() == [3, 4, 7, 130]
        scene.store(3)
        assert dirty_log.get(RAM).pages().tolist() == [3], "armed again"


@every_log
def test_a_get_that_is_interrupted_at_any_point_loses_nothing(log: str) -> None:
    with KvmScene(log) as scene:
        for step in itertools.count():
            dirty_log = DirtyLog(scene.memory)
            dirty_log.start()
            scene.stores([3, 64, 130])
            scene.host_write(5)
            out = DirtyBitmap(NPAGES)
            interrupted = interrupt(lambda log=dirty_log, out=out: log.get(RAM, out), step)  # type: ignore[misc]  # bound early
            found = dirty_log.get(RAM) | out
            # A ring whose harvest was interrupted has every page reported: the kernel may not have protected all of its own.
            assert found.pages().tolist() == [3, 5, 64, 130] or (log == "ring" and found.count() == NPAGES), f"at point {step}"
            scene.stores([3, 64, 130])
            assert dirty_log.get(RAM).pages().tolist() == [3, 64, 130], f"interrupted at point {step}: not armed again"
            dirty_log.stop()
            if not interrupted:
                break
        assert step > 15, "the points were not seen"


@every_log
def test_logging_switched_off_and_on_starts_afresh(log: str) -> None:
    with KvmScene(log) as scene:
        scene.store(1)
        for _ in range(3):
            with DirtyLog(scene.memory) as dirty_log:
                scene.stores([2, 3])
                assert dirty_log.get(RAM).pages().tolist() == [2, 3]
                scene.store(4)  # nobody takes it
            with pytest.raises(LoggingOffError):
                dirty_log.get(RAM)
            scene.store(5)


@every_log
def test_a_slot_that_moves_keeps_its_contents_and_its_log(log: str) -> None:
    with KvmScene(log) as scene:
        scene.memory.add_slot(5, 1 << 20, 70)
        with DirtyLog(scene.memory) as dirty_log:
            scene.loop(Pattern(base=(1 << 20) + 3 << 12, value=77, count=1))
            scene.memory.move_slot(5, (1 << 20) + 512)
            scene.loop(Pattern(base=(1 << 20) + 512 + 9 << 12, count=1))
            assert dirty_log.get(5).pages().tolist() == [3, 9]
            assert scene.memory.read(5, [3])[0, 0] == 77
            scene.memory.remove_slot(5)
            with pytest.raises(LoggingOffError):
                dirty_log.get(5)
            scene.memory.add_slot(5, 1 << 21, 3, SlotFlags.LOG_DIRTY_PAGES)
            scene.loop(Pattern(base=(1 << 21) + 2 << 12, count=1))
            assert dirty_log.get(5).pages().tolist() == [2]


@pytest.mark.parametrize("backing", [Backing.THP, Backing.MEMFD, Backing.HUGETLB])
@every_log
def test_other_backings_are_logged_page_by_page(log: str, backing: Backing) -> None:
    """Written before logging starts, so that huge mappings exist where they can."""
    options = KvmOptions(log=Log(log), backing=backing)
    everything = Pattern(base=0, mask=1023, count=1024)
    try:
        memory = make_kvm_guest(4 << 20, loops=[everything], options=options)
    except UnsupportedError as error:
        pytest.skip(str(error))
    with memory:
        memory.resume()
        assert memory.wait(timeout=30)
        memory.pause()
        with DirtyLog(memory) as dirty_log:
            for pages in ([3, 511, 512, 1023], list(range(100, 300)), [3]):
                scene_stores(memory, pages)
                assert dirty_log.get(RAM).pages().tolist() == pages


def scene_stores(memory: KvmMemory, pages: list[int]) -> None:
    scene = KvmScene.__new__(KvmScene)
    scene.memory, scene.slot, scene._value = memory, memory.slots[RAM], 0
    scene._entry = memory.slots[ROM_SLOT].base_gfn << 12
    scene._entry += len(memory.architecture.make_rom(0, 4 << 20, b"").data)
    scene.stores(pages)


def test_a_memfd_can_be_mapped_by_others_and_a_buffer_of_the_user_s_can_be_memory() -> None:
    with KvmMemory() as memory:
        memory.add_slot(0, 0, 16, backing=Backing.MEMFD)
        fd = memory.memfd(0)
        assert fd is not None
        with mmap.mmap(fd, 16 << 12) as elsewhere:
            memory.write(0, [2], np.full((1, 4096), 9, np.uint8))
            assert elsewhere[2 << 12] == 9
        buffer = mmap.mmap(-1, 4 << 12)
        memory.add_slot(1, 16, 4, buffer=buffer)
        memory.write(1, [3], np.full((1, 4096), 8, np.uint8))
        assert buffer[3 << 12] == 8
        assert memory.memfd(1) is None


# --- manual protect


def test_a_get_of_manual_protect_changes_nothing_and_clear_takes_what_it_is_given() -> None:
    with KvmScene("manual") as scene, DirtyLog(scene.memory, manual_protect=True) as dirty_log:
        scene.stores([0, 70, 130])
        scene.host_write(71)
        seen = dirty_log.get(RAM)
        assert seen.pages().tolist() == [0, 70, 71, 130]
        assert dirty_log.get(RAM) == seen
        scene.store(72)  # between the get and the clear
        dirty_log.clear(RAM, 64, DirtyBitmap.from_pages(64, [6, 7, 20]))
        assert dirty_log.get(RAM).pages().tolist() == [0, 72, 130]
        dirty_log.clear(RAM, 128, DirtyBitmap.from_pages(3, [0, 1, 2]))
        dirty_log.clear(RAM, 0, seen)
        assert dirty_log.get(RAM).pages().tolist() == [72]
        scene.stores([0, 70, 130])
        assert dirty_log.get(RAM).pages().tolist() == [0, 70, 72, 130], "what was cleared is armed again"
        for first, npages in ((1, 64), (0, 63), (128, 4), (192, 0), (1 << 62, 64)):
            with pytest.raises(InvalidArgumentError):
                dirty_log.clear(RAM, first, DirtyBitmap(npages))


@pytest.mark.parametrize("npages", [3, 64, 131, 1087])
def test_with_all_pages_set_at_first_every_page_and_none_past_the_end_is_dirty(npages: int) -> None:
    with (
        KvmScene("manual", npages=npages) as scene,
        DirtyLog(scene.memory, manual_protect=True, initially_all_set=True) as dirty_log,
    ):
        first = dirty_log.get(RAM)
        assert first.runs().tolist() == [[0, npages]]
        words = np.zeros(len(first.words), np.uint64)
        scene.memory.vm.get_dirty_log(RAM, words)
        assert np.array_equal(words, first.words), "the kernel's own bitmap says the same"
        dirty_log.clear(RAM, 0, first)
        assert not dirty_log.get(RAM).any()
        scene.store(npages - 1)
        assert dirty_log.get(RAM).pages().tolist() == [npages - 1]


@pytest.mark.parametrize("log", ["bitmap", "ring"])
def test_only_the_manual_log_has_manual_protect(log: str) -> None:
    with KvmScene(log) as scene, pytest.raises(UnsupportedError, match="manual protect"):
        DirtyLog(scene.memory, manual_protect=True)


def test_a_clear_of_a_large_slot_goes_to_the_kernel_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 GiB and a bit: pieces of at most 1 GiB, none where nothing is dirty, the last one ends with the slot."""
    npages = (3 << 18) + 5
    with KvmScene("manual") as scene:
        scene.memory.add_slot(9, 1 << 20, npages)
        with DirtyLog(scene.memory) as dirty_log:
            pages = [0, 63, (1 << 18) - 1, 1 << 18, (3 << 18) + 4]
            calls: list[tuple[int, int]] = []
            clear = scene.memory.vm.clear_dirty_log

            def recorded(slot: int, first: int, count: int, words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
                calls.append((first, count))
                clear(slot, first, count, words)

            monkeypatch.setattr(scene.memory.vm, "clear_dirty_log", recorded)
            for _ in range(2):
                for page in pages:
                    scene.loop(Pattern(base=(1 << 20) + page << 12, count=1))
                assert dirty_log.get(9).pages().tolist() == pages
            assert not dirty_log.get(9).any()
            assert calls[:3] == [(0, 1 << 18), (1 << 18, 64), (3 << 18, 5)]


# --- consumers


@every_log
def test_consumers_share_one_log_of_the_kernel_s(log: str) -> None:
    with KvmScene(log) as scene, DirtyLog(scene.memory) as dirty_log:
        first, second = dirty_log.consumer("first"), dirty_log.consumer("second")
        scene.stores([1, 2])
        with first.epoch() as epoch:
            assert epoch.dirty[RAM].pages().tolist() == [1, 2]
        scene.store(3)
        with pytest.raises(RuntimeError), first.epoch() as epoch:
            raise RuntimeError
        with first.epoch() as epoch:
            assert epoch.dirty[RAM].pages().tolist() == [3], "rolled back, and given again"
        with second.epoch() as epoch:
            assert epoch.dirty[RAM].pages().tolist() == [1, 2, 3]
        assert dirty_log.get(RAM).pages().tolist() == [1, 2, 3]


def test_memory_beyond_the_hole_is_a_slot_of_its_own() -> None:
    """3 GiB and a bit: what does not fit below the devices of the fourth GiB begins behind them."""
    high = 4 << 30
    loops = [Pattern(base=high, mask=63, count=64), Pattern(base=(3 << 30) - (8 << 12), mask=7, count=8)]
    with make_kvm_guest((3 << 30) + (4 << 20), vcpus=2, loops=loops) as memory, DirtyLog(memory) as dirty_log:
        assert [(slot.id, slot.base_gfn, slot.npages) for slot in memory.slots if not slot.readonly] == [
            (RAM, 0, 3 << 18),
            (HIGH_RAM_SLOT, 1 << 20, 1024),
        ]
        memory.resume()
        assert memory.wait(timeout=30)
        assert dirty_log.get(RAM).runs().tolist() == [[(3 << 18) - 8, 8]]
        assert dirty_log.get(HIGH_RAM_SLOT).runs().tolist() == [[0, 64]]

"""Checkpoints of every kind of source: what is restored is what was there, and each one is whole."""

from __future__ import annotations

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dirtylog
from dirtylog.checkpoint import segments
from dirtylog.checkpoint.differences import diff
from dirtylog.checkpoint.pages import ZERO, PageMap, pack, unpack
from dirtylog.checkpoint.restore import read_slot
from dirtylog.checkpoint.retention import Keep
from dirtylog.checkpoint.store import Store
from kvm_here import missing_kvm, needs_kvm

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

PAGE = 4096
SPIN = (
    "import time\na = bytearray(4 << 20)\nn = 0\n"
    "while True:\n n += 1\n for i in range(0, len(a), 40960): a[i] = n % 251\n time.sleep(0.001)"
)


def contents(memory: Any) -> dict[int, NDArray[np.uint8]]:
    return {slot.id: memory.read(slot.id, np.arange(slot.npages)) for slot in memory.slots}


# --- maps of pages


def as_dict(one: PageMap) -> dict[int, int]:
    pages, places = one.places()
    return dict(zip(pages.tolist(), places.tolist(), strict=True))


def a_map(random: np.random.Generator, npages: int, place: int) -> PageMap:
    pages = np.flatnonzero(random.random(npages) < random.random())
    steps = np.where(random.random(len(pages)) < 0.2, random.integers(-5, 50, len(pages)), 1)
    places = np.where(random.random(len(pages)) < 0.3, ZERO, place + np.abs(np.cumsum(steps)))
    return PageMap.of([(pages, places)])


@pytest.mark.parametrize("seed", range(200))
def test_maps_lie_over_one_another_and_come_back_as_they_were_packed(seed: int) -> None:
    random = np.random.default_rng(seed)
    npages = int(random.integers(1, 60))
    older, newer = a_map(random, npages, 1000), a_map(random, npages, 1 << 40)
    both = older.under(newer)
    assert as_dict(both) == dict(sorted((as_dict(older) | as_dict(newer)).items()))
    assert both.covers(npages) == (len(as_dict(both)) == npages)
    maps = {3: older, 0: newer, 9: both}
    again = unpack(pack(maps))
    assert {key: as_dict(one) for key, one in again.items()} == {key: as_dict(one) for key, one in maps.items()}


@pytest.mark.parametrize("data", [b"", b"no", pack({1: PageMap.zeros(5)})[:-3]])
def test_what_is_no_map_is_damaged(data: bytes) -> None:
    with pytest.raises(dirtylog.CorruptDataError):
        unpack(data)


# --- arrays


def test_arrays_come_back_with_their_names_shapes_and_types(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    table = dirtylog.empty((64, 100), np.dtype([("id", "<i4"), ("xyz", ">f8", (3,)), ("name", "S5")]))
    flags = np.zeros(100_001, "?")
    strided = np.asfortranarray(random.random((50, 30)))[::-1, ::2]
    scalar = np.array(7.5)
    arrays: dict[str, NDArray[Any]] = {"table": table, "flags": flags, "strided": strided, "a scalar": scalar}
    with dirtylog.Checkpointer(arrays, tmp_path / "store") as saver:
        table["id"] = random.integers(0, 1000, table.shape)
        flags[::7] = True
        first = saver.save("first")
        before = {name: array.copy() for name, array in arrays.items()}
        table["xyz"][3] = 2.5
        strided[4] = -1
        scalar[()] = np.nan
        second = saver.save()
    assert (first.whole, first.note, second.whole, second.parent) == (True, "first", False, first.id)
    assert second.npages < first.npages
    for number, expected in ((first.id, before), (second.id, arrays), (None, arrays)):
        for mapped in (False, True):
            found = dirtylog.restore(tmp_path / "store", number, mapped=mapped)
            assert found.keys() == expected.keys()
            for name, array in found.items():
                assert (array.dtype, array.shape) == (arrays[name].dtype, arrays[name].shape)
                assert np.ascontiguousarray(array).tobytes() == np.ascontiguousarray(expected[name]).tobytes(), name
                assert array.flags.writeable is not mapped


def test_restoring_into_arrays_writes_only_pages_that_differ(tmp_path: Path) -> None:
    array = dirtylog.empty((100, PAGE), "uint8")
    array[:] = np.random.default_rng(2).integers(0, 256, array.shape)
    with dirtylog.Checkpointer({"a": array}, tmp_path / "store") as saver:
        saver.save()
        saved = array.copy()
        array[[3, 50]] += 1
        with dirtylog.track(array) as log:
            assert dirtylog.restore(tmp_path / "store", into={"a": array})["a"] is array
            assert log.get(0).pages().tolist() == [3, 50]
        assert np.array_equal(array, saved)
        array[7] = 0
        with dirtylog.track(array) as log:
            saver.restore()
            assert log.get(0).pages().tolist() == [7]
        assert np.array_equal(array, saved)


def test_a_checkpoint_is_put_into_other_arrays_or_another_memory(tmp_path: Path) -> None:
    array, other = dirtylog.empty((20, PAGE), "uint8"), np.zeros((20, PAGE), "uint8")
    with dirtylog.Checkpointer({"a": array}, tmp_path / "arrays") as saver:
        array[3] = 4
        first = saver.save()
        array[3] = 5
        saver.save()
        assert saver.restore(first.id, into={"a": other}).id == first.id
        assert (other[3] == 4).all()
        assert (array[3] == 5).all()
    with dirtylog.open("emu:arm:sweep", size="1MiB") as one, dirtylog.open("emu:arm:sweep", size="1MiB") as two:
        one.write(0, [7], np.full((1, PAGE), 9, np.uint8))
        with dirtylog.Checkpointer(dirtylog.DirtyLog(one), tmp_path / "guest") as saver:
            saver.save()
            saver.restore(into=two)
        assert all(np.array_equal(now, contents(one)[slot]) for slot, now in contents(two).items())


def test_a_save_has_just_what_was_written_and_zeros_take_no_room(tmp_path: Path) -> None:
    array = dirtylog.empty((1000, PAGE), "uint8")
    with dirtylog.Checkpointer({"a": array}, tmp_path / "store") as saver:
        array[:500] = 1
        first = saver.save()
        assert (first.npages, first.zeros, first.stored) == (1000, 500, 500 * PAGE)
        array[[5, 6, 999]] = 2
        array[700] = 3
        array[700] = 0
        second = saver.save()
        assert (second.npages, second.zeros, second.stored) == (4, 1, 3 * PAGE)
        third = saver.save()
        assert (third.npages, third.stored) == (0, 0)
        (found,) = diff(saver.store, first.id, third.id)
        assert found.runs.tolist() == [[5, 2], [999, 1]]
        assert diff(saver.store, second.id, third.id) == []
        assert saver.verify() == []


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("checksum", ["xxh3", "crc32", "blake2b", "sha256"])
def test_every_compression_goes_with_every_checksum(tmp_path: Path, compression: str, checksum: str) -> None:
    random = np.random.default_rng(3)
    array = dirtylog.empty((600, PAGE), "uint8")
    expected: dict[int, NDArray[np.uint8]] = {}
    with dirtylog.Checkpointer({"a": array}, tmp_path / "store", compression=compression, checksum=checksum) as saver:
        for high in (2, 256, 3, 256):
            pages = random.integers(0, 600, 200)
            array[pages] = random.integers(0, high, (200, PAGE))
            expected[saver.save().id] = array.copy()
        assert saver.verify() == []
    for number, contents_then in expected.items():
        assert np.array_equal(dirtylog.restore(tmp_path / "store", number)["a"], contents_then)
    with pytest.raises(dirtylog.InvalidArgumentError, match="has the checksum"):
        Store(tmp_path / "store", write=True, checksum_name="crc32" if checksum != "crc32" else "sha256")


def test_a_checkpoint_longer_than_a_segment_goes_on_in_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "FULL_BYTES", 3 << 20)
    random = np.random.default_rng(4)
    array = dirtylog.empty((4096, PAGE), "uint8")
    expected: dict[int, NDArray[np.uint8]] = {}
    with dirtylog.Checkpointer({"a": array}, tmp_path / "store") as saver:
        for npages in (4096, 100, 2500, 1):
            array[random.integers(0, 4096, npages), :8] = random.integers(1, 256, (npages, 8))
            expected[saver.save().id] = array.copy()
            assert saver.verify() == []
        assert len(segments.numbers_in(saver.store.folder)) > 4
        for number, contents_then in expected.items():
            assert np.array_equal(dirtylog.restore(tmp_path / "store", number)["a"], contents_then)
        saver.prune(Keep(last=1))
        assert saver.verify() == []
        assert np.array_equal(dirtylog.restore(tmp_path / "store")["a"], array)


def test_a_failed_save_leaves_its_pages_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = dirtylog.empty((100, PAGE), "uint8")
    with dirtylog.Checkpointer({"a": array}, tmp_path / "store") as saver:
        saver.save()
        array[[1, 2]] = 5

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("os.pwrite", fail)
            with pytest.raises(dirtylog.DirtyLogError, match="No space left"):
                saver.save()
        array[3] = 6
        assert len(saver.list()) == 1
        assert saver.save().npages == 3
        assert np.array_equal(dirtylog.restore(tmp_path / "store")["a"], array)


def test_a_background_save_has_what_there_was_when_it_was_finished(tmp_path: Path) -> None:
    array = dirtylog.empty((30_000, PAGE), "uint8")
    with dirtylog.Checkpointer({"a": array}, tmp_path / "store") as saver:
        saving = saver.begin("in the background")
        for step in range(2000):
            array[step * 13 % 30_000] = step % 251 + 1
        saved = saving.finish()
        copy = array.copy()
        array[:100] = 9
        assert saved.note == "in the background"
        assert np.array_equal(dirtylog.restore(tmp_path / "store", saved.id)["a"], copy)
        given_up = saver.begin()
        array[200] = 4
        given_up.abandon()
        assert len(saver.list()) == 1
        assert saver.save().npages == 101
        assert np.array_equal(dirtylog.restore(tmp_path / "store")["a"], array)
        assert saver.verify() == []
        assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def test_a_new_run_begins_with_a_whole_checkpoint_in_the_same_store(tmp_path: Path) -> None:
    for run in range(3):
        array = dirtylog.empty((10, PAGE), "uint8")
        array[run] = 1
        with dirtylog.Checkpointer({"a": array}, tmp_path / "store") as saver:
            assert saver.save(f"run {run}").whole
            array[9] = run
            assert not saver.save().whole
            assert len(saver.list()) == 2 * (run + 1)
            assert saver.verify() == []


# --- retention


def test_rules_say_what_is_kept() -> None:
    keep = Keep.of(["last 2", "hourly:3", "daily=1"])
    assert keep == Keep(last=2, hourly=3, daily=1)
    for bad in ("last", "last 0", "yearly 3", "last -1", "last 1.5", ""):
        with pytest.raises(dirtylog.InvalidArgumentError, match="last 10"):
            Keep.of([bad])


def test_pruned_checkpoints_leave_the_others_whole_and_give_their_room_back(tmp_path: Path) -> None:
    random = np.random.default_rng(6)
    array = dirtylog.empty((500, PAGE), "uint8")
    expected: dict[int, NDArray[np.uint8]] = {}
    with dirtylog.Checkpointer({"a": array}, tmp_path / "store") as saver:
        for number in range(30):
            pages = random.integers(0, 500, 100)
            array[pages] = random.integers(0, 256, (100, PAGE))
            saved = saver.save()
            expected[saved.id] = array.copy()
            if number % 10 == 9:
                freed = saver.prune(Keep(last=3))
                kept = [one.id for one in saver.list()]
                assert kept == sorted(expected)[-3:]
                expected = {one: expected[one] for one in kept}
                assert freed.checkpoints == (7 if number == 9 else 10)
                for one in kept:
                    assert np.array_equal(dirtylog.restore(tmp_path / "store", one)["a"], expected[one])
                assert saver.verify() == []
        used = sum(path.stat().st_size for path in saver.store.folder.iterdir())
        assert used < 3 * array.nbytes


# --- guests and processes


@pytest.mark.parametrize(
    ("target", "log"), [("emu:arm64:random", None), *(("kvm:random", log) for log in ("bitmap", "manual", "ring"))]
)
def test_a_running_guest_is_saved_as_it_was_at_one_instant(tmp_path: Path, target: str, log: str | None) -> None:
    if target.startswith("kvm") and (missing := missing_kvm()):
        pytest.skip(missing)
    with (
        dirtylog.open(target, size="8MiB", vcpus=2, log=log) as memory,
        dirtylog.Checkpointer(dirtylog.DirtyLog(memory), tmp_path / "store") as saver,
    ):
        memory.resume()
        for _ in range(3):
            time.sleep(0.02)
            saver.save()
            assert not memory.paused
        memory.pause()
        last = saver.save()
        assert memory.paused
        then = contents(memory)
        memory.resume()
        time.sleep(0.05)
        memory.pause()
        assert any(not np.array_equal(now, then[slot]) for slot, now in contents(memory).items())
        saver.restore(last.id)
        assert all(np.array_equal(now, then[slot]) for slot, now in contents(memory).items())
        assert saver.verify() == []


@needs_kvm
def test_a_guest_that_is_restored_in_a_new_machine_runs_on(tmp_path: Path) -> None:
    with (
        dirtylog.open("kvm:sweep", size="4MiB") as memory,
        dirtylog.Checkpointer(dirtylog.DirtyLog(memory), tmp_path / "store") as saver,
    ):
        memory.resume()
        time.sleep(0.05)
        memory.pause()
        saver.save()
        then = contents(memory)
    with dirtylog.open("kvm:sweep", size="4MiB") as memory:
        dirtylog.restore_memory(memory, tmp_path / "store")
        assert all(np.array_equal(now, then[slot]) for slot, now in contents(memory).items())
        last = int(then[0].view("<u8")[:, 0].max())
        memory.resume()
        time.sleep(0.002)
        memory.pause()
        # The sweep counts its stores, and went on where it was.
        stored = contents(memory)[0].view("<u8")[:, 0]
        fresh = np.sort(stored[stored > last])
        assert len(fresh) > 0
        assert fresh.tolist() == list(range(int(fresh[-1]) - len(fresh) + 1, int(fresh[-1]) + 1))
        assert fresh[0] == last + 1 or len(fresh) == len(stored)


def test_a_process_is_saved_mapping_by_mapping(tmp_path: Path) -> None:
    with (
        dirtylog.open([sys.executable, "-c", SPIN]) as memory,
        dirtylog.Checkpointer(dirtylog.DirtyLog(memory), tmp_path / "store") as saver,
    ):
        memory.resume()
        time.sleep(0.5)
        first = saver.save()
        time.sleep(0.05)
        second = saver.save()
        memory.pause()
        third = saver.save()
        then = {slot.id: memory.read(slot.id, np.arange(slot.npages)) for slot in memory.slots if slot.nbytes < 64 << 20}
        assert first.whole
        assert second.npages < first.npages
        assert saver.verify() == []
        maps = saver.store.maps(third.id)
        for slot in third.slots:
            if slot.id in then:
                out = np.empty((slot.npages, slot.page_size), np.uint8)
                read_slot(saver.store, maps[slot.key], out)
                assert np.array_equal(out, then[slot.id]), slot.label

"""What restores do to be fast: in two threads, each batch once, over arrays just where they differ; and that it changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dirtylog
from dirtylog.checkpoint.contents import Contents
from dirtylog.checkpoint.pages import ZERO, PageMap
from dirtylog.checkpoint.segments import SegmentReader
from dirtylog.checkpoint.store import Store
from dirtylog.errors import CorruptDataError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

PAGE = 4096


def cut_out(random: np.random.Generator, before: int, shape: tuple[int, ...], order: Any) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Return memory, and an array that begins so many bytes in it."""
    nbytes = int(np.prod(shape)) * 4
    memory = dirtylog.empty(before + nbytes + PAGE, np.uint8)
    memory[:] = random.integers(0, 256, len(memory), np.uint8)
    return memory, np.ndarray(shape, np.int32, buffer=memory.data, offset=before, order=order)


@pytest.mark.parametrize("seed", range(60))
def test_an_array_anywhere_in_its_pages_comes_back_and_its_neighbours_stay(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    shape = (int(random.integers(1, 6000)), int(random.integers(1, 5)))
    order = "CF"[seed % 2]
    _, array = cut_out(random, int(random.integers(0, 3 * PAGE)) & -4, shape, order)
    array[random.random(shape[0]) < random.choice([0, 0.3, 1])] = 0
    with dirtylog.Checkpointer({"array": array}, tmp_path / "store") as checkpointer:
        for _ in range(3):
            checkpointer.save()
            array[random.integers(0, shape[0], 3)] += 1
        checkpointer.save()
    # In other memory, which begins elsewhere in its page, and is laid out as it was or not.
    memory, other = cut_out(random, int(random.integers(0, PAGE)), shape, random.choice(["C", "F"]))
    if seed % 3:
        other[...] = array
        other[random.integers(0, shape[0], 2)] ^= 1
    start = other.__array_interface__["data"][0] - memory.ctypes.data
    around = [memory[:start].copy(), memory[start + other.nbytes :].copy()]
    assert dirtylog.restore(tmp_path / "store", into={"array": other})["array"] is other
    assert np.array_equal(other, array)
    assert np.array_equal(memory[:start], around[0])
    assert np.array_equal(memory[start + other.nbytes :], around[1])
    for mapped in (False, True):
        assert np.array_equal(dirtylog.restore(tmp_path / "store", mapped=mapped)["array"], array)


@pytest.mark.parametrize("seed", range(50))
def test_layers_of_maps_are_what_they_are_one_by_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    npages = int(random.integers(1, 80))
    maps = []
    for number in range(int(random.integers(1, 6))):
        pages = np.flatnonzero(random.random(npages) < random.random())
        places = np.where(random.random(len(pages)) < 0.3, ZERO, 1000 * number + np.arange(len(pages)))
        maps.append(PageMap.of([(pages, places)]))
    expected = maps[0]
    for one in maps[1:]:
        expected = expected.under(one)
    found = PageMap.layers(npages, maps)
    assert [column.tolist() for column in (found.first, found.npages, found.place)] == [
        column.tolist() for column in (expected.first, expected.npages, expected.place)
    ]
    with pytest.raises(CorruptDataError):
        PageMap.layers(npages, [*maps, PageMap.of([(np.array([npages]), np.array([0]))])])


def scattered(path: Path, npages: int = 3000, rounds: int = 12) -> NDArray[np.uint8]:
    """Save an array again and again, other pages each time, and return it as it was last."""
    random = np.random.default_rng(5)
    array = dirtylog.empty((npages, PAGE), np.uint8)
    array[:] = random.integers(1, 256, array.shape, np.uint8)
    with dirtylog.Checkpointer({"array": array}, path) as checkpointer:
        for _ in range(rounds):
            checkpointer.save()
            array[random.permutation(npages)[: npages // 10], :8] = random.integers(0, 256, (npages // 10, 8), np.uint8)
        checkpointer.save()
    return array


def test_every_batch_is_read_once_however_its_pages_are_scattered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store"
    array = scattered(path)
    reads: list[tuple[int, int]] = []
    read_into = SegmentReader.read_into

    def counted(self: SegmentReader, number: int, offset: int, out: memoryview) -> None:
        reads.append((number, offset))
        read_into(self, number, offset, out)

    monkeypatch.setattr(SegmentReader, "read_into", counted)
    with Store(path) as store:
        (one,) = store.maps(store.checkpoint().id).values()
        contents = Contents(store)
        batches = len(list(contents.pieces(one.places()[1])))
        contents.close()
    for options in ({}, {"mapped": True}, {"into": {"array": array.copy()}}):
        reads.clear()
        assert np.array_equal(dirtylog.restore(path, **options)["array"], array)
        assert len(reads) == len(set(reads)) == batches


@pytest.mark.parametrize("at", [0, 0.3, 0.99])
@pytest.mark.parametrize("way", ["copied", "mapped", "into"])
def test_a_page_that_does_not_verify_is_told_whichever_thread_meets_it(tmp_path: Path, way: str, at: float) -> None:
    path = tmp_path / "store"
    array = scattered(path, rounds=1)
    with Store(path) as store:
        (one,) = store.maps(store.checkpoint().id).values()
        contents = Contents(store)
        piece = list(contents.pieces(one.places()[1]))[int(at * len(contents.rows))]
        contents.close()
    with (path / "segments" / f"{piece.batch.segment:08}.seg").open("r+b") as file:
        file.seek(piece.batch.offset + int(piece.within[-1]) * PAGE)
        octet = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([octet[0] ^ 4]))
    options: dict[str, Any] = {"mapped": way == "mapped"} if way != "into" else {"into": {"array": array}}
    with pytest.raises(CorruptDataError, match="checksum"):
        dirtylog.restore(path, **options)

"""What a disk has changed: it is found, named, and never given out; all else stays readable."""

from __future__ import annotations

import shutil
import sqlite3
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dirtylog.checkpoint.contents import Contents, places_of
from dirtylog.checkpoint.pages import unpack
from dirtylog.checkpoint.restore import read_slot
from dirtylog.checkpoint.retention import Keep, prune
from dirtylog.checkpoint.store import Store
from dirtylog.checkpoint.verify import Difference, verify
from dirtylog.errors import CorruptDataError, DirtyLogError
from store_worlds import PAGE, build, copy_pages, folder_in_memory, make_small, numbers, save, world

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

STATES = 4


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with folder_in_memory() as path:
        yield path


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


def flip(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def readable(path: Path) -> dict[int, bool]:
    """Return of each checkpoint whether it can be read; what can is as it was."""
    found = {}
    with Store(path) as store:
        for number in store.index.ids():
            try:
                checkpoint = store.checkpoint(number)
                maps = store.maps(number)
                for slot in checkpoint.slots:
                    out = np.full((slot.npages, PAGE), 0xEE, np.uint8)
                    read_slot(store, maps[slot.key], out)
                    assert np.array_equal(out, world(int(checkpoint.note))[slot.key]), "other contents than were saved"
                found[number] = True
            except DirtyLogError:
                found[number] = False
    return found


def pages_of(differences: list[Difference]) -> set[tuple[int | None, str, int]]:
    """Return each page that is named."""
    return {
        (one.checkpoint, one.slot, page)
        for one in differences
        if one.first is not None
        for page in range(one.first, one.first + one.npages)
    }


def owners(store: Store) -> dict[int, tuple[int | None, str, int]]:
    """Return of each place the checkpoint that brought it, the slot and the page."""
    found: dict[int, tuple[int | None, str, int]] = {}
    for row in store.index.checkpoints():
        labels = {slot.key: slot.label for slot in store.checkpoint(row.id).slots}
        for key, one in unpack(row.map).items():
            pages, places = one.places()
            found |= {place: (row.id, labels[key], page) for page, place in zip(pages.tolist(), places.tolist(), strict=True)}
    return found


@pytest.mark.parametrize(("compression", "checksum"), [("none", "xxh3"), ("none", "sha256"), ("lz4", "crc32"), ("zstd", "blake2b")])
@pytest.mark.parametrize("pruned", [False, True])
def test_a_flipped_bit_in_a_segment_is_named_and_spoils_nothing_else(
    tmp_path: Path, compression: str, checksum: str, pruned: bool
) -> None:
    path = tmp_path / "store"
    with Store(path, write=True, checksum_name=checksum) as store:
        for number in range(1, STATES + 1):
            save(store, number, compression)
        if pruned:
            prune(store, Keep(last=3), live_share=0.95)
    with Store(path) as store:
        rows, of_place = store.index.batches(), owners(store)
        maps = {number: store.maps(number).values() for number in store.index.ids()}
    every_place = {number: {place for one in slots for place in one.places()[1].tolist()} for number, slots in maps.items()}
    random = np.random.default_rng(1)
    for _ in range(15):
        row = rows[random.integers(len(rows))]
        file = path / "segments" / f"{row.segment:08}.seg"
        offset, bit = int(random.integers(row.nbytes)), int(random.integers(8))
        flip(file, row.offset + offset, bit)
        places = places_of(row).tolist()
        # Compressed pages go together.
        hit = {places[offset // PAGE]} if row.codec == "none" else set(places)
        with Store(path) as store:
            found = verify(store)
            named = {
                (one.checkpoint, one.slot, page) for one in found for page in range(one.first or 0, (one.first or 0) + one.npages)
            }
            expected = {of_place[place] for place in hit if place in of_place}
            assert named == expected if row.codec == "none" else named <= expected
            assert bool(named) == bool(expected)
            assert all(one.reason for one in found)
            contents = Contents(store)
            bad = {place for place, owner in of_place.items() if owner in named}
            for place in of_place.keys() - {-1}:
                out = np.empty((1, PAGE), np.uint8)
                if place in bad:
                    with pytest.raises(CorruptDataError):
                        contents.read(np.array([place]), out)
                elif place not in hit:
                    contents.read(np.array([place]), out)
            contents.close()
        assert readable(path) == {number: not bad & there for number, there in every_place.items()}
        flip(file, row.offset + offset, bit)
    assert all(readable(path).values())


def test_a_flipped_bit_in_the_index_is_never_a_wrong_page(tmp_path: Path) -> None:
    template, path = tmp_path / "template", tmp_path / "store"
    build(template, STATES, "lz4")
    size = (template / "index.sqlite").stat().st_size
    random = np.random.default_rng(2)
    ends: Counter[str] = Counter()
    shutil.copytree(template, path)
    for _ in range(200):
        at, bit = int(random.integers(size)), int(random.integers(8))
        flip(path / "index.sqlite", at, bit)
        try:
            found = readable(path)
            with Store(path) as store:
                newest = store.checkpoint()
                problems = verify(store)
            assert newest.note == str(STATES)
            assert sorted(found) == list(range(1, STATES + 1))
            # What cannot be read is what verify tells of.
            assert all(found.values()) or problems
            ends["unnoticed, and all is right" if all(found.values()) else "some checkpoints are readable"] += 1
        except DirtyLogError as error:
            ends[type(error).__name__] += 1
        shutil.copyfile(template / "index.sqlite", path / "index.sqlite")
    print(dict(ends))
    assert len(ends) >= 3


def test_a_flipped_bit_in_what_a_dead_writer_left_of_the_log_is_never_a_wrong_page(tmp_path: Path) -> None:
    template, path = tmp_path / "template", tmp_path / "store"
    with Store(tmp_path / "source", write=True) as store:
        for number in range(1, STATES + 1):
            save(store, number)
        shutil.copytree(tmp_path / "source", template, ignore=shutil.ignore_patterns("*-shm"))
    size = (template / "index.sqlite-wal").stat().st_size
    random = np.random.default_rng(4)
    states: Counter[int] = Counter()
    for _ in range(60):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(template, path)
        flip(path / "index.sqlite-wal", int(random.integers(size)), int(random.integers(8)))
        # The log ends where it is damaged, as after a power cut: there are the checkpoints up to some commit.
        with suppress(DirtyLogError):
            found = readable(path)
            assert list(found.items()) == [(number, True) for number in range(1, len(found) + 1)]
            states[len(found)] += 1
    assert len(states) > 2


def test_a_writer_of_a_damaged_index_makes_nothing_worse(tmp_path: Path) -> None:
    template, path = tmp_path / "template", tmp_path / "store"
    build(template, STATES)
    size = (template / "index.sqlite").stat().st_size
    random = np.random.default_rng(3)
    ends: Counter[str] = Counter()
    for _ in range(100):
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(template, path)
        at, bit = int(random.integers(size)), int(random.integers(8))
        flip(path / "index.sqlite", at, bit)
        try:
            with Store(path, write=True) as store:
                save(store, STATES + 1)
                prune(store, Keep(last=2), live_share=0.95)
            ends["went on"] += 1
        except DirtyLogError as error:
            ends[type(error).__name__] += 1
        for before in (template / "segments").iterdir():
            now = path / "segments" / before.name
            assert not now.exists() or now.read_bytes().startswith(before.read_bytes()), "written over"
        with suppress(DirtyLogError):
            readable(path)
    print(dict(ends))


def test_a_damaged_row_of_one_checkpoint_leaves_those_that_do_not_need_it(tmp_path: Path) -> None:
    path = tmp_path / "store"
    build(path, STATES)
    change(path, "UPDATE checkpoints SET npages = npages + 1 WHERE id = 3")
    assert readable(path) == {1: True, 2: True, 3: False, 4: False}
    with Store(path) as store:
        assert {(one.checkpoint, one.reason.split(" in ")[0]) for one in verify(store)} == {
            (3, "checkpoint 3"),
            (4, "checkpoint 3"),
        }
        with pytest.raises(CorruptDataError, match=r"checksums: 3; the others can be named: 1, 2, 4"):
            store.checkpoints()
    with Store(path, write=True) as store, pytest.raises(CorruptDataError):
        prune(store, Keep())
    assert readable(path) == {1: True, 2: True, 3: False, 4: False}


def test_a_damaged_row_of_a_batch_costs_its_pages_alone(tmp_path: Path) -> None:
    path = tmp_path / "store"
    build(path, STATES)
    with Store(path) as store:
        of_place = owners(store)
        row = store.index.batches()[-1]
        lost = {of_place[place] for place in places_of(row).tolist()}
    change(path, "UPDATE batches SET offset = offset + 4096 WHERE batch = ?", row.batch)
    with Store(path) as store:
        found = verify(store)
    assert ("index", f"batch {row.batch} does not have its checksum") in {(one.slot, one.reason) for one in found}
    named = {
        (one.checkpoint, one.slot, page)
        for one in found
        if one.first is not None
        for page in range(one.first, one.first + one.npages)
    }
    assert named == lost
    assert readable(path) == {1: True, 2: True, 3: True, 4: False}


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("UPDATE facts SET next_place = 3", "facts"),
        ("DELETE FROM facts", "facts"),
        ("UPDATE segments SET nbytes = nbytes - 4096", "segment"),
        ("DELETE FROM checkpoints WHERE id = 4", "missing"),
        ("DELETE FROM checkpoints WHERE id = 2", "missing"),
    ],
)
def test_what_would_have_a_writer_destroy_something_is_noticed_first(tmp_path: Path, statement: str, why: str) -> None:
    path = tmp_path / "store"
    build(path, STATES)
    change(path, statement)
    with pytest.raises(CorruptDataError, match=why), Store(path, write=True) as store:
        save(store, STATES + 1)


def change(path: Path, statement: str, *values: int) -> None:
    with sqlite3.connect(path / "index.sqlite") as database:
        database.execute(statement, values)
    database.close()


@pytest.mark.parametrize("how", ["cut off", "missing"])
def test_a_segment_that_is_not_whole_costs_its_pages_alone_and_the_store_goes_on(tmp_path: Path, how: str) -> None:
    path = tmp_path / "store"
    build(path, 1)
    first = set((path / "segments").iterdir())
    with Store(path, write=True) as store:
        store.avoid(max(store.index.segments()))
        save(store, 2)
    (victim,) = set((path / "segments").iterdir()) - first
    if how == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-PAGE])
    assert readable(path) == {1: True, 2: False}
    with Store(path) as store:
        found = verify(store)
        assert {one.checkpoint for one in found} == {2}
        npages = sum(one.npages for one in found)
        assert npages == 1 if how == "cut off" else npages > 1
    with Store(path, write=True) as store:
        # One that stands alone.
        draft = store.draft()
        for key, pages in world(3).items():
            draft.write(key, np.arange(len(pages)), PAGE, partial(copy_pages, pages))
        draft.commit(store.checkpoint(1).slots, parent=None, note="3")
    assert readable(path) == {1: True, 2: False, 3: True}
    with Store(path, write=True) as store:
        prune(store, Keep(last=1))
    assert numbers(path) == {3}

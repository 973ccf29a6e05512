"""Readers beside a writer that saves, prunes and collects: what they get is right, or they are told that it is gone."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import numpy as np
import pytest

import dirtylog
from dirtylog.checkpoint import segments
from dirtylog.checkpoint.contents import Contents
from dirtylog.checkpoint.restore import read_slot, reading, staying
from dirtylog.checkpoint.retention import Keep, collect, prune
from dirtylog.checkpoint.store import Store
from dirtylog.checkpoint.verify import verify
from dirtylog.errors import InvalidArgumentError
from store_worlds import PAGE, build, make_small, save, world

if TYPE_CHECKING:
    from pathlib import Path


def write_on(path: Path, first: int, rounds: int) -> None:
    """Save, prune and write all anew, again and again."""
    with Store(path, write=True) as store:
        for number in range(first, first + rounds):
            save(store, number, ("none", "lz4", "zstd")[number % 3])
            prune(store, Keep(last=3), live_share=0.9)
            if number % 3 == 0:
                collect(store, live_share=1.1)


def test_a_reader_is_never_given_anything_wrong_while_the_writer_prunes_and_collects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small(monkeypatch)
    path = tmp_path / "store"
    build(path, 3)
    world(60)
    child = os.fork()
    if not child:
        try:
            write_on(path, 4, 40)
        finally:
            os._exit(0)
    read = gone = verified = 0
    try:
        with Store(path) as store:
            while os.waitpid(child, os.WNOHANG) == (0, 0):
                for checkpoint in store.checkpoints():
                    try:
                        with staying(store, checkpoint.id):
                            maps = store.maps(checkpoint.id)
                            for slot in checkpoint.slots:
                                out = np.empty((slot.npages, PAGE), np.uint8)
                                read_slot(store, maps[slot.key], out)
                                assert np.array_equal(out, world(int(checkpoint.note))[slot.key])
                        read += 1
                    except InvalidArgumentError:
                        gone += 1
                assert verify(store) == []
                verified += 1
            child = 0
            assert [one.note for one in store.checkpoints()] == ["41", "42", "43"]
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    print(f"{read} read, {gone} gone, {verified} times verified")
    assert read > 3
    assert verified


def test_what_moves_between_the_index_and_the_segments_is_read_where_it_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small(monkeypatch)
    path = tmp_path / "store"
    build(path, 3)
    out = np.empty((20, PAGE), np.uint8)
    calls = 0
    with Store(path) as reader:
        _, places = reader.maps(3)[0].places()

        def read(contents: Contents) -> None:
            nonlocal calls
            calls += 1
            if calls < 3:
                with Store(path, write=True) as store:
                    collect(store, live_share=1.1)
            contents.read(places, out)

        reading(reader, read)
    assert calls == 3
    assert np.array_equal(out, world(3)[0])


def test_what_is_being_read_stays_though_the_writer_removes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    monkeypatch.setattr("dirtylog.checkpoint.contents._AHEAD_BYTES", 0)
    path = tmp_path / "store"
    build(path, 3)
    out = np.empty((20, PAGE), np.uint8)
    with Store(path) as reader:
        _, places = reader.maps(3)[0].places()
        contents = Contents(reader)
        found = contents.each(places, PAGE)
        which, saved = next(found)
        out[places == -1] = 0
        out[which] = saved
        with Store(path, write=True) as store:
            collect(store, live_share=1.1)
        for which, saved in found:
            out[which] = saved
        contents.close()
    assert np.array_equal(out, world(3)[0])


def test_more_segments_than_may_be_open_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    monkeypatch.setattr(segments, "MOST_OPEN", 2)
    path = tmp_path / "store"
    build(path, 6)
    assert len(list((path / "segments").iterdir())) > 4
    out = np.empty((20, PAGE), np.uint8)
    with Store(path) as reader:
        contents = Contents(reader)
        for number in range(1, 7):
            contents.read(reader.maps(number)[0].places()[1], out)
            assert np.array_equal(out, world(number)[0])
            assert len(contents._files._open) <= 2
        contents.close()


def test_a_reader_of_one_that_was_dropped_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    path = tmp_path / "store"
    build(path, 3)
    with Store(path) as reader:
        maps = reader.maps(1)
        with Store(path, write=True) as store:
            prune(store, Keep(last=1), live_share=0.99)
        out = np.empty((20, PAGE), np.uint8)
        with pytest.raises(InvalidArgumentError, match="checkpoint 1 was dropped while it was read"), staying(reader, 1):
            read_slot(reader, maps[0], out)
        with pytest.raises(InvalidArgumentError, match="no checkpoint 1; it has 3"):
            reader.checkpoint(1)


def test_mapped_arrays_stay_when_their_checkpoint_and_the_store_go(tmp_path: Path) -> None:
    path = tmp_path / "store"
    array = dirtylog.empty((64, PAGE), np.uint8)
    with dirtylog.Checkpointer({"array": array}, path) as checkpointer:
        array[:] = 1
        checkpointer.save()
        mapped = dirtylog.restore(path, mapped=True)["array"]
        for number in range(2, 5):
            array[:] = number
            checkpointer.save()
        checkpointer.prune(Keep(last=1))
        assert [one.id for one in checkpointer.list()] == [4]
        for one in (path / "segments").iterdir():
            one.unlink()
    assert not mapped.flags.writeable
    assert (mapped == 1).all()


def test_a_store_is_read_while_a_save_in_the_background_is_under_way(tmp_path: Path) -> None:
    path = tmp_path / "store"
    array = dirtylog.empty((64, PAGE), np.uint8)
    with dirtylog.Checkpointer({"array": array}, path) as checkpointer:
        for number in range(1, 6):
            array[:] = number
            saving = checkpointer.begin()
            assert [one.id for one in checkpointer.list()] == list(range(1, number))
            assert checkpointer.verify() == []
            if number > 1:
                assert (dirtylog.restore(path)["array"] == number - 1).all()
            saving.finish()

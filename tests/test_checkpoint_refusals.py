"""What is no store, or another's, or of another shape: refused in words, and nothing of it is touched."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dirtylog
from dirtylog.checkpoint.retention import Keep
from dirtylog.checkpoint.store import Store
from dirtylog.errors import AccessDeniedError, CorruptDataError, InvalidArgumentError, UnsupportedError
from store_worlds import PAGE, build, numbers, save

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def contents(path: Path) -> dict[str, bytes]:
    return {str(one): one.read_bytes() for one in path.rglob("*") if one.is_file() and one.name != "lock"}


def test_a_store_without_its_index_is_not_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "store"
    build(path, 2)
    (path / "index.sqlite").unlink()
    before = contents(path)
    with pytest.raises(InvalidArgumentError, match=r"it has no index\.sqlite"):
        Store(path)
    with pytest.raises(CorruptDataError, match=r"has pages, and no index; bring the index back"):
        Store(path, write=True)
    (path / "index.sqlite").touch()
    with pytest.raises(CorruptDataError, match="has pages, and no index"):
        Store(path, write=True)
    (path / "index.sqlite").unlink()
    assert contents(path) == before


@pytest.mark.parametrize("write", [False, True])
def test_the_index_of_another_program(tmp_path: Path, write: bool) -> None:
    with sqlite3.connect(tmp_path / "index.sqlite") as database:
        database.execute("CREATE TABLE bookmarks (address TEXT)")
    database.close()
    before = (tmp_path / "index.sqlite").read_bytes()
    with pytest.raises(InvalidArgumentError, match=r"is no checkpoint store; index\.sqlite is another program's"):
        Store(tmp_path, write=write)
    assert (tmp_path / "index.sqlite").read_bytes() == before


@pytest.mark.parametrize("write", [False, True])
def test_an_index_that_is_no_database(tmp_path: Path, write: bool) -> None:
    (tmp_path / "index.sqlite").write_text("no database, and long enough to see that: " * 100)
    with pytest.raises(InvalidArgumentError, match="it is not an SQLite file"):
        Store(tmp_path, write=write)


@pytest.mark.parametrize("write", [False, True])
def test_a_store_of_a_newer_version(tmp_path: Path, write: bool) -> None:
    build(tmp_path / "store", 1)
    with sqlite3.connect(tmp_path / "store" / "index.sqlite") as database:
        database.execute("PRAGMA user_version=2")
    database.close()
    before = contents(tmp_path)
    with pytest.raises(UnsupportedError, match=r"has version 2, and this dirtylog knows up to 1; use a newer dirtylog"):
        Store(tmp_path / "store", write=write)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("named", ["file", "folder"])
def test_a_folder_with_something_else_in_it(tmp_path: Path, named: str) -> None:
    (tmp_path / named).mkdir() if named == "folder" else (tmp_path / named).touch()
    with pytest.raises(InvalidArgumentError, match="it is not empty"):
        Store(tmp_path, write=True)
    assert [one.name for one in tmp_path.iterdir()] == [named]


# --- two writers


def test_a_second_writer_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    build(tmp_path / "store", 1)
    with Store(tmp_path / "store", write=True):
        with pytest.raises(AccessDeniedError, match=f"is being written by process {os.getpid()};") as caught:
            Store(tmp_path / "store", write=True)
        assert caught.value.pid == os.getpid()
        assert numbers(tmp_path / "store") == {1}
    with Store(tmp_path / "store", write=True) as store:
        save(store, 2)


WRITER = """
import sys, time
from dirtylog.checkpoint.store import Store
with Store(sys.argv[1], write=True) as store:
    if sys.argv[2] == "forks":
        import os
        is_there, there = os.pipe()
        child = os.fork()
        if not child:
            os.write(there, b"!")
            time.sleep(1000)
        os.read(is_there, 1)
        print(child, end=" ")
    print("open", flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("how", ["forks", "alone"])
def test_the_lock_of_one_that_was_killed_does_not_hold_even_if_a_child_of_it_lives(tmp_path: Path, how: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "store"), how], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        *children, word = writer.stdout.readline().split()
        assert word == "open"
        with pytest.raises(AccessDeniedError, match=f"process {writer.pid};"):
            Store(tmp_path / "store", write=True)
        writer.kill()
        writer.wait()
        try:
            with Store(tmp_path / "store", write=True) as store:
                save(store, 1)
        finally:
            for child in children:
                os.kill(int(child), signal.SIGKILL)


def _save_in_child(store: Store) -> str:
    try:
        save(store, 2)
    except InvalidArgumentError as error:
        return str(error)
    return "saved"


def test_a_forked_child_does_not_write_to_its_parents_store(tmp_path: Path) -> None:
    with Store(tmp_path / "store", write=True) as store:
        save(store, 1)
        hears, speaks = multiprocessing.get_context("fork").Pipe(duplex=False)
        child = os.fork()
        if not child:
            speaks.send(_save_in_child(store))
            os._exit(0)
        os.waitpid(child, 0)
        assert "the process that this one was forked from" in hears.recv()
        with pytest.raises(AccessDeniedError):
            Store(tmp_path / "store", write=True)
        save(store, 2)
    assert numbers(tmp_path / "store") == {1, 2}


# --- in the background


def test_what_would_wait_for_a_background_save_for_ever_is_refused(tmp_path: Path) -> None:
    array = dirtylog.empty((8, PAGE), np.uint8)
    with dirtylog.Checkpointer({"array": array}, tmp_path / "store") as checkpointer:
        saving = checkpointer.begin()
        for action in (checkpointer.save, checkpointer.begin, lambda: checkpointer.prune(Keep(last=1))):
            with pytest.raises(InvalidArgumentError, match="finish it or abandon it first"):
                action()
        saving.finish()
        checkpointer.save()
        checkpointer.begin().abandon()
        assert len(checkpointer.list()) == 2
        checkpointer.begin()
    # Its end gave the last one up.
    with Store(tmp_path / "store", write=True) as store:
        assert len(store.checkpoints()) == 2


# --- other shapes


def two(path: Path) -> dict[str, NDArray[Any]]:
    arrays = {"a": dirtylog.empty((5, 3000), np.float32), "b": dirtylog.empty(4096, np.int64)}
    arrays["a"][:] = np.arange(15000).reshape(5, 3000)
    arrays["b"][:] = 7
    with dirtylog.Checkpointer(arrays, path) as checkpointer:
        checkpointer.save()
    return arrays


@pytest.mark.parametrize(
    ("into", "why"),
    [
        ({"a": np.zeros((3000, 5), np.float32)}, r"array 'a' is float32 of shape \(3000, 5\), and the checkpoint has float32 of"),
        ({"a": np.zeros((5, 3000), np.int32)}, "array 'a' is int32"),
        ({"a": np.zeros((5, 3000), ">f4")}, "array 'a' is >f4"),
        ({"c": np.zeros(4096, np.int64)}, "has no array 'c'; it has a, b"),
        ({"b": np.zeros(4096, np.int64), "a": np.zeros(3, np.float32)}, "array 'a' is float32 of shape"),
        ({"b": np.broadcast_to(np.int64(1), 4096)}, "array 'b' is read-only"),
    ],
)
def test_arrays_of_another_shape_or_type_are_refused_before_any_is_written(
    tmp_path: Path, into: dict[str, NDArray[Any]], why: str
) -> None:
    two(tmp_path / "store")
    before = {name: array.copy() for name, array in into.items()}
    with pytest.raises(InvalidArgumentError, match=why):
        dirtylog.restore(tmp_path / "store", into=into)
    for name, array in into.items():
        assert np.array_equal(array, before[name])


def test_a_checkpointer_of_other_arrays_does_not_take_them(tmp_path: Path) -> None:
    two(tmp_path / "store")
    for arrays, why in (
        ({"a": dirtylog.empty(9, np.int8)}, "a has 1 pages of 4096 bytes"),
        ({"z": dirtylog.empty(9, np.int8)}, "has a"),
    ):
        with (
            dirtylog.Checkpointer(arrays, tmp_path / "store") as checkpointer,
            pytest.raises(InvalidArgumentError, match=why),
        ):
            checkpointer.restore()


# --- files that the store is made of


def mapped(path: Path) -> NDArray[np.uint8]:
    return np.memmap(path, np.uint8, "r+", shape=(4096,))


@pytest.mark.parametrize("kind", ["segment", "a link to it", "index"])
def test_an_array_over_the_stores_own_files_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "store"
    with dirtylog.Checkpointer({"x": (source := dirtylog.empty(4096, np.uint8))}, path) as checkpointer:
        source[:] = 5
        checkpointer.save()
    (segment,) = (path / "segments").iterdir()
    file = {"segment": segment, "a link to it": tmp_path / "link", "index": path / "index.sqlite"}[kind]
    if kind == "a link to it":
        os.link(segment, file)
    before = contents(path)
    array = mapped(file)
    with pytest.raises(InvalidArgumentError, match=r"array 'x' maps .*which the store is made of"):
        dirtylog.restore(path, into={"x": array})
    with pytest.raises(InvalidArgumentError, match=r"array 'x' maps .*which the store is made of"):
        dirtylog.Checkpointer({"x": array}, path)
    del array
    assert contents(path) == before


def test_an_array_over_another_file_even_in_the_stores_folder_is_restored(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with dirtylog.Checkpointer({"x": (source := dirtylog.empty(4096, np.uint8))}, path) as checkpointer:
        source[:] = 5
        checkpointer.save()
    (path / "mine").write_bytes(bytes(4096))
    array = mapped(path / "mine")
    dirtylog.restore(path, into={"x": array})
    del array
    assert (path / "mine").read_bytes() == b"\5" * 4096
    with Store(path, write=True) as store:
        assert len(store.checkpoints()) == 1

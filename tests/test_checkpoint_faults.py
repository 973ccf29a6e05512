"""A disk that is full or fails, at every call that changes a store: an error in words, nothing of it in the store, nothing lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dirtylog
from dirtylog.checkpoint.retention import Keep, prune
from dirtylog.checkpoint.store import Store
from dirtylog.checkpoint.verify import verify
from dirtylog.errors import DirtyLogError
from store_worlds import PAGE, build, check, folder_in_memory, make_small, numbers, save, world
from traced import SYNCS, Action, Call, missing, traced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

traces = pytest.mark.skipif(missing() is not None, reason=str(missing()))
ERRORS = {"full": errno.ENOSPC, "failing": errno.EIO}


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    with folder_in_memory() as path:
        yield path


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)


class Fault:
    """Fails call ``at`` of those that are made after the child says "fails"; or all from then on, until it says "works"."""

    def __init__(self, at: int, error: int, *, stays: bool = False, only: Callable[[Call], bool] = lambda _call: True) -> None:
        self._at, self._error, self._stays, self._only = at, error, stays, only
        self._count: int | None = None
        self.hit: list[Call] = []
        self.later: list[Call] = []

    def hear(self, text: str) -> None:
        if text in ("fails", "works"):
            self._count = 0 if text == "fails" else None

    def act(self, _number: int, call: Call) -> Action | None:
        if self.hit:
            self.later.append(call)
        if self._count is None or not self._only(call):
            return None
        self._count += 1
        if self._count - 1 == self._at or (self._stays and self._count > self._at):
            self.hit.append(call)
            return Action(error=self._error)
        return None


def _fails(action: Callable[[], object]) -> bool:
    """Return whether it fails, in words."""
    try:
        action()
    except DirtyLogError as error:
        return bool(str(error))
    return False


def saves(path: Path, tell: Callable[[str], None]) -> None:
    """Save arrays, the second time in trouble, and then what is in memory."""
    arrays = {name: dirtylog.empty(world(0)[key].shape, np.uint8) for key, name in enumerate(("large", "small"))}

    def become(number: int) -> None:
        for key, array in enumerate(arrays.values()):
            differs = (array != world(number)[key]).any(axis=1)
            array[differs] = world(number)[key][differs]

    with dirtylog.Checkpointer(arrays, path) as checkpointer:
        become(1)
        checkpointer.save("1")
        become(2)
        tell("fails")
        saved = not _fails(lambda: checkpointer.save("2"))
        tell("works")
        if saved:
            tell("saved")
        assert [one.note for one in checkpointer.list()] == ["1", "2"][: 1 + saved]
        # Of state 2 to 3 only some pages are written: the others of 2 come from the failed one.
        become(3)
        checkpointer.save("3")
        assert checkpointer.verify() == []


def _run(program: Callable[[Path, Callable[[str], None]], None], path: Path, fault: Fault) -> list[str]:
    path.parent.mkdir(exist_ok=True)
    run = traced(lambda tell: program(path, tell), path.parent, fault.act, fault.hear)
    assert run.status == 0
    return run.told


def _points(program: Callable[[Path, Callable[[str], None]], None], path: Path, prepare: Callable[[], None]) -> int:
    prepare()
    fault = Fault(-1, 0)
    count = 0

    def act(number: int, call: Call) -> None:
        nonlocal count
        fault.act(number, call)
        count = fault._count or count

    traced(lambda tell: program(path, tell), path.parent, act, fault.hear)
    assert count > 10
    return count


@traces
@pytest.mark.parametrize("stays", [False, True], ids=["once", "until it is mended"])
@pytest.mark.parametrize("kind", ERRORS)
def test_a_save_that_fails_anywhere_leaves_nothing_and_the_next_has_its_pages(tmp_path: Path, kind: str, stays: bool) -> None:
    path = tmp_path / "work" / "store"
    path.parent.mkdir()
    prepare: Callable[[], None] = lambda: shutil.rmtree(path, ignore_errors=True)  # noqa: E731 - a word for it
    points = _points(saves, path, prepare)
    failed = 0
    for at in range(points):
        prepare()
        fault = Fault(at, ERRORS[kind], stays=stays)
        told = _run(saves, path, fault)
        assert fault.hit
        assert numbers_of_arrays(path) == ({1, 2, 3} if "saved" in told else {1, 3}), fault.hit
        failed += "saved" not in told
        synced = {call.path for call in fault.hit if call.name in SYNCS and call.path.endswith(".seg")}
        assert not [call for call in fault.later if call.path in synced and call.data], "appended where a sync has failed"
        if not stays:
            _has_no_other_files(path)
    print(f"{kind}, {stays=}: {points} points, of which {failed} fail the save")
    assert failed > points / 2


def numbers_of_arrays(path: Path) -> set[int]:
    """Return which states are in a store of arrays, each of them checked."""
    with Store(path) as store:
        found = {int(one.note): one.id for one in store.checkpoints()}
        assert verify(store) == []
    for number, checkpoint in found.items():
        arrays = dirtylog.restore(path, checkpoint)
        for key, name in enumerate(("large", "small")):
            assert np.array_equal(arrays[name], world(number)[key])
    return set(found)


def _has_no_other_files(path: Path) -> None:
    """Look that what a failed save has taken of the disk was given back."""
    with Store(path) as store:
        lengths = store.index.segments()
        assert {one.name: one.stat().st_size for one in store.folder.iterdir()} == {
            f"{number:08}.seg": nbytes for number, nbytes in lengths.items()
        }


def prunes(path: Path, tell: Callable[[str], None]) -> None:
    """Drop checkpoints and write segments anew in trouble, and again without."""
    with Store(path, write=True) as store:
        tell("fails")
        _fails(lambda: prune(store, Keep(last=2), live_share=0.95))
        tell("works")
        assert verify(store) == []
        save(store, 5)
        prune(store, Keep(last=2), live_share=0.95)
        assert verify(store) == []


@traces
@pytest.mark.parametrize(("kind", "compression"), [("full", "lz4"), ("failing", "none")])
def test_a_prune_that_fails_anywhere_can_be_done_again(tmp_path: Path, kind: str, compression: str) -> None:
    template, path = tmp_path / "template", tmp_path / "work" / "store"
    path.parent.mkdir()
    build(template, 4, compression)

    def prepare() -> None:
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(template, path)

    points = _points(prunes, path, prepare)
    for at in range(points):
        prepare()
        _run(prunes, path, Fault(at, ERRORS[kind], stays=at % 2 == 0))
        assert numbers(path) == {4, 5}
    check(path, {4, 5})


def opens(path: Path, tell: Callable[[str], None]) -> None:
    """Make a store in trouble, and again without."""
    tell("fails")
    _fails(lambda: build(path, 1))
    tell("works")
    with Store(path, write=True) as store:
        if not store.checkpoints():
            save(store, 1)
        save(store, 2)


@traces
@pytest.mark.parametrize(("kind", "stays"), [("full", True), ("failing", False)])
def test_a_store_whose_making_fails_is_made_the_next_time(tmp_path: Path, kind: str, stays: bool) -> None:
    path = tmp_path / "work" / "store"
    path.parent.mkdir()
    prepare: Callable[[], None] = lambda: shutil.rmtree(path, ignore_errors=True)  # noqa: E731 - a word for it
    for at in range(_points(opens, path, prepare)):
        prepare()
        _run(opens, path, Fault(at, ERRORS[kind], stays=stays))
        assert numbers(path) == {1, 2}
    check(path, {1, 2})


@traces
def test_writes_that_take_only_a_part_are_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "work" / "store"
    path.parent.mkdir()
    count = 0

    def short(_number: int, call: Call) -> Action | None:
        nonlocal count
        count += 1
        # SQLite's writes are gone on with by SQLite, and the lock's is as short as it is.
        return Action(nbytes=len(call.data) * 2 // 3) if len(call.data) > 100 and count % 2 else None

    run = traced(lambda tell: saves(path, tell), path.parent, short)
    assert run.status == 0
    assert run.told == ["fails", "works", "saved"]
    assert numbers_of_arrays(path) == {1, 2, 3}


@traces
def test_a_commit_in_doubt_is_never_written_over(tmp_path: Path) -> None:
    # The log's sync fails: the commit is taken back. A death before the next commit lets it come to be all the same.
    path = tmp_path / "work" / "store"
    path.parent.mkdir()

    def program(tell: Callable[[str], None]) -> None:
        with Store(path, write=True) as store:
            save(store, 1)
            tell("fails")
            try:
                save(store, 2)
            except DirtyLogError:
                tell("works")
                save(store, 3)
                tell("saved")

    wal: Callable[[Call], bool] = lambda call: call.name in SYNCS and call.path.endswith("-wal")  # noqa: E731 - a word for it
    kill_at, seen = 0, set()
    while True:
        shutil.rmtree(path, ignore_errors=True)
        fault = Fault(0, errno.EIO, only=wal)

        def act(number: int, call: Call, fault: Fault = fault, kill_at: int = kill_at) -> Action | None:
            found = fault.act(number, call)
            return Action(kill=True) if len(fault.later) > kill_at else found

        run = traced(program, path.parent, act, fault.hear)
        assert fault.hit
        if not os.WIFSIGNALED(run.status):
            assert run.status == 0
            break
        possible = {2, 3} if "saved" not in run.told else {2}
        seen |= check(path, {1, 3} if "saved" in run.told else {1}, possible)
        kill_at += 1
    assert kill_at > 10
    assert seen == {1, 2, 3}, "the commit in doubt has come to be, some time"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MiB."""
    if os.geteuid():
        pytest.skip("mounting a small disk takes root")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    path = small_disk / "store"
    array = dirtylog.empty((300, PAGE), np.uint8)
    random = np.random.default_rng(1)
    kept: dict[int, NDArray[Any]] = {}
    failures = 0
    other = small_disk / "another program's"
    other.write_bytes(bytes(64 * PAGE))
    with dirtylog.Checkpointer({"array": array}, path) as checkpointer:
        for _ in range(120):
            array[random.integers(0, 300, 12)] = random.integers(0, 256, (12, PAGE), np.uint8)
            try:
                kept[checkpointer.save().id] = array.copy()
            except DirtyLogError as error:
                failures += 1
                assert "full" in str(error) or error.errno == errno.ENOSPC  # noqa: PT017 - the save after it is the point
                assert [one.id for one in checkpointer.list()] == sorted(kept)
                assert checkpointer.verify() == []
                # Room is made, which takes some: what a failed one had taken was given back.
                other.unlink()
                checkpointer.prune(Keep(last=1))
                kept = dict(list(kept.items())[-1:])
                other.write_bytes(bytes(64 * PAGE))
        assert failures > 1
        kept[checkpointer.save().id] = array.copy()
    for number, expected in kept.items():
        assert np.array_equal(dirtylog.restore(path, number)["array"], expected)


def test_a_mapped_restore_on_a_full_disk_is_an_error_and_no_signal(small_disk: Path) -> None:
    path = small_disk / "store"
    array = dirtylog.empty((400, PAGE), np.uint8)
    array[:] = np.random.default_rng(1).integers(0, 256, array.shape, np.uint8)
    with dirtylog.Checkpointer({"array": array}, path) as checkpointer:
        checkpointer.save()
    with pytest.raises(DirtyLogError, match="No space"):
        dirtylog.restore(path, mapped=True)
    assert np.array_equal(dirtylog.restore(path)["array"], array)

"""Copies of small stores in memory, cut off and changed on purpose."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from dirtylog.checkpoint import manifest, remote, segments
from dirtylog.checkpoint import pull as pulling
from dirtylog.checkpoint.folder import INDEX
from dirtylog.checkpoint.index import Index
from dirtylog.checkpoint.remote import Transferred, pull, push
from dirtylog.checkpoint.retention import Keep, prune
from dirtylog.checkpoint.store import Store
from dirtylog.checkpoint.verify import verify
from dirtylog.errors import (
    DirtyLogError,
)
from store_worlds import make_small, numbers, save

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MemoryFileSystem: Any = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem
URL = "memory://copy"


class CutOff(Exception):  # noqa: N818 - what a test raises
    pass


@contextmanager
def small_copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    make_small(monkeypatch)
    monkeypatch.setattr(remote, "PART_BYTES", 6 * 4096)
    monkeypatch.setattr(remote, "INDEX_PART_BYTES", 4 * 4096)
    monkeypatch.setattr(pulling, "_CHUNK_BYTES", 4096)
    MemoryFileSystem.store.clear()
    try:
        yield
    finally:
        MemoryFileSystem.store.clear()
        MemoryFileSystem.pseudo_dirs[:] = [""]


def push_of(path: Path, url: str = URL, **options: Any) -> Transferred:
    with Store(path) as store:
        return push(store, url, **options)


def is_sound(path: Path) -> bool:
    with Store(path) as store:
        return verify(store) == []


def save_more(path: Path, *states: int) -> None:
    with Store(path, write=True) as store:
        for state in states:
            save(store, state)


def objects() -> dict[str, bytes]:
    return {path.removeprefix("/copy/"): file.getvalue() for path, file in MemoryFileSystem.store.items()}


def numbers_at(path: Path, url: str = URL) -> set[int]:
    pull(url, path)
    assert is_sound(path)
    return numbers(path)


class Faults:
    """Cuts off at the operation ``at``, before it, in the middle of it, or after it."""

    OPERATIONS: ClassVar = ("pipe_file", "cat_file", "find", "rm_file")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at, self.where = 0, 0, "before"
        for name in self.OPERATIONS:
            monkeypatch.setattr(MemoryFileSystem, name, self._wrapped(name, getattr(MemoryFileSystem, name)))

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(files: Any, path: Any, *rest: Any, **options: Any) -> Any:
            self.count += 1
            if self.count != self.at:
                return original(files, path, *rest, **options)
            if name == "pipe_file" and self.where == "within" and not path.endswith(manifest.NAME):
                original(files, path, rest[0][: len(rest[0]) // 2])
            if name in ("pipe_file", "rm_file") and self.where == "after":
                original(files, path, *rest, **options)
            raise OSError("cut off here")

        return operation

    def run(self, at: int, where: str, call: Callable[[], object]) -> bool:
        """Return whether the call went to its end."""
        self.count, self.at, self.where = 0, at, where
        try:
            call()
        except DirtyLogError as error:
            assert "cut off here" in str(error)  # noqa: PT017 - it is not always raised
            return False
        finally:
            self.at = 0
        return self.count < at


def give_numbers_again(path: Path) -> None:
    """Leave the newest checkpoint alone, in segments that have the numbers of those that went."""
    with Store(path, write=True) as store:
        prune(store, Keep(last=1), live_share=1.0)
        lengths, rows = store.index.segments(), store.index.batches()
        again = {number: at for at, number in enumerate(sorted(lengths), 1)}
        for number, new in again.items():
            segments.path_of(store.folder, number).rename(segments.path_of(store.folder, new))
        with store.index.transaction():
            for number in again:
                store.index.drop_segment(number)
            for number, new in again.items():
                store.index.put_segment(new, lengths[number])
            store.index.put_batches([row._replace(segment=again[row.segment]) for row in rows])


def cut_off_at_commit(patch: pytest.MonkeyPatch) -> None:
    original = Index.backup

    def backup(index: Index, path: Path) -> None:
        if path.name == INDEX:
            raise CutOff
        original(index, path)

    patch.setattr(Index, "backup", backup)

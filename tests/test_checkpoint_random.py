"""Anything in any order: writes, saves, saves that fail or are given up, prunes, reopenings; every kept checkpoint is as it was."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dirtylog
from dirtylog.checkpoint.retention import Keep, collect
from dirtylog.checkpoint.segments import SegmentWriter
from dirtylog.checkpoint.store import Store
from dirtylog.errors import DirtyLogError
from store_worlds import PAGE, make_small

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

STEPS = 400 if os.environ.get("DIRTYLOG_LONG") else 60


class Program:
    """A program with two arrays that does whatever comes into its mind, and remembers what it saved."""

    def __init__(self, path: Path, compression: str, checksum: str, seed: int, patch: pytest.MonkeyPatch) -> None:
        self._path, self._compression, self._checksum, self._patch = path, compression, checksum, patch
        self._random = np.random.default_rng(seed)
        # The first begins in the midst of a page, and ends in one.
        self._arrays: dict[str, NDArray[Any]] = {
            "bytes": dirtylog.empty(40 * PAGE, np.uint8)[1000:-500],
            "table": dirtylog.empty((30, PAGE // 8), np.float64),
        }
        self.kept: dict[int, dict[str, NDArray[Any]]] = {}
        self._open()

    def _open(self) -> None:
        self._checkpointer = dirtylog.Checkpointer(self._arrays, self._path, compression=self._compression, checksum=self._checksum)

    def _keep(self, number: int) -> None:
        assert number not in self.kept
        self.kept[number] = {name: array.copy() for name, array in self._arrays.items()}

    def step(self) -> None:
        self._write()
        actions = (self._save, self._save, self._fail, self._in_background, self._prune, self._reopen, self._restore, self._check)
        actions[int(self._random.integers(len(actions)))]()

    def _write(self) -> None:
        for array in self._arrays.values():
            flat = array.reshape(-1)
            for _ in range(int(self._random.integers(4))):
                at, length = int(self._random.integers(len(flat))), int(self._random.integers(1, 6000))
                value = self._random.integers(0, 250, length) if self._random.integers(3) else 0
                flat[at : at + length] = value if isinstance(value, int) else value[: len(flat) - at]

    def _save(self) -> None:
        self._keep(self._checkpointer.save().id)

    def _fail(self) -> None:
        """Fail at some write, or at the sync."""
        left = int(self._random.integers(4))
        name = str(self._random.choice(["append", "sync"]))
        original = getattr(SegmentWriter, name)

        def failing(writer: SegmentWriter, *arguments: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise DirtyLogError("a failing disk")
            return original(writer, *arguments)

        with self._patch.context() as patch, suppress(DirtyLogError):
            patch.setattr(SegmentWriter, name, failing)
            self._keep(self._checkpointer.save().id)

    def _in_background(self) -> None:
        saving = self._checkpointer.begin()
        self._write()
        if self._random.integers(3):
            self._keep(saving.finish().id)
        else:
            saving.abandon()

    def _prune(self) -> None:
        keep = Keep(last=int(self._random.integers(1, 5)), hourly=int(self._random.integers(2)))
        stay = keep.chosen(self._checkpointer.list())
        self._checkpointer.prune(keep)
        if self._random.integers(2):
            collect(self._checkpointer.store, live_share=float(self._random.random() * 1.2))
        self.kept = {number: arrays for number, arrays in self.kept.items() if number in stay}

    def _reopen(self) -> None:
        self._checkpointer.close()
        self._open()

    def _restore(self) -> None:
        if self.kept:
            number = int(self._random.choice(list(self.kept)))
            self._checkpointer.restore(number)
            for name, array in self._arrays.items():
                assert np.array_equal(array, self.kept[number][name])

    def _check(self) -> None:
        assert [one.id for one in self._checkpointer.list()] == sorted(self.kept)
        for number, arrays in self.kept.items():
            found = dirtylog.restore(self._path, number, mapped=bool(self._random.integers(2)))
            assert found.keys() == arrays.keys()
            for name, array in arrays.items():
                assert np.array_equal(found[name], array), f"{name} of checkpoint {number}"

    def end(self) -> None:
        self._check()
        assert self._checkpointer.verify() == []
        self._checkpointer.close()
        with Store(self._path) as store:
            known = set(store.index.segments())
        assert {int(one.stem) for one in (self._path / "segments").iterdir()} <= known


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
@pytest.mark.parametrize("checksum", ["xxh3", "crc32", "blake2b", "sha256"])
def test_anything_in_any_order(tmp_path: Path, compression: str, checksum: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    seed = sum(map(ord, compression + checksum))
    program = Program(tmp_path / "store", compression, checksum, seed, monkeypatch)
    for _ in range(STEPS):
        program.step()
    program.end()

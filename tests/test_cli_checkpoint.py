"""Checkpoints on the command line, run as a user runs them."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest

import dirtylog as library
from address_space import ANONYMOUS, SHARED
from cli_targets import GUEST, KINDS, SPIN, named
from dirtylog.checkpoint.restore import read_slot
from dirtylog.checkpoint.store import Store
from dirtylog.cli.progress import Progress
from puppets import Puppet
from victims import needs_victims
from writers import dirtylog, eventually, finish, start

if TYPE_CHECKING:
    from collections.abc import Iterator


def count_in(path: Path) -> int:
    try:
        with Store(path) as store:
            return len(store.checkpoints())
    except library.DirtyLogError:
        return 0  # it is being made


@pytest.fixture(params=KINDS)
def target(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    with named(request.param) as words:
        yield words


def test_checkpoints_are_saved_listed_verified_restored_and_pruned(target: list[str], tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    ran = dirtylog("checkpoint", "-d", path, "--every", "100ms", "--count", "3", "--note", "mine", *target)
    assert ran.status == 0, ran.err
    lines = [line for line in ran.out.splitlines() if line.startswith("checkpoint ")]
    assert [bool(re.search(r"all memory", line)) for line in lines] == [True, False, False]
    assert "blind spot: " in ran.out
    listed = json.loads(dirtylog("checkpoints", path, "--json").out)
    assert listed["schema"] == "dirtylog/checkpoints/1"
    assert [(one["id"], one["parent"], one["whole"], one["note"]) for one in listed["checkpoints"]] == [
        *((1, None, True, "mine"), (2, 1, False, "mine"), (3, 2, False, "mine")),
    ]
    text = dirtylog("checkpoints", path).out.splitlines()
    assert [line.split()[0] for line in text] == ["checkpoint", "1", "2", "3"]
    verified = dirtylog("verify", path)
    assert (verified.status, verified.out) == (0, "3 checkpoints, all pages are as they were saved\n")
    found = json.loads(dirtylog("diff", path, "1", "3", "--json").out)
    assert any(slot["runs"] for slot in found["slots"])
    assert dirtylog("diff", path, "2", "2").out == "no page differs\n"
    assert dirtylog("restore", path, "2", "-o", str(tmp_path / "out")).status == 0
    with Store(path) as store:
        checkpoint, maps = store.checkpoint(2), store.maps(2)
        files = {int(file.stem.split("-")[0], 16): file for file in (tmp_path / "out").iterdir()}
        assert len(files) == len(checkpoint.slots)
        for slot in checkpoint.slots:
            out = np.empty((slot.npages, slot.page_size), np.uint8)
            read_slot(store, maps[slot.key], out)
            assert np.array_equal(np.fromfile(files[slot.base_gfn * slot.page_size], np.uint8), out.reshape(-1))
    dry = dirtylog("prune", path, "--keep", "last 1", "--dry-run")
    assert dry.out == "would keep 1 of 3 checkpoints, and drop 1, 2\n"
    assert count_in(Path(path)) == 3
    assert dirtylog("prune", path, "--keep", "last 1").status == 0
    assert count_in(Path(path)) == 1
    assert dirtylog("verify", path).status == 0


def test_an_interrupted_run_keeps_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with start("checkpoint", "-d", str(path), "emu:arm:random", *GUEST, "--every", "50ms", "--keep", "last 4") as process:
        try:
            eventually(lambda: count_in(path) >= 3, "three checkpoints")
            process.send_signal(signal.SIGINT)
            ended = finish(process)
        finally:
            process.kill()
    assert ended.status == 130
    assert "Traceback" not in ended.err
    assert count_in(path) <= 4
    assert dirtylog("verify", str(path)).status == 0


def test_of_a_target_that_vanishes_what_was_saved_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "store"
    spinner = subprocess.Popen([sys.executable, "-c", SPIN])
    with spinner, start("checkpoint", "-d", str(path), f"pid:{spinner.pid}", "--every", "100ms") as process:
        try:
            eventually(lambda: count_in(path) >= 2, "two checkpoints")
            spinner.kill()
            ended = finish(process)
        finally:
            process.kill()
            spinner.kill()
    assert ended.status == 5
    assert "Traceback" not in ended.err
    assert count_in(path) >= 2
    assert dirtylog("verify", str(path)).status == 0


@needs_victims
def test_a_gap_that_is_over_before_the_end_is_told_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with Puppet() as puppet:
        shared = puppet.map(4, SHARED | ANONYMOUS)
        words = ("checkpoint", "-d", str(path), f"pid:{puppet.pid}", "--every", "200ms", "--count", "8")
        with start(*words) as process:
            try:
                eventually(lambda: count_in(path) >= 1, "a checkpoint")
                puppet.unmap(shared, 4)
                ended = finish(process)
            finally:
                process.kill()
    assert ended.status == 6
    assert "shared" in ended.err
    assert "incomplete: " not in ended.out


def test_arrays_are_restored_as_npy_files(tmp_path: Path) -> None:
    array = library.empty((30, 7), "float32")
    array[:] = np.random.default_rng(1).random(array.shape)
    with library.Checkpointer({"weights/of layer 1": array}, tmp_path / "store") as saver:
        saver.save()
    ran = dirtylog("restore", str(tmp_path / "store"), "-o", str(tmp_path / "out"))
    assert ran.status == 0, ran.err
    (file,) = (tmp_path / "out").iterdir()
    assert file.suffix == ".npy"
    assert np.array_equal(np.load(file), array)
    again = dirtylog("restore", str(tmp_path / "store"), "-o", str(tmp_path / "out"))
    assert (again.status, "exists" in again.err) == (2, True)
    assert dirtylog("restore", str(tmp_path / "store"), "-o", str(tmp_path / "out"), "-f").status == 0


def test_verify_names_each_planted_corruption(tmp_path: Path) -> None:
    array = library.empty((600, 4096), "uint8")
    array[:] = np.random.default_rng(2).integers(0, 256, array.shape)
    with library.Checkpointer({"state": array}, tmp_path / "store") as saver:
        saver.save()
        array[40:50] += 1
        saver.save()
        folder = saver.store.folder
    (segment,) = folder.iterdir()
    with segment.open("r+b") as file:
        for page, bit in ((3, 0), (300, 5), (301, 7), (600 + 4, 1)):
            file.seek(page * 4096 + 17)
            octet = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([octet ^ 1 << bit]))
    ran = dirtylog("verify", str(tmp_path / "store"))
    assert ran.status == 7
    lines = ran.out.splitlines()
    assert [line.partition(": ")[0] for line in lines[:-1]] == [
        "checkpoint 1, state, page 3",
        "checkpoint 1, state, pages 300 to 301",
        "checkpoint 2, state, page 44",
    ]
    assert lines[-1] == "2 checkpoints, 3 differences"
    assert dirtylog("restore", str(tmp_path / "store"), "1", "-o", str(tmp_path / "out")).status == 7
    assert list((tmp_path / "out").iterdir()) == []


def test_a_store_is_pushed_and_pulled(tmp_path: Path) -> None:
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    array = library.empty((50, 4096), "uint8")
    with library.Checkpointer({"a": array}, tmp_path / "store") as saver:
        array[:40] = 3
        saver.save("one")
        first = dirtylog("push", str(tmp_path / "store"), str(tmp_path / "copy"))
        assert (first.status, first.err) == (0, "")
        array[7] = 4
        saver.save("two")
    again = dirtylog("push", str(tmp_path / "store"), f"file://{tmp_path / 'copy'}")
    assert again.status == 0
    assert re.match(r"sent \d+ objects, .* of .* to file://", again.out)
    assert dirtylog("pull", str(tmp_path / "copy"), str(tmp_path / "back")).status == 0
    assert dirtylog("checkpoints", str(tmp_path / "back")).out == dirtylog("checkpoints", str(tmp_path / "store")).out
    assert np.array_equal(library.restore(tmp_path / "back")["a"], array)
    nothing = dirtylog("pull", str(tmp_path / "nowhere"), str(tmp_path / "new"))
    assert nothing.status == 2
    assert "Traceback" not in nothing.err


@pytest.mark.parametrize(
    ("words", "status", "why"),
    [
        (["checkpoint", "emu:arm"], 2, "required: -d"),
        (["checkpoint", "emu:arm", "-d", "{tmp}/full"], 2, "is no checkpoint store, and it is not empty"),
        (["checkpoint", "emu:arm", "-d", "{tmp}/a", "--keep", "forever"], 2, "write last, hourly, daily or weekly"),
        (["checkpoint", "emu:arm", "-d", "{tmp}/a", "--compression", "rar"], 2, "invalid choice"),
        (["checkpoint", "-d", "{tmp}/a"], 2, "no TARGET"),
        (["checkpoints", "{tmp}/none"], 2, "is no checkpoint store"),
        (["verify", "{tmp}/full"], 2, "is no checkpoint store"),
        (["prune", "{tmp}/none", "--keep", "last 1"], 2, "is no checkpoint store"),
        (["prune", "{tmp}/full"], 2, "required: --keep"),
        (["diff", "{tmp}/store", "1", "99"], 2, "has no checkpoint 99"),
        (["restore", "{tmp}/store", "99", "-o", "{tmp}/out"], 2, "has no checkpoint 99"),
        (["restore", "{tmp}/store", "-o", "{tmp}/store/out"], 2, "lies in the store itself"),
    ],
)
def test_bad_input_is_told_in_a_sentence(words: list[str], status: int, why: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    with library.Checkpointer({"a": library.empty(10)}, tmp_path / "store") as saver:
        saver.save()
    ran = dirtylog(*(word.format(tmp=tmp_path) for word in words))
    assert (ran.status, why in ran.err) == (status, True), ran.err
    assert "Traceback" not in ran.err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_a_second_writer_is_refused_by_the_first_ones_number(tmp_path: Path) -> None:
    with library.Checkpointer({"a": library.empty(10)}, tmp_path / "store") as saver:
        saver.save()
        ran = dirtylog("prune", str(tmp_path / "store"), "--keep", "last 1")
        assert ran.status == 4
        assert f"is being written by process {os.getpid()}" in ran.err
        assert dirtylog("verify", str(tmp_path / "store")).status == 0


class Terminal(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_has_its_rate_and_what_is_left_and_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 2.0, 2.05, 3.0])
    monkeypatch.setattr("dirtylog.cli.progress.time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with Progress("checkpoint") as progress:
        progress(1 << 30, 4 << 30)
        progress(2 << 30, 4 << 30)  # too soon after the one before to be shown
        progress(3 << 30, 4 << 30)
    shown = [line.strip() for line in terminal.getvalue().split("\r") if line.strip()]
    assert shown == ["checkpoint: 25 % of 4 GiB, 512 MiB/s, 6 s left", "checkpoint: 75 % of 4 GiB, 1 GiB/s, 1 s left"]
    assert terminal.getvalue().endswith("\r")
    now = iter([0.0, 2.0])
    monkeypatch.setattr("sys.stderr", file := io.StringIO())
    with Progress("checkpoint") as progress:
        progress(1, 4)
    assert file.getvalue() == ""

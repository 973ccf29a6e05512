from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from dirtylog.checkpoint import location, manifest, segments
from dirtylog.checkpoint import pull as pulling
from dirtylog.checkpoint.index import Index
from dirtylog.checkpoint.remote import pull
from dirtylog.checkpoint.retention import Keep, prune
from dirtylog.checkpoint.store import Store
from remote_copies import (
    URL,
    CutOff,
    Faults,
    MemoryFileSystem,
    cut_off_at_commit,
    is_sound,
    numbers_at,
    objects,
    push_of,
    small_copies,
)
from store_worlds import build, numbers, save

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with small_copies(monkeypatch):
        yield


@pytest.mark.parametrize("where", ["before", "within", "after"])
def test_a_push_is_cut_off_at_every_operation(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = Faults(monkeypatch)
    build(tmp_path / "store", 3)
    push_of(tmp_path / "store")
    with Store(tmp_path / "store", write=True) as store:
        save(store, 4)
        prune(store, Keep(last=2), live_share=1.0)
        save(store, 5)
    before = dict(MemoryFileSystem.store)
    at = 0
    done = False
    while not done:
        at += 1
        MemoryFileSystem.store.clear()
        MemoryFileSystem.store.update(before)
        done = faults.run(at, where, lambda: push_of(tmp_path / "store"))
        pull(URL, tmp_path / f"between{at}")
        assert numbers(tmp_path / f"between{at}") in ({1, 2, 3}, {3, 4, 5})
        push_of(tmp_path / "store")
        assert numbers_at(tmp_path / f"after{at}") == {3, 4, 5}
        found = manifest.read(location.Location(URL))
        assert found is not None
        assert set(objects()) == {manifest.NAME, *(part.name for part in found.objects)}
    assert at > 15


def test_a_push_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = Faults(monkeypatch)
    build(tmp_path / "store", 4)
    whole = push_of(tmp_path / "store")
    operations = faults.count
    MemoryFileSystem.store.clear()
    assert not faults.run(operations - 4, "before", lambda: push_of(tmp_path / "store"))
    assert whole.objects > 8
    assert push_of(tmp_path / "store").objects < 5


def test_a_pull_is_cut_off_at_every_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = Faults(monkeypatch)
    build(tmp_path / "store", 3)
    push_of(tmp_path / "store")
    at, done = 0, False
    while not done:
        at += 1
        new = tmp_path / f"new{at}"
        done = faults.run(at, "before", partial(pull, URL, new))
        # The first operation reads the manifest, before anything is made.
        assert new.exists() == (at > 1)
        if new.exists():
            assert numbers(new) == ({1, 2, 3} if done else set())
        assert numbers_at(new) == {1, 2, 3}
    assert at > 15

    with Store(tmp_path / "store", write=True) as store:
        save(store, 4)
        prune(store, Keep(last=2), live_share=1.0)
        save(store, 5)
    push_of(tmp_path / "store")
    at, done = 0, False
    while not done:
        at += 1
        old = tmp_path / f"old{at}"
        shutil.copytree(tmp_path / "new2", old)
        done = faults.run(at, "before", partial(pull, URL, old))
        assert numbers(old) == ({3, 4, 5} if done else {1, 2, 3})
        assert is_sound(old)
        assert numbers_at(old) == {3, 4, 5}
    assert at > 10


def test_a_pull_that_was_cut_off_goes_on_within_an_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = Faults(monkeypatch)
    build(tmp_path / "store", 4)
    push_of(tmp_path / "store")
    faults.count = 0
    whole = pull(URL, tmp_path / "whole")
    operations = faults.count
    assert not faults.run(operations - 1, "before", lambda: pull(URL, tmp_path / "back"))
    assert pull(URL, tmp_path / "back").nbytes <= 2 * 4096 < whole.nbytes
    assert numbers(tmp_path / "back") == {1, 2, 3, 4}


@pytest.mark.parametrize("stage", ["_renumber", "write_synced", "_remove_pulled", "backup", "drop"])
def test_a_pull_is_cut_off_while_it_puts_the_index_in_place(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "store", 3)
    push_of(tmp_path / "store")
    pull(URL, tmp_path / "back")
    with Store(tmp_path / "store", write=True) as store:
        save(store, 4)
        prune(store, Keep(last=1), live_share=1.0)
    push_of(tmp_path / "store")

    def cut_off(*arguments: Any) -> None:
        if stage == "_remove_pulled" and arguments[0].name != "pulled.sqlite":
            return
        raise CutOff

    with monkeypatch.context() as patch:
        owner: Any = {"backup": Index, "drop": segments}.get(stage, pulling)
        name = "_remove" if stage == "_remove_pulled" else stage
        if stage == "backup":
            cut_off_at_commit(patch)
        else:
            patch.setattr(owner, name, cut_off)
        with pytest.raises(CutOff):
            pull(URL, tmp_path / "back")
    assert numbers(tmp_path / "back") == ({4} if stage in ("_remove_pulled", "drop") else {1, 2, 3})
    assert numbers_at(tmp_path / "back") == {4}


_KILLED = """
import os, signal, sys
from dirtylog.checkpoint import pull as pulling, remote
from dirtylog.checkpoint.store import Store
what, here, url, at = sys.argv[1:]
remote.PART_BYTES, remote.INDEX_PART_BYTES, pulling._CHUNK_BYTES = 6 * 4096, 4 * 4096, 4096
told = []
def progress(done, total):
    told.append(done)
    if len(told) == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
if what == "push":
    with Store(here) as store:
        remote.push(store, url, progress=progress)
else:
    remote.pull(url, here, progress=progress)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("at", [1, 3, 8, 14, 1000])
def test_the_process_is_killed(at: int, tmp_path: Path) -> None:
    build(tmp_path / "store", 3)
    url = (tmp_path / "copy").as_uri()
    push_of(tmp_path / "store", url)
    pull(url, tmp_path / "back")
    with Store(tmp_path / "store", write=True) as store:
        prune(store, Keep(last=1), live_share=1.0)
        save(store, 4)
    for what, here in (("push", "store"), ("pull", "back")):
        command = [sys.executable, "-c", _KILLED, what, str(tmp_path / here), url, str(at)]
        done = subprocess.run(command, check=False, stderr=subprocess.PIPE)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert numbers(tmp_path / "back") in ({1, 2, 3}, {3, 4})
        pull(url, tmp_path / f"other-{what}")
        assert numbers(tmp_path / f"other-{what}") in ({1, 2, 3}, {3, 4})
        push_of(tmp_path / "store", url)
    assert numbers_at(tmp_path / "back", url) == {3, 4}

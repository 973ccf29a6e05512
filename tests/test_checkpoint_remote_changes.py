from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dirtylog.checkpoint import manifest, segments
from dirtylog.checkpoint.folder import LOCK, Lock
from dirtylog.checkpoint.remote import pull
from dirtylog.checkpoint.retention import Keep, prune
from dirtylog.checkpoint.store import Store
from dirtylog.errors import (
    AccessDeniedError,
    CorruptDataError,
    DirtyLogError,
    InvalidArgumentError,
)
from remote_copies import (
    URL,
    CutOff,
    MemoryFileSystem,
    cut_off_at_commit,
    give_numbers_again,
    is_sound,
    numbers_at,
    objects,
    push_of,
    save_more,
    small_copies,
)
from store_worlds import build, numbers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with small_copies(monkeypatch):
        yield


def test_damaged_objects_are_found_and_named(tmp_path: Path) -> None:
    build(tmp_path / "store", 3)
    push_of(tmp_path / "store")
    files: Any = MemoryFileSystem()
    names = [name for name in objects() if name != manifest.NAME]
    for at, name in enumerate(names):
        good = objects()[name]
        for way, bad in enumerate((good[:7] + bytes([good[7] ^ 1]) + good[8:], good[:-1], None)):
            back = tmp_path / f"back{at}-{way}"
            if bad is None:
                files.rm_file(f"/copy/{name}")
            else:
                files.pipe_file(f"/copy/{name}", bad)
            with pytest.raises(CorruptDataError, match=name):
                pull(URL, back)
            assert numbers(back) == set()
            # What is cut short or missing is sent again.
            if bad is None or len(bad) < len(good):
                assert push_of(tmp_path / "store").objects >= 1
            else:
                files.pipe_file(f"/copy/{name}", good)
            assert numbers_at(back) == {1, 2, 3}


def test_a_damaged_manifest_is_found(tmp_path: Path) -> None:
    build(tmp_path / "store", 2)
    push_of(tmp_path / "store")
    good = objects()[manifest.NAME]
    for bad in (good[:-1], good[: len(good) // 2], b"", b"[]", b"{}", good.replace(b'"end": 2', b'"end": 3', 1)):
        MemoryFileSystem().pipe_file(f"/copy/{manifest.NAME}", bad)
        with pytest.raises(CorruptDataError, match=r"manifest\.json"):
            pull(URL, tmp_path / "back")
        with pytest.raises(CorruptDataError, match=r"manifest\.json"):
            push_of(tmp_path / "store")


def test_a_number_that_a_segment_had_before_is_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "store", 3)
    push_of(tmp_path / "store")
    pull(URL, tmp_path / "back")
    give_numbers_again(tmp_path / "store")
    assert numbers(tmp_path / "store") == {3}
    assert push_of(tmp_path / "store").nbytes
    with monkeypatch.context() as patch:
        cut_off_at_commit(patch)
        with pytest.raises(CutOff):
            pull(URL, tmp_path / "back")
    assert numbers(tmp_path / "back") == {1, 2, 3}
    assert numbers_at(tmp_path / "back") == {3}
    save_more(tmp_path / "store", 4)
    push_of(tmp_path / "store")
    fetched = pull(URL, tmp_path / "back").nbytes
    assert fetched < pull(URL, tmp_path / "fresh").nbytes
    assert numbers_at(tmp_path / "back") == numbers_at(tmp_path / "fresh") == {3, 4}


@pytest.mark.parametrize("when", [1, 2])
def test_a_number_that_is_given_again_during_a_push(when: int, tmp_path: Path) -> None:
    build(tmp_path / "store", 3)
    push_of(tmp_path / "store")
    save_more(tmp_path / "store", 4)
    told: list[int] = []

    def move(done: int, _total: int) -> None:
        told.append(done)
        if len(told) == when:
            give_numbers_again(tmp_path / "store")

    push_of(tmp_path / "store", progress=move)
    assert numbers_at(tmp_path / "back") == {4}


def test_pages_that_are_moved_during_a_push(tmp_path: Path) -> None:
    build(tmp_path / "store", 4)
    told: list[bool] = []

    def move(_done: int, _total: int) -> None:
        if not told:
            told.append(True)
            with Store(tmp_path / "store", write=True) as store:
                prune(store, Keep(last=1), live_share=1.0)

    push_of(tmp_path / "store", progress=move)
    assert numbers_at(tmp_path / "back") == {4}


def test_objects_that_are_removed_during_a_pull(tmp_path: Path) -> None:
    build(tmp_path / "store", 4)
    push_of(tmp_path / "store")
    told: list[bool] = []

    def move(_done: int, _total: int) -> None:
        if not told:
            told.append(True)
            with Store(tmp_path / "store", write=True) as store:
                prune(store, Keep(last=1), live_share=1.0)
            push_of(tmp_path / "store")

    pull(URL, tmp_path / "back", progress=move)
    assert numbers(tmp_path / "back") == {4}
    assert is_sound(tmp_path / "back")


def test_what_is_damaged_here_is_fetched_again(tmp_path: Path) -> None:
    build(tmp_path / "store", 3)
    push_of(tmp_path / "store")
    pull(URL, tmp_path / "back")
    path = segments.path_of(tmp_path / "back" / "segments", 1)
    octets = np.fromfile(path, np.uint8)
    octets[100] ^= 1
    octets.tofile(path)
    assert not is_sound(tmp_path / "back")
    pull(URL, tmp_path / "back")
    assert not is_sound(tmp_path / "back")
    pull(URL, tmp_path / "back", check=True)
    assert is_sound(tmp_path / "back")


def test_two_pushes_at_once(tmp_path: Path) -> None:
    build(tmp_path / "store", 3)
    told: list[bool] = []

    def other(_done: int, _total: int) -> None:
        if not told:
            told.append(True)
            push_of(tmp_path / "store")

    with pytest.raises(DirtyLogError, match="somebody else pushed"):
        push_of(tmp_path / "store", progress=other)
    assert numbers_at(tmp_path / "back") == {1, 2, 3}


def test_of_two_pulls_at_once_one_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "store", 2)
    push_of(tmp_path / "store")
    refused = []

    def second(_done: int, _total: int) -> None:
        with pytest.raises(AccessDeniedError) as caught:
            pull(URL, tmp_path / "back")
        refused.append(caught.value.pid)

    pull(URL, tmp_path / "back", progress=second)
    assert set(refused) == {os.getpid()}
    assert numbers(tmp_path / "back") == {1, 2}
    Lock(tmp_path / "back" / LOCK).close()


def test_a_segment_that_another_has_followed_during_a_push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "FULL_BYTES", 1 << 30)
    build(tmp_path / "store", 2)
    told: list[bool] = []

    def move(_done: int, _total: int) -> None:
        if not told:
            told.append(True)
            with Store(tmp_path / "store") as store:
                (before,) = store.index.segments().items()
            give_numbers_again(tmp_path / "store")
            save_more(tmp_path / "store", 3, 4, 5, 6)
            with Store(tmp_path / "store") as store:
                (after,) = store.index.segments().items()
            # No length tells that it is another.
            assert after[0] == before[0]
            assert after[1] > before[1]

    push_of(tmp_path / "store", progress=move)
    assert numbers_at(tmp_path / "back") == {2, 3, 4, 5, 6}


def test_an_object_that_does_not_stay_is_noticed_by_the_push(tmp_path: Path) -> None:
    build(tmp_path / "store", 3)
    files: Any = MemoryFileSystem()

    def lose(done: int, total: int) -> None:
        if done == total:
            files.pipe_file(f"/copy/{min(objects())}", b"")

    with pytest.raises(CorruptDataError, match="has 0 bytes"):
        push_of(tmp_path / "store", progress=lose)
    assert manifest.NAME not in objects()
    push_of(tmp_path / "store")
    assert numbers_at(tmp_path / "back") == {1, 2, 3}


def test_a_copy_that_has_gone_back_takes_nothing_away(tmp_path: Path) -> None:
    build(tmp_path / "store", 2)
    push_of(tmp_path / "store")
    pull(URL, tmp_path / "old")
    save_more(tmp_path / "store", 3)
    push_of(tmp_path / "store")
    pull(URL, tmp_path / "back")
    MemoryFileSystem.store.clear()
    push_of(tmp_path / "old")
    with pytest.raises(InvalidArgumentError, match="lacks: 3"):
        pull(URL, tmp_path / "back")
    assert numbers(tmp_path / "back") == {1, 2, 3}


def test_half_an_object_that_is_something_else_is_fetched_again(tmp_path: Path) -> None:
    build(tmp_path / "store", 2)
    push_of(tmp_path / "store")

    def stop(done: int, _total: int) -> None:
        if done:
            raise CutOff

    with pytest.raises(CutOff):
        pull(URL, tmp_path / "back", progress=stop)
    path = segments.path_of(tmp_path / "back" / "segments", 1)
    path.write_bytes(b"junk" * 25)
    assert numbers_at(tmp_path / "back") == {1, 2}

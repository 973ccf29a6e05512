from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from dirtylog.checkpoint import manifest
from dirtylog.checkpoint.remote import pull
from dirtylog.checkpoint.retention import Keep, prune
from dirtylog.checkpoint.store import Store
from dirtylog.errors import (
    AccessDeniedError,
    DirtyLogError,
    InvalidArgumentError,
    UnsupportedError,
)
from remote_copies import (
    URL,
    MemoryFileSystem,
    is_sound,
    numbers_at,
    objects,
    push_of,
    save_more,
    small_copies,
)
from store_worlds import build, numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

fsspec: Any = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with small_copies(monkeypatch):
        yield


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    pytest.importorskip("flask_cors")
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"AWS_EC2_METADATA_DISABLED": "true"},
    )
    assert server.stderr is not None
    try:
        url = next(line.split()[-1] for line in server.stderr if "Running on" in line)
        # It tells every request, and would wait for somebody to read that.
        reader = threading.Thread(target=server.stderr.read)
        reader.start()
        yield url
        server.kill()
        reader.join()
    finally:
        server.kill()
        server.communicate()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the options by which a bucket of that server is reached, and nothing outside of this machine."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    return {"endpoint_url": s3_server, "client_kwargs": {"region_name": "eu-west-1"}}


def _keys(options: dict[str, Any]) -> dict[str, Any]:
    return options | {"key": "a-key", "secret": "a-secret"}


@pytest.fixture(params=["memory", "file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    if request.param == "memory":
        return URL, {}
    if request.param == "file":
        return (tmp_path / "elsewhere" / "copy").as_uri(), {}
    options = _keys(request.getfixturevalue("s3"))
    bucket = f"bucket-{abs(hash(request.node.name)) % 10**9}"
    files = fsspec.filesystem("s3", **options)
    if not files.exists(bucket):
        files.mkdir(bucket)
    return f"s3://{bucket}/some/copy", options


def test_copies_go_there_and_back(place: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    url, options = place
    build(tmp_path / "store", 4)
    sent = push_of(tmp_path / "store", url, storage_options=options, read_back=True)
    assert sent.nbytes == sent.total
    assert sent.checkpoints == 4
    fetched = pull(url, tmp_path / "back", storage_options=options)
    assert numbers(tmp_path / "back") == {1, 2, 3, 4}
    assert is_sound(tmp_path / "back")
    assert fetched.total == sent.total
    assert push_of(tmp_path / "store", url, storage_options=options).objects == 0
    assert pull(url, tmp_path / "back", storage_options=options).objects == 0

    save_more(tmp_path / "store", 5)
    more = push_of(tmp_path / "store", url, storage_options=options)
    assert 0 < more.nbytes < sent.nbytes
    got = pull(url, tmp_path / "back", storage_options=options)
    assert 0 < got.nbytes < sent.nbytes
    assert numbers(tmp_path / "back") == {1, 2, 3, 4, 5}

    with Store(tmp_path / "store", write=True) as store:
        prune(store, Keep(last=1), live_share=1.0)
    assert push_of(tmp_path / "store", url, storage_options=options).removed
    assert pull(url, tmp_path / "back", storage_options=options).removed
    assert numbers(tmp_path / "back") == {5}
    assert is_sound(tmp_path / "back")
    # A copy is a store.
    save_more(tmp_path / "back", 6)
    assert numbers(tmp_path / "back") == {5, 6}


def test_what_was_sent_is_not_sent_again(tmp_path: Path) -> None:
    build(tmp_path / "store", 3)
    push_of(tmp_path / "store")
    before = objects()
    with Store(tmp_path / "store") as store:
        lengths = store.index.segments()
    save_more(tmp_path / "store", 4)
    with Store(tmp_path / "store") as store:
        grown = sum(store.index.segments().values()) - sum(lengths.values())
    sent = push_of(tmp_path / "store")
    new = {name: data for name, data in objects().items() if name not in before}
    assert sum(len(data) for name, data in new.items() if name.startswith("segments/")) == grown
    assert sent.nbytes == sum(map(len, new.values()))
    assert {name: data for name, data in objects().items() if name in before and name != manifest.NAME}.items() <= before.items()


def test_progress_ends_at_all(tmp_path: Path) -> None:
    build(tmp_path / "store", 3)
    told: list[tuple[int, int]] = []
    push_of(tmp_path / "store", progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1] > 0
    told.clear()
    pull(URL, tmp_path / "back", progress=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] > 0


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "store", 2)
    push_of(tmp_path / "store")
    found = json.loads(objects()[manifest.NAME])
    MemoryFileSystem().pipe_file(f"/copy/{manifest.NAME}", json.dumps(found | {"version": 2}).encode())
    calls: list[Callable[[], object]] = [partial(push_of, tmp_path / "store"), partial(pull, URL, tmp_path / "back")]
    for call in calls:
        with pytest.raises(UnsupportedError, match="version 2"):
            call()


def test_a_copy_with_checkpoints_of_its_own_is_left_alone(tmp_path: Path) -> None:
    build(tmp_path / "store", 2)
    push_of(tmp_path / "store")
    pull(URL, tmp_path / "back")
    save_more(tmp_path / "back", 3)
    with pytest.raises(InvalidArgumentError, match="lacks: 3"):
        pull(URL, tmp_path / "back")
    save_more(tmp_path / "store", 3)
    push_of(tmp_path / "store")
    with pytest.raises(InvalidArgumentError, match="lacks: 3"):
        pull(URL, tmp_path / "back")
    with pytest.raises(InvalidArgumentError, match="another store's"):
        push_of(tmp_path / "back")
    assert numbers(tmp_path / "back") == {1, 2, 3}


def test_a_push_does_not_take_back_what_is_there(tmp_path: Path) -> None:
    build(tmp_path / "store", 2)
    push_of(tmp_path / "store")
    pull(URL, tmp_path / "old")
    save_more(tmp_path / "store", 3)
    push_of(tmp_path / "store")
    with pytest.raises(InvalidArgumentError, match="has checkpoint 3, and the newest here is 2"):
        push_of(tmp_path / "old")
    build(tmp_path / "other", 5)
    with pytest.raises(InvalidArgumentError, match="another store's"):
        push_of(tmp_path / "other")
    assert numbers_at(tmp_path / "back") == {1, 2, 3}


def test_a_store_that_is_being_written_is_refused(tmp_path: Path) -> None:
    build(tmp_path / "store", 2)
    push_of(tmp_path / "store")
    pull(URL, tmp_path / "back")
    with Store(tmp_path / "back", write=True), pytest.raises(AccessDeniedError, match="is being written"):
        pull(URL, tmp_path / "back")


def test_something_else_is_left_alone(tmp_path: Path) -> None:
    build(tmp_path / "store", 1)
    push_of(tmp_path / "store")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    with pytest.raises(InvalidArgumentError, match="not empty"):
        pull(URL, tmp_path / "mine")
    with pytest.raises(InvalidArgumentError, match="no copy"):
        pull("memory://nothing", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    MemoryFileSystem().pipe_file("/copy/segments/mine", b"x")
    save_more(tmp_path / "store", 2)
    push_of(tmp_path / "store")
    assert objects()["segments/mine"] == b"x"


def test_an_archive_from_which_nothing_can_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "store", 3)
    push_of(tmp_path / "store")
    with Store(tmp_path / "store", write=True) as store:
        prune(store, Keep(last=1), live_share=1.0)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "nothing goes")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "rm_file", refuse)
        sent = push_of(tmp_path / "store")
    assert sent.left > 0 == sent.removed
    assert numbers_at(tmp_path / "back") == {3}
    assert push_of(tmp_path / "store").removed == sent.left


def test_credentials_that_are_missing_are_told(s3: dict[str, Any], tmp_path: Path) -> None:
    build(tmp_path / "store", 1)
    there: dict[str, Any] = {"url": "s3://bucket/copy", "storage_options": s3}
    calls: list[Callable[[], object]] = [partial(push_of, tmp_path / "store", **there), partial(pull, path=tmp_path / "x", **there)]
    for call in calls:
        with pytest.raises(AccessDeniedError, match="credentials"):
            call()


def test_a_bucket_that_is_not_there_is_not_made(s3: dict[str, Any], tmp_path: Path) -> None:
    build(tmp_path / "store", 1)
    with pytest.raises(DirtyLogError, match="bucket"):
        push_of(tmp_path / "store", "s3://bucket-nobody-made/copy", storage_options=_keys(s3))
    assert not fsspec.filesystem("s3", **_keys(s3)).exists("bucket-nobody-made")


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgumentError, match="names no place"):
        pull("nosuchthing://x", tmp_path / "back")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "s3fs", None)
        patch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
        with pytest.raises(UnsupportedError, match="pip install s3fs"):
            pull("s3://bucket/x", tmp_path / "back")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'dirtylog\[store\]'"):
        pull("memory://x", tmp_path / "back")

"""Stores of known contents: memory in the state of a number, so that every checkpoint of it can be checked by its note."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.checkpoint import draft, segments
from dirtylog.checkpoint.restore import read_slot
from dirtylog.checkpoint.retention import Keep, collect, prune
from dirtylog.checkpoint.store import SlotLayout, Store
from dirtylog.checkpoint.verify import verify

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    import pytest
    from numpy.typing import NDArray

PAGE = 4096
SLOTS = (SlotLayout(0, 0, 0, 20, PAGE, "large"), SlotLayout(1, 1, 100, 3, PAGE, "small"))


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """Make a folder in memory where there is one: what is done and killed there leaves the same files, and sooner."""
    memory = Path("/dev/shm")  # noqa: S108 - the folder below it is made by tempfile
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as path:
        yield Path(path)


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make batches and segments short, so that a small store has several of them."""
    monkeypatch.setattr(draft, "BATCH_BYTES", 4 * PAGE)
    monkeypatch.setattr(segments, "FULL_BYTES", 8 * PAGE)


@cache
def world(number: int) -> dict[int, NDArray[np.uint8]]:
    """Return the memory in state ``number``: a part of the pages changes from each number to the next, some to zeros."""
    random = np.random.default_rng(number)
    if number == 0:
        return {slot.key: np.zeros((slot.npages, PAGE), np.uint8) for slot in SLOTS}
    found = {key: pages.copy() for key, pages in world(number - 1).items()}
    for pages in found.values():
        changed = random.permutation(len(pages))[: len(pages) if number == 1 else max(1, len(pages) * 2 // 5)]
        # Half of each page repeats: it is worth compressing.
        pages[changed] = np.tile(random.integers(0, 256, (len(changed), PAGE // 8), np.uint8), 8)
        pages[changed[:1]] = 0
    return found


def save(store: Store, number: int, compression: str = "none") -> int:
    """Save the memory in state ``number``: what differs from the newest checkpoint."""
    rows = store.checkpoints()
    parent = rows[-1] if rows else None
    before = None if parent is None else world(int(parent.note))
    one = store.draft(compression=compression)
    try:
        for key, pages in world(number).items():
            changed = np.arange(len(pages)) if before is None else np.flatnonzero((pages != before[key]).any(axis=1))
            one.write(key, changed, PAGE, partial(copy_pages, pages))
        return one.commit(SLOTS, parent=parent, note=str(number))
    except BaseException:
        one.abort()
        raise


def copy_pages(pages: NDArray[np.uint8], which: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
    out[:] = pages[which]


def build(path: Path, last: int, compression: str = "none") -> None:
    """Make a store with states 1 to ``last``."""
    with Store(path, write=True) as store:
        for number in range(1, last + 1):
            save(store, number, compression)


def numbers(path: Path) -> set[int]:
    """Return which states a store has, each of them checked page by page."""
    with Store(path) as store:
        found = set()
        for checkpoint in store.checkpoints():
            maps = store.maps(checkpoint.id)
            for slot in checkpoint.slots:
                out = np.full((slot.npages, PAGE), 0xEE, np.uint8)
                read_slot(store, maps[slot.key], out)
                assert np.array_equal(out, world(int(checkpoint.note))[slot.key]), f"checkpoint {checkpoint.id} is another one"
            found.add(int(checkpoint.note))
        assert verify(store) == []
        return found


def check(path: Path, certain: Collection[int], possible: Collection[int] = ()) -> set[int]:
    """Check that a store has states, others only of the ``possible``, and that it can be written; return what it had."""
    had = numbers(path)
    assert set(certain) <= had <= set(certain) | set(possible), f"{had}, and not {certain} and maybe some of {possible}"
    with Store(path, write=True) as store:
        save(store, 50)
        save(store, 51)
        known = set(store.index.segments())
        assert {int(one.stem) for one in store.folder.iterdir()} == known, "files that no commit knows"
    assert numbers(path) == had | {50, 51}
    with Store(path, write=True) as store:
        prune(store, Keep(last=2))
        collect(store, live_share=1.1)
    assert numbers(path) == {50, 51}
    return had

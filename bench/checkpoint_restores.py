"""What it costs to restore an array from a checkpoint, every page verified, against a plain read of the same files."""

from __future__ import annotations

import os
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import dirtylog
from buffer_scene import PAGE_SIZE, why_no_uffd
from checkpoint_scene import Rewritten, full_array, on_disk, pages_that_fit
from dirtylog.size import format_size
from report import Section, Spread, Target, alternate

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

_PAGES = 1 << 20
_QUICK_PAGES = 1 << 16
_RATIO = 1.25
"""80 % of the speed."""
_HISTORY = 50
"""So many checkpoints of 1 % come after the first, in one of the stores."""
_READ_BYTES = 1 << 20
_PLAIN = "plain read"
_PLAIN_OVER = "plain read, over an array"


class _Way(NamedTuple):
    """One way to restore: the store that it reads, what it takes it by, and the plain read that it is measured by."""

    name: str
    folder: Path
    restore: Callable[[], object]
    anchor: str
    prepare: Callable[[], object] = lambda: None
    has_target: bool = True


def checkpoint_restores(*, quick: bool) -> Section:
    """Measure restores of an array, from the page cache and from the disk."""
    rounds = 3 if quick else 5
    reason = why_no_uffd()
    with on_disk() as folder:
        npages = _QUICK_PAGES if quick else pages_that_fit(folder, _PAGES, copies_in_memory=7, copies_on_disk=8)
        section = Section(
            f"Restoring {format_size(npages * PAGE_SIZE)} from a checkpoint",
            "dirtylog.restore of a checkpoint that has everything, from the page cache (warm), or with the pages of its files "
            "dropped from it before (cold). Copied: into new memory; mapped: a file that is mapped; into: an array that is there, "
            "where nothing differs or every page. The anchor reads the same files by readinto, 1 MiB at a time, into new memory, "
            f"or over an array for into. {_HISTORY} more: {_HISTORY} checkpoints of 1 % at random came after the first, and the "
            "last one is restored; beside a plain read of as many bytes. crc32: the store's checksum instead of xxh3. Everything "
            f"in turn, {rounds} rounds, elapsed time; every restored array is as it was.",
        )
        if reason is not None:
            section.rows.append({"restore": reason})
            return section
        array = full_array(npages)
        ways = _ways(folder, array)
        ratios: dict[str, float] = {}
        for state in ("warm", "cold"):
            seconds = _measure(ways, rounds, cold=state == "cold")
            for way in ways:
                anchor, own = seconds[way.anchor], seconds[way.name]
                ratio = Spread.of(one / other for one, other in zip(own, anchor, strict=True))
                section.rows.append(
                    {
                        "restore": f"{way.name}, {state}",
                        "s": Spread.of(own),
                        "plain read, s": Spread.of(anchor),
                        "ratio": ratio,
                        "GB/s": f"{npages * PAGE_SIZE / Spread.of(own).median / 1e9:.2f}",
                    }
                )
                if way.has_target:
                    ratios[f"{way.name}, {state}"] = ratio.median
    section.targets.append(Target(f"a restore at most {_RATIO} times a plain read (80 % of its speed)", _RATIO, "times", ratios))
    return section


def _ways(folder: Path, array: NDArray[np.uint64]) -> list[_Way]:
    whole, many, crc = (folder / name for name in ("whole", "many", "crc32"))
    with dirtylog.Checkpointer({"array": array}, many) as checkpointer:
        rewritten = Rewritten(array)
        for _ in range(_HISTORY + 1):
            checkpointer.save()
            rewritten.write(len(array) // 100)
        checkpointer.save()
    for path, checksum in ((whole, "xxh3"), (crc, "crc32")):
        with dirtylog.Checkpointer({"array": array}, path, checksum=checksum) as checkpointer:
            checkpointer.save()
    expected = array[:, :2].copy()

    def check(restored: NDArray[np.uint64]) -> None:
        assert np.array_equal(restored[:, :2], expected), "the restored array is another"

    def restore(path: Path, *, mapped: bool = False) -> Callable[[], object]:
        return lambda: partial(check, dirtylog.restore(path, mapped=mapped)["array"])

    def into() -> object:
        return partial(check, dirtylog.restore(whole, into={"array": array})["array"])

    def spoil() -> None:
        np.invert(array, out=array)

    files = sorted((whole / "segments").iterdir())
    return [
        _Way(_PLAIN, whole, lambda: _plain(files, np.empty(array.nbytes, np.uint8)), _PLAIN, has_target=False),
        _Way(_PLAIN_OVER, whole, lambda: _plain(files, array.reshape(-1).view(np.uint8)), _PLAIN_OVER, has_target=False),
        _Way("copied", whole, restore(whole), _PLAIN),
        _Way("mapped", whole, restore(whole, mapped=True), _PLAIN),
        _Way("into, nothing differs", whole, into, _PLAIN_OVER),
        _Way("into, all differs", whole, into, _PLAIN_OVER, spoil),
        _Way(f"copied, {_HISTORY} more", many, restore(many), _PLAIN, has_target=False),
        _Way("copied, crc32", crc, restore(crc), _PLAIN, has_target=False),
    ]


def _measure(ways: list[_Way], rounds: int, *, cold: bool) -> dict[str, list[float]]:
    """Return the seconds of each way, a value a round."""
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    by_name = {way.name: way for way in ways}
    for _, name in alternate(tuple(by_name), rounds):
        way = by_name[name]
        way.prepare()
        os.sync()
        for path in (way.folder / "segments").iterdir():
            _cache(path, keep=not cold)
        begin = time.perf_counter()
        check = way.restore()
        seconds[name].append(time.perf_counter() - begin)
        if callable(check):
            check()
        del check
    return seconds


def _cache(path: Path, *, keep: bool) -> None:
    """Have a file's pages in the page cache, all or none."""
    with path.open("rb", buffering=0) as file:
        if keep:
            _plain([path], np.empty(_READ_BYTES, np.uint8), over_again=True)
        else:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _plain(paths: list[Path], out: NDArray[np.uint8], *, over_again: bool = False) -> None:
    """Read files one after the other into memory, or each part over the one before."""
    octets, at = out.data, 0
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(octets[at : at + _READ_BYTES]):
                at += 0 if over_again else count

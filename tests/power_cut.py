"""What a power cut may leave of files: what was synced for certain, and anything of what was not.

A model that is harsher than most file systems: each sector of an unsynced write is there or not, or has garbage where the file has
grown; a name that was made or removed is there or not until its folder is synced.
"""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING

from traced import SYNCS, WRITES, Call

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import numpy as np

_SECTOR = 512


class _File:
    def __init__(self, data: bytes = b"") -> None:
        self.synced = bytearray(data)
        self.pending: list[Call] = []

    def sync(self) -> None:
        for call in self.pending:
            _apply(self.synced, call)
        self.pending = []

    def after_cut(self, random: np.random.Generator) -> bytes:
        """Return what it holds then."""
        found = bytearray(self.synced)
        kept = {"none": 0, "some": len(self.pending), "first": int(random.integers(0, len(self.pending) + 1))}
        how = str(random.choice([*kept, "all"]))
        for call in self.pending[: kept.get(how, len(self.pending))]:
            if how != "some":
                _apply(found, call)
            elif call.name in WRITES:
                _apply_some(found, call, random)
            elif random.integers(2):
                _apply(found, call)
        return bytes(found)


def _apply(data: bytearray, call: Call) -> None:
    if call.name in WRITES:
        data.extend(bytes(max(0, call.offset - len(data))))
        data[call.offset : call.offset + len(call.data)] = call.data
    else:
        data.extend(bytes(max(0, call.length - len(data))))
        del data[call.length :]


def _apply_some(data: bytearray, call: Call, random: np.random.Generator) -> None:
    """Apply some sectors of a write; where the file grows, the others hold zeros or garbage."""
    end = call.offset + len(call.data)
    if end > len(data) and random.integers(2):
        missing = end - len(data)
        data.extend(random.bytes(missing) if random.integers(2) else bytes(missing))
    at = call.offset
    while at < end:
        until = min(end, (at // _SECTOR + 1) * _SECTOR)
        if random.integers(2):
            _apply(data, Call("write", call.path, at, call.data[at - call.offset : until - call.offset]))
        at = until


class Disk:
    """A folder with files in it, all synced; and what is done to it then."""

    def __init__(self, folder: Path) -> None:
        self._names: dict[str, _File | None] = {"": None}
        for path in sorted(folder.rglob("*")):
            self._names[str(path.relative_to(folder))] = _File(path.read_bytes()) if path.is_file() else None
        self._synced = dict(self._names)
        self._changes: list[tuple[str, _File | None, bool]] = []

    def do(self, calls: Iterable[Call]) -> None:
        """Do what calls do."""
        for call in calls:
            self._do(call)

    def _do(self, call: Call) -> None:
        if call.name in ("create", "mkdir"):
            self._names[call.path] = _File() if call.name == "create" else None
            self._changes.append((call.path, self._names[call.path], True))
        elif call.name == "unlink":
            self._changes.append((call.path, self._names.pop(call.path), False))
        elif call.path in self._names:  # and not that of a file without a name
            file = self._names[call.path]
            if file is None:
                self._sync_names(call.path)
            elif call.name in SYNCS:
                file.sync()
            else:
                file.pending.append(call)

    def _sync_names(self, folder: str) -> None:
        here = [change for change in self._changes if posixpath.dirname(change[0]) == folder]
        self._changes = [change for change in self._changes if posixpath.dirname(change[0]) != folder]
        for change in here:
            _rename(self._synced, *change)

    def cut(self, into: Path, random: np.random.Generator) -> None:
        """Cut the power, and write what is left into a new folder."""
        names = dict(self._synced)
        share = random.choice([0.0, 0.5, 1.0])
        for change in self._changes:
            if random.random() < share:
                _rename(names, *change)
        into.mkdir()
        for name, file in sorted(names.items()):
            # What lies in a folder that has no name any more is gone with it.
            if name and (into / name).parent.is_dir():
                if file is None:
                    (into / name).mkdir()
                else:
                    (into / name).write_bytes(file.after_cut(random))


def _rename(names: dict[str, _File | None], path: str, file: _File | None, there: bool) -> None:
    if there:
        names[path] = file
    else:
        names.pop(path, None)

"""Arrays over files that a store is made of: to write to one would destroy the store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.lib.array_utils import byte_bounds

from dirtylog.checkpoint.folder import INDEX, LOCK, SEGMENTS
from dirtylog.errors import InvalidArgumentError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAPS = Path("/proc/self/maps")


def refuse_own_files(name: str, array: NDArray[Any], store: Path) -> None:
    """Raise :class:`InvalidArgumentError` for an array that maps a file of the store itself."""
    if not _MAPS.exists():
        return
    from dirtylog.linux.mappings import read_mappings  # noqa: PLC0415 - of Linux

    low, high = byte_bounds(array)
    touched = [mapping for mapping in read_mappings() if mapping.shared and mapping.start < high and low < mapping.end]
    if not touched:
        return
    # By name too: where file systems lie over one another, the device may be either's.
    names = {mapping.name for mapping in touched} | {mapping.file for mapping in touched}
    for file in (store / LOCK, *store.glob(f"{INDEX}*"), *(store / SEGMENTS).glob("*")):
        found = file.stat()
        if {str(file.resolve()), f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x} {found.st_ino}"} & names:
            raise InvalidArgumentError(f"array {name!r} maps {str(file)!r}, which the store is made of")

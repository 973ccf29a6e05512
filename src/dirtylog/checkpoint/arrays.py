"""NumPy arrays in checkpoints: what makes bytes an array again."""

from __future__ import annotations

import mmap
import tempfile
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.format import descr_to_dtype, dtype_to_descr

from dirtylog.checkpoint.contents import in_a_row
from dirtylog.checkpoint.own_files import refuse_own_files
from dirtylog.checkpoint.restore import differing, give_slot, read_slot, staying, write_slot
from dirtylog.checkpoint.store import SlotLayout, Store
from dirtylog.errors import CorruptDataError, DirtyLogError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from dirtylog.checkpoint.pages import PageMap


def array_facts(name: str, array: NDArray[Any], start: int) -> dict[str, Any]:
    """Return what makes the pages from address ``start`` on this array again, for JSON."""
    if not isinstance(array, np.ndarray):
        raise InvalidArgumentError(f"{name!r} is a {type(array).__name__}, not a NumPy array", remedy="track it, and give the log")
    if array.dtype.hasobject:
        raise InvalidArgumentError(f"{name!r} is an array of {array.dtype}: objects lie elsewhere, and would not be saved")
    return {
        "dtype": dtype_to_descr(array.dtype),
        "shape": list(array.shape),
        "strides": list(array.strides),
        "offset": array.__array_interface__["data"][0] - start,
    }


def restore(
    path: str | Path,
    number: int | None = None,
    *,
    mapped: bool = False,
    into: Mapping[str, NDArray[Any]] | None = None,
) -> dict[str, NDArray[Any]]:
    """Return the arrays of a checkpoint, by default the newest, by their names; every page is verified.

    They are copies that may be written; with ``mapped`` read-only, and backed by a file without a name, so that they take no memory
    that cannot be dropped. With ``into`` they are put into existing arrays of the same shape and type, of which only pages that
    differ are written, and these are returned; when a page does not verify, some of it is there already.

    Raises :class:`InvalidArgumentError`, where shapes do not agree for one, and :class:`CorruptDataError`.
    """
    with Store(path) as store:
        checkpoint = store.checkpoint(number)
        slots = {slot.name: slot for slot in checkpoint.slots if slot.array is not None}
        if not slots:
            raise InvalidArgumentError(f"checkpoint {checkpoint.id} has no arrays", remedy="restore its memory instead")
        for name, array in (into or {}).items():
            if name not in slots:
                raise InvalidArgumentError(f"checkpoint {checkpoint.id} has no array {name!r}", remedy=f"it has {', '.join(slots)}")
            _check_same(name, array, slots[name])
            refuse_own_files(name, array, store.path)
        with staying(store, checkpoint.id):
            maps = store.maps(checkpoint.id)
            if into is None:
                return {name: array_of(_bytes_of(store, slot, maps[slot.key], mapped=mapped), slot) for name, slot in slots.items()}
            for name, array in into.items():
                _put(store, slots[name], maps[slots[name].key], array)
            return dict(into)


def _bytes_of(store: Store, slot: SlotLayout, pages: PageMap, *, mapped: bool) -> NDArray[np.uint8]:
    if not mapped:
        whole = np.empty((slot.npages, slot.page_size), np.uint8)
        read_slot(store, pages, whole)
        return whole.reshape(-1)
    try:
        # Beside the store, where there is room for it; /tmp may be memory.
        with tempfile.TemporaryFile(dir=store.path) as file:
            file.truncate(slot.nbytes)
            write_slot(store, pages, slot.page_size, file.fileno())
            return np.frombuffer(mmap.mmap(file.fileno(), slot.nbytes, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise DirtyLogError(
            f"no file to map can be made in {str(store.path)!r}", errno=error.errno, reason=error.strerror
        ) from error


def array_of(octets: NDArray[np.uint8], slot: SlotLayout) -> NDArray[Any]:
    """Return the array that a slot's pages hold."""
    facts = slot.array or {}
    try:
        dtype = descr_to_dtype(_tuples(facts["dtype"]))
        return np.ndarray(
            tuple(facts["shape"]), dtype, buffer=octets.reshape(-1).data, offset=facts["offset"], strides=tuple(facts["strides"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptDataError(f"the array {slot.name!r} cannot be made of its pages", reason=str(error)) from error


def _tuples(descr: Any) -> Any:  # noqa: ANN401 - what dtype_to_descr gives
    """Return a type's description as it was before JSON made lists of its tuples."""
    if isinstance(descr, str):
        return descr
    return [(field[0], _tuples(field[1]), *(tuple(shape) for shape in field[2:])) for field in descr]


def _check_same(name: str, array: NDArray[Any], slot: SlotLayout) -> None:
    facts = slot.array or {}
    shape, dtype = tuple(facts["shape"]), descr_to_dtype(_tuples(facts["dtype"]))
    if array.shape != shape or array.dtype != dtype:
        raise InvalidArgumentError(
            f"array {name!r} is {array.dtype} of shape {array.shape}, and the checkpoint has {dtype} of shape {shape}"
        )
    if not array.flags.writeable:
        raise InvalidArgumentError(f"array {name!r} is read-only")


def _put(store: Store, slot: SlotLayout, pages: PageMap, array: NDArray[Any]) -> None:
    """Put the pages of a slot into an array."""
    facts = slot.array or {}
    if array.flags.forc and list(array.strides) == facts["strides"]:
        octets = np.asarray(array).reshape(-1, order="A").view(np.uint8)
        give_slot(store, pages, slot.page_size, partial(_put_pages, octets, facts["offset"]))
    else:
        array[...] = array_of(_bytes_of(store, slot, pages, mapped=True), slot)


def _put_pages(octets: NDArray[np.uint8], offset: int, pages: NDArray[np.int64], saved: NDArray[np.uint8]) -> None:
    """Put pages into an array that begins at ``offset`` of page 0, where their octets differ: a NaN is no reason to write."""
    size = saved.shape[1]
    first = -(-offset // size)
    begin = first * size - offset
    inner = octets[begin : max(begin, begin + (len(octets) - begin) // size * size)].reshape(-1, size)
    whole = (pages >= first) & (pages < first + len(inner))
    # The first and the last page.
    for page, row in zip(pages[~whole].tolist(), saved[~whole], strict=True):
        at = page * size - offset
        mine = octets[max(at, 0) : at + size]
        theirs = row[max(-at, 0) :][: len(mine)]
        if not np.array_equal(mine, theirs):
            mine[:] = theirs
    if not whole.all():
        pages, saved = pages[whole], saved[whole]
    rows = pages - first
    if len(rows):
        now = inner[rows[0] : rows[-1] + 1] if in_a_row(rows) else inner[rows]
        differs = differing(now, saved)
        inner[rows[differs]] = saved[differs]

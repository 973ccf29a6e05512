"""NumPy arrays in checkpoints: what makes bytes an array again."""

from __future__ import annotations

import mmap
import tempfile
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.format import descr_to_dtype, dtype_to_descr

from dirtylog.checkpoint.restore import read_slot
from dirtylog.checkpoint.store import SlotLayout, Store
from dirtylog.errors import CorruptDataError, InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

_PAGE_BYTES = 4096
_CHUNK_BYTES = 4 << 20


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
    differ are written, and these are returned.

    Raises :class:`InvalidArgumentError`, where shapes do not agree for one, and :class:`CorruptDataError`.
    """
    with Store(path) as store:
        checkpoint = store.checkpoint(number)
        slots = {slot.name: slot for slot in checkpoint.slots if slot.array is not None}
        if not slots:
            raise InvalidArgumentError(f"checkpoint {checkpoint.id} has no arrays", remedy="restore its memory instead")
        maps = store.maps(checkpoint.id)
        if into is None:
            return {name: array_of(_bytes_of(store, slot, maps[slot.key], mapped=mapped), slot) for name, slot in slots.items()}
        for name, array in into.items():
            if name not in slots:
                raise InvalidArgumentError(f"checkpoint {checkpoint.id} has no array {name!r}", remedy=f"it has {', '.join(slots)}")
            _check_same(name, array, slots[name])
        for name, array in into.items():
            slot = slots[name]
            saved = array_of(_bytes_of(store, slot, maps[slot.key], mapped=True), slot)
            _put(array, saved)
        return dict(into)


def _bytes_of(store: Store, slot: SlotLayout, pages: Any, *, mapped: bool) -> NDArray[np.uint8]:  # noqa: ANN401 - a PageMap
    if not mapped:
        whole = np.empty((slot.npages, slot.page_size), np.uint8)
        read_slot(store, pages, whole)
        return whole.reshape(-1)
    with ExitStack() as files:
        # Beside the store, where there is room for it; /tmp may be memory.
        file = files.enter_context(tempfile.TemporaryFile(dir=store.path))
        file.truncate(slot.nbytes)
        with mmap.mmap(file.fileno(), slot.nbytes) as shared:
            view = np.frombuffer(shared, np.uint8).reshape(slot.npages, slot.page_size)
            read_slot(store, pages, view)
            del view
        return np.frombuffer(mmap.mmap(file.fileno(), slot.nbytes, access=mmap.ACCESS_READ), np.uint8)


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


def _put(array: NDArray[Any], saved: NDArray[Any]) -> None:
    """Copy what differs, page by page. Octets are compared: a NaN is no reason to write."""
    if not (array.flags.c_contiguous and saved.flags.c_contiguous):
        array[...] = saved
        return
    mine, theirs = (one.reshape(-1).view(np.uint8) for one in (array, saved))
    for at in range(0, len(mine), _CHUNK_BYTES):
        into, source = mine[at : at + _CHUNK_BYTES], theirs[at : at + _CHUNK_BYTES]
        whole = len(into) // _PAGE_BYTES * _PAGE_BYTES
        rows, others = into[:whole].reshape(-1, _PAGE_BYTES), source[:whole].reshape(-1, _PAGE_BYTES)
        differs = (rows != others).any(axis=1)
        rows[differs] = others[differs]
        if not np.array_equal(into[whole:], source[whole:]):
            into[whole:] = source[whole:]

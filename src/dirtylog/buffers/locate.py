"""Where an object's buffer lies in this process."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np
from numpy.lib.array_utils import byte_bounds

from dirtylog.errors import InvalidArgumentError


class Pages(NamedTuple):
    """Whole pages: addresses of the first byte and of the one after the last, and what they are."""

    start: int
    end: int
    page_size: int
    anonymous: bool

    @classmethod
    def around(cls, address: int, nbytes: int, page_size: int, *, anonymous: bool) -> Self:
        """Return the pages that cover ``nbytes`` at ``address``."""
        return cls(address // page_size * page_size, -(-(address + nbytes) // page_size) * page_size, page_size, anonymous)


class Located(NamedTuple):
    """A buffer: what keeps it where it is, its address, its length."""

    owner: object
    address: int
    nbytes: int


def locate(buffer: Any) -> Located:  # noqa: ANN401 - whatever has a buffer
    """Find the writable buffer behind an object: NumPy's arrays, the buffer protocol, the array interface, DLPack on the CPU.

    As long as ``owner`` lives the buffer can be neither freed nor resized. Of an array with strides it is all that lies between its
    first and last byte. :class:`InvalidArgumentError` where there is no such buffer, it is read-only, or it is empty.
    """
    array = _array_of(buffer)
    if not array.flags.writeable:
        raise InvalidArgumentError(f"a {type(buffer).__name__} that is read-only: nothing could be written to it")
    address, end = byte_bounds(array)
    if end <= address or not array.size:
        raise InvalidArgumentError(f"a {type(buffer).__name__} without any bytes: there is nothing to track")
    return Located(array, address, end - address)


def _array_of(buffer: Any) -> np.ndarray[Any, np.dtype[Any]]:  # noqa: ANN401 - as above
    kind = type(buffer).__name__
    if isinstance(buffer, np.ndarray):
        return buffer
    try:
        view = memoryview(buffer)
    except TypeError:
        pass
    except ValueError as error:
        raise InvalidArgumentError(f"the memory of this {kind} cannot be had", reason=str(error)) from error
    else:
        # An array over the view holds the export: while it lives a bytearray cannot be resized, nor an mmap closed.
        return np.frombuffer(view, np.uint8) if view.c_contiguous and view.nbytes else np.asarray(view)
    try:
        if not isinstance(buffer, type) and hasattr(buffer, "__array_interface__"):
            return np.asarray(buffer)
        if not isinstance(buffer, type) and hasattr(buffer, "__dlpack__"):
            return _from_dlpack(buffer)
    except (TypeError, ValueError, RuntimeError, BufferError, AttributeError) as error:
        raise InvalidArgumentError(
            f"the memory of this {kind} cannot be had", reason=str(error), remedy="for a tensor: detach().cpu()"
        ) from error
    raise InvalidArgumentError(
        f"a {kind} has no buffer: track an array, a bytearray, an mmap, shared memory, a memoryview, or a tensor on the CPU"
    )


def _from_dlpack(buffer: Any) -> np.ndarray[Any, np.dtype[Any]]:  # noqa: ANN401 - as above
    """Return an array over a tensor's memory, never over a copy: what exports it the older way cannot make one."""
    try:
        return np.from_dlpack(buffer, copy=False)
    except TypeError:
        return _writable(np.from_dlpack(buffer))


def _writable(array: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[Any]]:
    """Return an array from DLPack as one that may be written: the older protocol cannot say so, and NumPy then assumes not."""
    interface = dict(array.__array_interface__)
    interface["data"] = (interface["data"][0], False)
    holder = type("DLPackBuffer", (), {"__array_interface__": interface, "owner": array})()
    return np.asarray(holder)

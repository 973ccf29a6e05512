"""``dirtylog.track`` and ``dirtylog.empty``."""

from __future__ import annotations

import math
import mmap
import operator
from typing import TYPE_CHECKING, Any

import numpy as np

from dirtylog.buffers.memory import BufferMemory
from dirtylog.dirty_log import DirtyLog
from dirtylog.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import DTypeLike, NDArray


def track(buffer: Any, *, port: str = "auto") -> DirtyLog:  # noqa: ANN401 - whatever has a buffer
    """Log the writes to a buffer of this process, from now on, and return the log: ``log.get(0)`` has the pages written since.

    ``buffer`` is a NumPy array, a bytearray, an mmap, shared memory, a memoryview, or a tensor on the CPU. It need not begin at a
    page: the pages that cover it are logged (``log.memory.offset`` is where it begins in the first), and what else lies on them is
    a false positive. Close the log at the end, or use it as a context manager. A forked child has no part in it.

    ``port`` is "uffd" (Linux 6.7), "compare" (a copy, anywhere; it takes the time to read all of the buffer), or "auto": the first
    of these that works. ``log.memory.port.name`` says which, and ``log.memory.blind_spots`` what it cannot see.

    Raises :class:`InvalidArgumentError`; :class:`UnsupportedError` or :class:`AccessDeniedError` where ``port`` cannot be had.
    """
    memory = BufferMemory(buffer, port=port)
    log = DirtyLog(memory)
    log.closes_memory = True
    try:
        log.start()
    except BaseException:
        memory.close()
        raise
    return log


def empty(shape: int | Sequence[int], dtype: DTypeLike = np.float64) -> NDArray[Any]:
    """Return a zeroed array in whole pages of its own, made to be tracked: no neighbour on them is a false positive.

    The memory is private: a forked child has a copy of it.
    """
    kind = np.dtype(dtype)
    if kind.hasobject:
        raise InvalidArgumentError(f"an array of {kind}: objects lie elsewhere, and only their addresses would be tracked")
    sizes = tuple(map(operator.index, shape)) if hasattr(shape, "__iter__") else (operator.index(shape),)
    if any(size < 0 for size in sizes):
        raise InvalidArgumentError(f"an array of shape {sizes}: no size may be negative")
    nbytes = math.prod(sizes) * kind.itemsize
    if not nbytes:
        return np.empty(sizes, kind)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    return np.ndarray(sizes, kind, mmap.mmap(-1, nbytes, **private))

"""A buffer of this process as a memory whose writes are logged."""

from __future__ import annotations

import ctypes
import time
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from dirtylog.bitmap import checked_pages
from dirtylog.buffers.locate import locate
from dirtylog.buffers.ports import choose_port
from dirtylog.compare import ComparePort
from dirtylog.errors import DirtyLogError, InvalidArgumentError
from dirtylog.memslot import MemorySlot, SlotTable

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import ArrayLike, NDArray

    from dirtylog.port import Exactness, SyncPort

BUFFER_SLOT = 0


class BufferMemory:
    """The pages that cover a writable buffer of this process, as slot 0.

    ``offset`` is where the buffer begins in its first page; ``nbytes`` its length. The buffer is kept alive until :meth:`close`.
    Other objects on its first and last page are logged with it: a false positive. ``port`` is "uffd", "compare", or "auto",
    which takes the first of these that this host has.
    """

    def __init__(self, buffer: Any, *, port: str = "auto") -> None:  # noqa: ANN401 - whatever has a buffer
        self._keep, address, self.nbytes = locate(buffer)
        self._closed = False
        self._faults_before = _own_faults()
        self._port, pages = choose_port(port, address, self.nbytes, self._read_range)
        start, end, self._page_size = pages.start, pages.end, pages.page_size
        self.offset = address - start
        # Safe: these pages are mapped, for each holds a byte of the buffer, which this object keeps alive.
        octets = np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start))
        self._pages: NDArray[np.uint8] = octets.reshape(-1, self._page_size)
        self.slots = SlotTable()
        self.slots.add(
            MemorySlot(
                BUFFER_SLOT,
                start // self._page_size,
                len(self._pages),
                self._page_size,
                host_address=start,
                name=f"{type(buffer).__module__}.{type(buffer).__qualname__}",
                permissions="rw",
                anonymous=pages.anonymous,
            )
        )

    @property
    def port(self) -> SyncPort:
        """How it is logged."""
        return self._port

    @property
    def exactness(self) -> Exactness:
        """How what is reported relates to what was written."""
        return self._port.exactness

    @property
    def blind_spots(self) -> tuple[str, ...]:
        """The writes that this source cannot see."""
        return self._port.blind_spots

    @property
    def incomplete(self) -> tuple[str, ...]:
        """Why writes may have been missed: nothing is known."""
        return ()

    @property
    def faults(self) -> int | None:
        """Page faults of this process, of whatever memory; None where the system does not count them."""
        now = _own_faults()
        return None if now is None or self._faults_before is None else now - self._faults_before

    @property
    def held(self) -> int:
        """Bytes that hold something: the whole buffer."""
        return self.nbytes

    def update_slots(self) -> list[MemorySlot]:
        """Return no new slots: a buffer stays where it is."""
        return []

    def read(self, slot: int, pages: ArrayLike, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Return the contents of ``pages`` as uint8[k, page_size], in ``out`` if it is given; neighbours of the buffer included.

        Of port compare, while it logs, what was compared at the last get.
        """
        memslot = self.slots[slot]
        contents = self._open_pages()
        if isinstance(self._port, ComparePort) and (compared := self._port.compared(memslot)) is not None:
            contents = compared
        return np.take(contents, checked_pages(pages, memslot.npages), axis=0, out=out, mode="clip")

    def write(self, slot: int, pages: ArrayLike, data: ArrayLike) -> None:
        """Write uint8[k, page_size] to ``pages``. Of the first and the last page only what belongs to the buffer is written."""
        memslot = self.slots[slot]
        offsets = checked_pages(pages, memslot.npages)
        contents = np.asarray(data, np.uint8)
        if contents.shape != (len(offsets), self._page_size):
            raise InvalidArgumentError(
                f"data of shape {contents.shape} for {len(offsets)} pages: it must be ({len(offsets)}, {self._page_size})"
            )
        target = self._open_pages()
        last = memslot.npages - 1
        inner = (offsets > 0) & (offsets < last)
        target[offsets[inner]] = contents[inner]
        for page, row in zip(offsets[~inner].tolist(), contents[~inner], strict=True):
            begin = self.offset if page == 0 else 0
            end = (self.offset + self.nbytes - 1) % self._page_size + 1 if page == last else self._page_size
            target[page, begin:end] = row[begin:end]

    def ending(self, seconds: float) -> bool:
        """Wait so long, and return False."""
        time.sleep(seconds)
        return False

    @property
    def paused(self) -> bool:
        """Whether it stands still: nobody knows."""
        return False

    def pause(self) -> None:
        """Do nothing: the threads of this process are their owner's to stop."""

    def resume(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Let the buffer go. Stop the log first. A second call does nothing."""
        for slot in self.slots:
            self._port.stop_logging(slot)
        self._closed = True
        self._keep = None
        self._pages = np.empty((0, self._page_size), np.uint8)

    def _open_pages(self) -> NDArray[np.uint8]:
        if self._closed:
            raise DirtyLogError("this memory is closed")
        return self._pages

    def _read_range(self, slot: MemorySlot, first: int, out: NDArray[np.uint8]) -> None:  # noqa: ARG002 - there is one slot
        out[:] = self._open_pages()[first : first + len(out)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _own_faults() -> int | None:
    try:
        import resource  # noqa: PLC0415 - it is Unix's, and port compare works everywhere
    except ImportError:
        return None
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_minflt + usage.ru_majflt

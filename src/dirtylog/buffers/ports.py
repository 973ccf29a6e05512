"""Which port logs a buffer: chosen by what works here."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from dirtylog.buffers.locate import Pages
from dirtylog.compare import ComparePort, ReadRange
from dirtylog.errors import DirtyLogError, InvalidArgumentError, UnsupportedError

if TYPE_CHECKING:
    from dirtylog.port import SyncPort

PORTS = ("auto", "uffd", "compare")


def choose_port(wanted: str, address: int, nbytes: int, read: ReadRange) -> tuple[SyncPort, Pages]:
    """Return a port for ``nbytes`` at ``address``, and the pages that cover them; "auto" takes the first that works."""
    if wanted not in PORTS:
        raise InvalidArgumentError(f"unknown port {wanted!r}; for a buffer it is one of: {', '.join(PORTS)}")
    if wanted != "compare":
        try:
            return _uffd(address, nbytes)
        except DirtyLogError:
            if wanted == "uffd":
                raise
    port = ComparePort(read)
    refused = port.refuses(address, nbytes)
    if refused is not None:
        raise refused
    return port, Pages.around(address, nbytes, mmap.PAGESIZE, anonymous=False)


def _uffd(address: int, nbytes: int) -> tuple[SyncPort, Pages]:
    try:
        from dirtylog.linux.buffer_port import BufferPort, check_watchable, covering_pages  # noqa: PLC0415 - it needs Linux
    except ImportError as error:
        raise UnsupportedError("userfaultfd is Linux's", reason=str(error), remedy="use port compare") from error
    port, pages = BufferPort.of_this_process(), covering_pages(address, nbytes)
    check_watchable(port, pages)
    return port, pages

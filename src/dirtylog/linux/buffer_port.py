"""The userfaultfd of this process, for all of its tracked buffers."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from dirtylog.buffers.locate import Pages
from dirtylog.errors import DirtyLogError, InvalidArgumentError
from dirtylog.linux.mappings import PageSizes, read_mappings
from dirtylog.linux.pagemap import Pagemap
from dirtylog.linux.uffd_port import UffdPort
from dirtylog.linux.userfaultfd import Userfaultfd, missing_uffd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dirtylog.linux.watch import Watch
    from dirtylog.memslot import MemorySlot


class BufferPort(UffdPort):
    """The port that all tracked buffers of this process share.

    Two of them may lie on one page, and a page has one mark: what is taken for one is given to the others too.
    """

    _instance: BufferPort | None = None

    @classmethod
    def of_this_process(cls) -> BufferPort:
        """Return it, or raise why there can be none."""
        if cls._instance is None:
            missing = missing_uffd()
            if missing is not None:
                raise missing
            cls._instance = cls(_open_descriptors)
        return cls._instance

    @classmethod
    def forget(cls) -> None:
        """Leave the port to the parent, in a forked child."""
        cls._instance = None

    def stop_logging(self, slot: MemorySlot) -> None:
        """Let go of the slot's memory, and of the descriptors after the last one."""
        with self.mmu_lock:
            super().stop_logging(slot)
            if not self._watched:
                self.close()

    def refuses(self, start: int, nbytes: int) -> DirtyLogError | None:
        """As for any memory; what is refused leaves nothing open."""
        with self.mmu_lock:
            error = super().refuses(start, nbytes)
            if error is not None and not self._watched:
                self.close()
            return error

    def _neighbours(self, watch: Watch) -> list[Watch]:
        return [
            other for other in self._watched.values() if other is not watch and other.start < watch.end and watch.start < other.end
        ]

    def _unshared(self, start: int, end: int, of: Watch | None = None) -> Iterator[tuple[int, int]]:
        for other in sorted(self._watched.values(), key=lambda other: other.start):
            if other is not of and start < other.end and other.start < end:
                if start < other.start:
                    yield start, other.start
                start = other.end
        if start < end:
            yield start, end


def _open_descriptors() -> tuple[Userfaultfd, Pagemap]:
    uffd = Userfaultfd.create()
    try:
        return uffd, Pagemap()
    except BaseException:
        uffd.close()
        raise


_REASONS = {
    errno.EBUSY: "another userfaultfd of this process watches that memory",
    errno.EPERM: "it maps a file that may not be written",
    errno.EINVAL: "the kernel does not watch that kind of memory",
}

os.register_at_fork(after_in_child=BufferPort.forget)


def covering_pages(address: int, nbytes: int) -> Pages:
    """Return the whole pages that cover memory of this process."""
    found = [mapping for mapping in read_mappings() if mapping.start < address + nbytes and address < mapping.end]
    sizes = {PageSizes().of(mapping) for mapping in found}
    if len(sizes) != 1:
        raise InvalidArgumentError(
            f"{nbytes} bytes at {address:#x} must lie in pages of one size", reason=f"the sizes there: {sorted(sizes)}"
        )
    return Pages.around(address, nbytes, sizes.pop(), anonymous=all(mapping.anonymous for mapping in found))


def check_watchable(port: BufferPort, pages: Pages) -> None:
    """Raise what keeps these pages from being watched, if anything does."""
    error = port.refuses(pages.start, pages.end - pages.start)
    if error is not None:
        reason = _REASONS.get(error.errno or 0, error.reason)
        remedy = "use port compare, or a buffer from dirtylog.empty"
        raise type(error)(error.message, errno=error.errno, reason=reason, remedy=remedy) from error

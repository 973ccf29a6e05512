"""userfaultfd and PAGEMAP_SCAN without dirtylog's care: one call, and all that the kernel answers."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dirtylog.linux import abi
from dirtylog.linux.abi import Category, Scan
from dirtylog.linux.userfaultfd import Userfaultfd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from address_space import Area

WRITTEN = Category.WRITTEN
TAKE = Scan.WP_MATCHING | Scan.CHECK_WPASYNC


class Scanned(NamedTuple):
    """What a scan answered: pages are offsets in the area."""

    runs: list[tuple[int, int]]
    """(first page, number of pages), as many as the call said there are."""
    errno: int
    walk_end: int

    @property
    def pages(self) -> set[int]:
        return {page for first, npages in self.runs for page in range(first, first + npages)}


class Bare:
    """An area that is registered, and armed."""

    def __init__(self, area: Area, uffd: Userfaultfd, pagemap: int) -> None:
        self.area = area
        self.uffd = uffd
        self.pagemap = pagemap
        self.vector = np.zeros(1 << 14, abi.PAGE_REGION)
        uffd.register(*area.span())
        self.scan()

    def scan(self, first: int = 0, npages: int | None = None, *, flags: int = TAKE, **fields: Any) -> Scanned:
        """Scan some of the pages, for written ones and with a long vector unless ``fields`` of pm_scan_arg say otherwise."""
        start, nbytes = self.area.span(first, npages)
        given = {
            "size": 96,
            "start": start,
            "end": start + nbytes,
            "vec": self.vector.ctypes.data,
            "vec_len": len(self.vector),
            "category_mask": WRITTEN,
            "return_mask": WRITTEN,
            **fields,
        }
        argument = abi.PmScanArg(flags=flags, **given)
        count, errno = 0, 0
        try:
            count = fcntl.ioctl(self.pagemap, abi.PAGEMAP_SCAN, argument)
        except OSError as error:
            errno = error.errno or 0
        regions = self.vector[:count] if argument.vec == self.vector.ctypes.data else self.vector[:0]
        return Scanned(self.runs(regions), errno, self._page(argument.walk_end))

    def runs(self, regions: NDArray[np.void]) -> list[tuple[int, int]]:
        """Return regions in pages of the area."""
        return [(self._page(start), self._page(end) - self._page(start)) for start, end, _ in regions.tolist()]

    def _page(self, address: int) -> int:
        return (address - self.area.address) // self.area.page_size


@contextmanager
def bare(area: Area) -> Iterator[Bare]:
    """Give an area registered and armed by bare calls."""
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with Userfaultfd.create() as uffd:
            yield Bare(area, uffd, pagemap)
    finally:
        os.close(pagemap)

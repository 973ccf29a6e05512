"""The memory of an emulated guest: one anonymous mapping a slot."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np

from dirtylog.emulated.port import PAGE_SIZE
from dirtylog.errors import InvalidArgumentError
from dirtylog.guests.host import host_memory


class Ram:
    """An anonymous mapping at a host-physical address of the software machine."""

    def __init__(self, address: int, npages: int) -> None:
        nbytes = npages * PAGE_SIZE
        total = host_memory()
        if total is not None and nbytes > total:
            raise InvalidArgumentError(f"a guest of {nbytes} bytes: this host has {total} bytes of memory")
        self.address = address
        try:
            if hasattr(mmap, "MAP_NORESERVE"):
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_NORESERVE
                self._mapping = mmap.mmap(-1, nbytes, flags=flags)
            else:
                self._mapping = mmap.mmap(-1, nbytes)
        except (OSError, OverflowError, ValueError) as error:
            raise InvalidArgumentError(f"a guest of {nbytes} bytes: the host cannot map it", reason=str(error)) from error
        self.pages = np.frombuffer(self._mapping, np.uint8).reshape(npages, PAGE_SIZE)
        self.view = memoryview(self._mapping)
        self.nbytes = nbytes
        # Safe: the address is good while self._mapping is exported, and this object holds the export.
        self.host = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

"""What Python cannot do in the way that a test needs: a little C, compiled when it is first wanted."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from address_space import Area

_SOURCE = Path(__file__).with_name("stores.c")


@functools.cache
def stores() -> ctypes.CDLL:
    """Return the functions of stores.c; skip the test where there is no C compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "stores.so"
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-pthread", "-o", library, _SOURCE], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.crew_start.argtypes = (ctypes.c_void_p, ctypes.c_long, ctypes.c_long, ctypes.c_long)
    loaded.crew_start.restype = ctypes.c_void_p
    for name in ("crew_begin", "crew_end", "crew_stop", "store_nothing", "store_in_vain", "prefetch_for_writing"):
        getattr(loaded, name).argtypes = (ctypes.c_void_p,)
        getattr(loaded, name).restype = None
    return loaded


class Crew:
    """Threads which each add 1 to the first word of every page of their part of an area, once a round."""

    def __init__(self, area: Area, nthreads: int) -> None:
        self._library = stores()
        self._crew = self._library.crew_start(area.address, area.page_size, area.npages // nthreads, nthreads)

    @contextmanager
    def round(self) -> Iterator[None]:
        """Let them store while the block runs; at its end all have done so."""
        self._library.crew_begin(self._crew)
        try:
            yield
        finally:
            self._library.crew_end(self._crew)

    def stop(self) -> None:
        """End them."""
        self._library.crew_stop(self._crew)

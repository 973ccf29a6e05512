"""What the kernel does to pages on its own or on advice must neither hide a write nor leave a page that hides the next one."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from address_space import NOHUGEPAGE, NONE, PAGEOUT, POPULATE_READ, READ, WRITE, Area, checked
from memory_kinds import MADV_HUGEPAGE, every_kind, memory_of
from uffd_here import forks, needs_uffd, watched, written

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [needs_uffd, forks]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.munlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def fork(area: Area) -> None:
    child = os.fork()
    if not child:
        os._exit(area[0] and 0)
    os.waitpid(child, 0)


def change_permissions(area: Area) -> None:
    for protection in (READ, NONE, READ | WRITE):
        area.protect(protection, 1, 2)
    area.protect(READ)
    area.protect(READ | WRITE)


def advise(advice: int) -> Callable[[Area], None]:
    return lambda area: area.advise(advice)


def advise_part(advice: int) -> Callable[[Area], None]:
    return lambda area: area.advise(advice, 1, 2)


def lock(area: Area) -> None:
    area.lock()
    checked(_libc.munlock(*area.span()))


def discard_entries_of_shared_memory(area: Area) -> None:
    """The page tables lose their entries; the contents stay in the file's pages. (Of private memory they would not.)"""
    area.advise(4)


def read(area: Area) -> None:
    area.octets.sum()
    with Path("/proc/self/mem").open("rb", buffering=0) as memory:
        os.pread(memory.fileno(), area.npages * area.page_size, area.address)


EVENTS: dict[str, Callable[[Area], None]] = {
    "fork": fork,
    "mprotect": change_permissions,
    "cold": advise(20),
    "pageout": advise(PAGEOUT),
    "collapse": advise(25),
    "no huge pages": advise(NOHUGEPAGE),
    "huge pages": advise(MADV_HUGEPAGE),
    "sequential": advise(2),
    "mergeable": advise(12),
    "part is not dumped": advise_part(16),
    "part is not inherited": advise_part(10),
    "part is cleared in a child": advise_part(18),
    "populate to read": advise(POPULATE_READ),
    "mlock": lock,
    "msync": Area.sync,
    "read": read,
    "discarded entries": discard_entries_of_shared_memory,
}


def _live_through(area: Area, event: Callable[[Area], None]) -> None:
    try:
        event(area)
    except OSError as error:
        pytest.skip(f"not of this kind of memory: {error.strerror}")


@every_kind
@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS.keys())
def test_a_write_is_reported_whatever_happens_before_and_after_it(kind: str, event: Callable[[Area], None]) -> None:
    if event is discard_entries_of_shared_memory and ("shared" not in kind or "huge" in kind):
        pytest.skip("private memory loses its contents, and huge pages their marks: see the blind spots")
    with memory_of(kind) as area:
        area.octets[:] = 1
        last = area.npages - 1
        with watched(area) as log:
            area.store(0, last)
            _live_through(area, event)
            assert written(log) >= {0, last}, "written before it"
            area.store(1, 2)
            assert written(log) >= {1, 2}, "written after it, when it had been armed again"
            _live_through(area, event)
            area.store(0, 3)
            assert written(log) >= {0, 3}, "armed before it, written after it"
            assert written(log) == set()
            assert [area[page] for page in (0, 1, 2, 3, last)] == [3, 2, 2, 2 + (last == 3), 2 + (last == 3)]

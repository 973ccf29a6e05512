"""What the kernel does not report, as it is today: each case asserts the loss, so that we learn when a kernel sees it, and that
``blind_spots`` names it.
"""

from __future__ import annotations

import mmap
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import pytest

from address_space import (
    DONTNEED,
    MAYMOVE,
    PAGE,
    PRIVATE,
    REMAP_FIXED,
    REMOVE,
    SHARED,
    Area,
    disk_file,
    memory_file,
    punch_hole,
    remap,
)
from bare_uffd import bare
from dirtylog.linux.pagemap import Pagemap, Scanner
from io_uring import Ring
from memory_kinds import memory_of
from uffd_here import forks, needs_uffd, watched, written

if TYPE_CHECKING:
    from collections.abc import Callable

    from dirtylog import DirtyLog

    Act = Callable[[], object]

pytestmark = [needs_uffd, forks]

NPAGES = 16
WHERE = range(4, 6)
OTHERS = "another mapping of the same memory, by another process, or to a mapped file by write(2)"
PINNED = "io_uring registered buffers"
DISCARDS = "discards of shared memory and of huge pages: MADV_REMOVE, fallocate, truncate; MADV_DONTNEED on hugetlbfs"
TAKEN = "another one who scans the same memory takes away"
REVERTED = "MADV_DONTNEED of changed pages of a private file mapping"


def _file(stack: ExitStack) -> int:
    return stack.enter_context(disk_file(b"f" * NPAGES * PAGE))


def _memfd(stack: ExitStack) -> int:
    return stack.enter_context(memory_file(NPAGES * PAGE))


def _mapped(stack: ExitStack, fd: int, flags: int = SHARED) -> Area:
    return stack.enter_context(Area.map(NPAGES, flags, fd=fd))


def _span() -> tuple[int, int]:
    return WHERE.start * PAGE, len(WHERE) * PAGE


# Each returns the area, filled by the test, and what changes the pages WHERE of it unseen.


def _alias(stack: ExitStack) -> tuple[Area, Act]:
    fd = _memfd(stack)
    alias = _mapped(stack, fd)
    return _mapped(stack, fd), lambda: alias.store(*WHERE)


def _write_to(make: Callable[[ExitStack], int]) -> Callable[[ExitStack], tuple[Area, Act]]:
    def scene(stack: ExitStack) -> tuple[Area, Act]:
        fd = make(stack)
        start, nbytes = _span()
        return _mapped(stack, fd), lambda: os.pwrite(fd, b"w" * nbytes, start)

    return scene


def _child(stack: ExitStack) -> tuple[Area, Act]:
    area = _mapped(stack, _memfd(stack))

    def act() -> None:
        child = os.fork()
        if not child:
            area.store(*WHERE)
            os._exit(0)
        os.waitpid(child, 0)

    return area, act


def _private_file_rewritten(stack: ExitStack) -> tuple[Area, Act]:
    """The pages have not been copied yet: the mapping shows the file."""
    fd = _file(stack)
    start, nbytes = _span()
    return _mapped(stack, fd, PRIVATE), lambda: os.pwrite(fd, b"w" * nbytes, start)


def _registered(stack: ExitStack) -> tuple[Area, Act]:
    try:
        ring = stack.enter_context(Ring())
    except OSError as error:
        pytest.skip(f"no io_uring: {error.strerror}")
    area = stack.enter_context(Area.map(NPAGES))
    area.octets[:] = 1
    ring.register(area)
    fd = _file(stack)
    start, nbytes = _span()
    return area, lambda: ring.read(fd, area.address + start, nbytes, registered=True)


def _removed(stack: ExitStack) -> tuple[Area, Act]:
    area = _mapped(stack, _memfd(stack))
    return area, lambda: area.advise(REMOVE, WHERE.start, len(WHERE))


def _punched(make: Callable[[ExitStack], int]) -> Callable[[ExitStack], tuple[Area, Act]]:
    def scene(stack: ExitStack) -> tuple[Area, Act]:
        fd = make(stack)
        return _mapped(stack, fd), lambda: punch_hole(fd, *_span())

    return scene


def _truncated(stack: ExitStack) -> tuple[Area, Act]:
    fd = _memfd(stack)

    def act() -> None:
        os.ftruncate(fd, WHERE.start * PAGE)
        os.ftruncate(fd, NPAGES * PAGE)

    return _mapped(stack, fd), act


def _huge(kind: str) -> Callable[[ExitStack], tuple[Area, Act]]:
    def scene(stack: ExitStack) -> tuple[Area, Act]:
        area = stack.enter_context(memory_of(kind))
        return area, lambda: area.advise(DONTNEED, 1, 1)

    return scene


def _reverted(stack: ExitStack) -> tuple[Area, Act]:
    area = _mapped(stack, _file(stack), PRIVATE)
    return area, lambda: area.advise(DONTNEED, WHERE.start, len(WHERE))


LOST: dict[str, tuple[Callable[[ExitStack], tuple[Area, Act]], str]] = {
    "a store through another mapping": (_alias, OTHERS),
    "a store by a child": (_child, OTHERS),
    "write to a memfd": (_write_to(_memfd), OTHERS),
    "write to a mapped file": (_write_to(_file), OTHERS),
    "write to a file that is mapped privately": (_private_file_rewritten, OTHERS),
    "a read into a registered buffer": (_registered, PINNED),
    "MADV_REMOVE": (_removed, DISCARDS),
    "a hole in a memfd": (_punched(_memfd), DISCARDS),
    "a hole in a mapped file": (_punched(_file), DISCARDS),
    "truncation of a memfd": (_truncated, DISCARDS),
    "MADV_DONTNEED of private huge pages": (_huge("hugetlb-private"), DISCARDS),
    "MADV_DONTNEED of a private mapping of huge pages": (_huge("hugetlb-memfd-private"), DISCARDS),
    "MADV_DONTNEED of copied pages of a file": (_reverted, REVERTED),
}


def _contents(area: Area) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return area.octets.reshape(area.npages, area.page_size).copy()


@pytest.mark.parametrize(("scene", "text"), LOST.values(), ids=LOST.keys())
def test_what_is_lost_is_said(scene: Callable[[ExitStack], tuple[Area, Act]], text: str) -> None:
    with ExitStack() as stack:
        area, act = scene(stack)
        if scene is _private_file_rewritten:
            area.octets.sum()  # there, and not copied
        elif scene is not _registered:
            area.octets[:] = 1
        log = stack.enter_context(watched(area))
        assert written(log) == set()
        before = _contents(area)
        _do(act)
        changed = set(np.flatnonzero((_contents(area) != before).any(axis=1)).tolist())
        assert changed, "the case is none: nothing has changed"
        assert not changed & written(log), "this kernel reports it: the blind spot has gone"
        assert any(text in spot for spot in log.memory.blind_spots)
        for page in changed:
            area.store(page)
        assert written(log) == changed, "what the process itself stores there is reported as ever"


def _do(act: Act) -> None:
    try:
        act()
    except OSError as error:
        pytest.skip(f"not here: {error.strerror}")


@pytest.mark.parametrize("kind", ["hugetlb-shared", "hugetlb-memfd-shared", "hugetlb-private"])
def test_a_store_to_huge_pages_is_lost_with_their_entries(kind: str) -> None:
    """Of other memory a page without an entry counts as written; of hugetlbfs it is clean, though it may hold a new store."""
    with memory_of(kind) as area:
        area.octets[:] = 1
        with watched(area) as log:
            area.store(1)
            area.advise(DONTNEED, 1, 1)
            assert written(log) == set(), "this kernel reports it: the blind spot has gone"
            assert any(DISCARDS in spot for spot in log.memory.blind_spots)
            assert area[1] == (0 if kind.endswith("private") else 2)
            assert written(log) == {1}, "once it is touched again it is reported, as a false positive would be"


def test_what_another_scan_takes_is_lost() -> None:
    """A scan needs no userfaultfd: whoever may open the pagemap can take the marks, and nothing tells whose they were."""
    with Area.map(NPAGES) as area, watched(area) as log:
        area.store(*WHERE)
        start, nbytes = area.span()
        taken: list[int] = []
        with Pagemap() as pagemap:
            Scanner(pagemap, 16).take(start, start + nbytes, lambda regions: taken.append(len(regions)))
        assert taken == [1]
        assert written(log) == set(), "this kernel reports it: the blind spot has gone"
        assert any(TAKEN in spot for spot in log.memory.blind_spots)


def test_memory_that_another_userfaultfd_has_come_to_scan_is_lost() -> None:
    """Only to register it again at every get would tell (EBUSY)."""
    with Area.map(NPAGES) as area, watched(area) as log, Area.map(8) as other:
        other.octets[:] = 2
        remap(other.span(), 8 * PAGE, MAYMOVE | REMAP_FIXED, area.address)
        other.set_mapped(False)
        with bare(Area(area.address, 8)):
            assert written(log) == set(), "this kernel reports it: the blind spot has gone"
            assert area[0] == 2, "though the contents are new"
            assert any(TAKEN in spot for spot in log.memory.blind_spots)


def test_registering_a_buffer_is_seen_though_what_is_read_into_it_is_not() -> None:
    with ExitStack() as stack:
        area = stack.enter_context(Area.map(NPAGES))
        area.octets[:] = 1
        log = stack.enter_context(watched(area))
        try:
            ring = stack.enter_context(Ring())
            ring.register(area)
        except OSError as error:
            pytest.skip(f"no io_uring: {error.strerror}")
        start, nbytes = _span()
        fd = _file(stack)
        ring.read(fd, area.address + start, nbytes, registered=True)
        assert written(log) >= set(WHERE), "pinning for writing marks the pages, and until they are armed nothing is lost"
        os.pwrite(fd, b"2" * nbytes, 0)
        ring.read(fd, area.address + start, nbytes, registered=True)
        assert written(log) == set()
        assert area[WHERE.start] == ord("2")


def test_comparing_has_none_of_these_blind_spots() -> None:
    import dirtylog  # noqa: PLC0415 - only here

    for name, (scene, _) in LOST.items():
        with ExitStack() as stack:
            try:
                area, act = scene(stack)
            except OSError:
                continue
            if scene is not _private_file_rewritten:
                area.octets[:] = 1
            log: DirtyLog = stack.enter_context(dirtylog.track(area.octets, port="compare"))
            try:
                act()
            except OSError:
                continue
            assert written(log), name


def test_sharing_is_what_python_maps_unless_told_otherwise() -> None:
    """mmap.mmap(-1, n) is shared: what a forked child stores to it is lost. What dirtylog.empty returns is private."""
    with mmap.mmap(-1, NPAGES * PAGE) as shared:
        octets = np.frombuffer(shared, np.uint8)
        area = Area(octets.ctypes.data, NPAGES)
        area.octets[:] = 1
        with watched(area) as log:
            child = os.fork()
            if not child:
                area.store(3)
                os._exit(0)
            os.waitpid(child, 0)
            assert area[3] == 2
            assert written(log) == set()
        del octets

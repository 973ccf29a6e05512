"""What is pinned in a process, by rings of io_uring that are really there."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from address_space import HUGE, PAGE, Area
from dirtylog import TargetGoneError
from dirtylog.linux import pins as pins_module
from dirtylog.linux.pins import NO_PINS, Pins, pins_of
from io_uring import Ring
from known_limits import known_limit
from victims import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

_MADV_HUGEPAGE = 14


@contextmanager
def registered(*areas: Area) -> Iterator[None]:
    """Register each area with a ring of its own."""
    rings: list[Ring] = []
    try:
        for area in areas:
            try:
                ring = Ring()
            except OSError as error:
                pytest.skip(f"no io_uring here: {error.strerror}")
            rings.append(ring)
            ring.register(area)
        yield
    finally:
        for ring in rings:
            ring.__exit__()


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Wait until the rings of the test are gone: the kernel closes them in its own time."""
    yield
    eventually(lambda: pins_of(os.getpid()) == NO_PINS, "something stays pinned")


def test_nothing_is_pinned() -> None:
    assert pins_of(os.getpid()) == NO_PINS


def test_registered_buffers_are_found_with_their_places() -> None:
    with Area.map(3) as one, Area.map(100) as other, registered(one, other):
        found = pins_of(os.getpid())
        assert set(found.ranges) == {one.span(), other.span()}
        assert found.unexplained == 0


def test_a_ring_with_several_descriptors_explains_its_buffers_once() -> None:
    """Or it would hide what is pinned elsewhere. Python's mmap has a descriptor of its own for each mapping of the ring."""
    with Area.map(3) as area, registered(area):
        assert pins_of(os.getpid()).ranges == (area.span(),)


def test_a_ring_without_buffers_pins_nothing() -> None:
    with registered(), Area.map(1):
        assert pins_of(os.getpid()) == NO_PINS


@known_limit
def test_a_buffer_in_a_transparent_huge_page_is_explained_as_a_whole() -> None:
    """The kernel counts all of the huge page, but pins the buffer only: there is nothing else that is pinned."""
    with Area.map(2 * HUGE // PAGE, align=HUGE) as area:
        area.advise(_MADV_HUGEPAGE)
        area.octets[:] = 1
        part = Area(area.address + 5 * PAGE, 3)
        with registered(part):
            found = pins_of(os.getpid())
            assert set(found.ranges) == {part.span()}
            assert found.unexplained == 0


def test_where_descriptors_cannot_be_looked_at_all_is_unexplained(monkeypatch: pytest.MonkeyPatch) -> None:
    iterdir = Path.iterdir

    def refuse(path: Path) -> Iterator[Path]:
        if path.name == "fdinfo":
            raise PermissionError
        return iterdir(path)

    with Area.map(3) as area, registered(area):
        monkeypatch.setattr(pins_module.Path, "iterdir", refuse)  # type: ignore[attr-defined]  # the name that the module looks up
        assert pins_of(os.getpid()) == Pins((), 3 * PAGE)
        monkeypatch.undo()


def test_a_buffer_that_begins_and_ends_within_pages() -> None:
    """All of its pages are pinned."""
    assert pins_module._whole_pages(0x1FFF, 2) == 2 * PAGE
    assert pins_module._whole_pages(0x1000, PAGE) == PAGE
    assert pins_module._whole_pages(0x1000, PAGE + 1) == 2 * PAGE
    assert pins_module._buffers(Path("/proc/self/fdinfo/nothing")) == []


def test_a_process_that_is_not_there() -> None:
    child = subprocess.Popen((sys.executable, "-c", ""))
    child.wait()
    with pytest.raises(TargetGoneError):
        pins_of(child.pid)

"""The kinds of memory that a process has, each ready to be tracked: what tests of userfaultfd run over."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

from address_space import ANONYMOUS, HUGE, HUGETLB, MFD_HUGETLB, PAGE, PRIVATE, SHARED, Area, disk_file, memory_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MADV_HUGEPAGE = 14


def _anonymous(npages: int) -> Callable[[ExitStack], Area]:
    return lambda stack: stack.enter_context(Area.map(npages))


def _transparent_huge(stack: ExitStack) -> Area:
    area = stack.enter_context(Area.map(4 * HUGE // PAGE, align=HUGE))
    area.advise(MADV_HUGEPAGE)
    return area


def _huge(flags: int) -> Callable[[ExitStack], Area]:
    def make(stack: ExitStack) -> Area:
        try:
            return stack.enter_context(Area.map(4, flags | ANONYMOUS | HUGETLB, page_size=HUGE))
        except OSError as error:
            pytest.skip(f"no huge pages are free: {error.strerror}")

    return make


def _huge_memory_file(flags: int) -> Callable[[ExitStack], Area]:
    def make(stack: ExitStack) -> Area:
        try:
            fd = stack.enter_context(memory_file(4 * HUGE, MFD_HUGETLB))
            return stack.enter_context(Area.map(4, flags, fd=fd, page_size=HUGE))
        except OSError as error:
            pytest.skip(f"no huge pages are free: {error.strerror}")

    return make


def _memory_file(flags: int) -> Callable[[ExitStack], Area]:
    def make(stack: ExitStack) -> Area:
        fd = stack.enter_context(memory_file(100 * PAGE, contents=b"x" * 40 * PAGE))
        return stack.enter_context(Area.map(100, flags, fd=fd))

    return make


def _disk_file(flags: int) -> Callable[[ExitStack], Area]:
    def make(stack: ExitStack) -> Area:
        fd = stack.enter_context(disk_file(b"x" * 100 * PAGE))
        return stack.enter_context(Area.map(100, flags, fd=fd))

    return make


KINDS: dict[str, Callable[[ExitStack], Area]] = {
    "ten-pages": _anonymous(10),
    "5120-pages": _anonymous(5120),
    "thp": _transparent_huge,
    "anonymous-shared": lambda stack: stack.enter_context(Area.map(100, SHARED | ANONYMOUS)),
    "hugetlb-private": _huge(PRIVATE),
    "hugetlb-shared": _huge(SHARED),
    "hugetlb-memfd-shared": _huge_memory_file(SHARED),
    "hugetlb-memfd-private": _huge_memory_file(PRIVATE),
    "memfd-shared": _memory_file(SHARED),
    "memfd-private": _memory_file(PRIVATE),
    "file-shared": _disk_file(SHARED),
    "file-private": _disk_file(PRIVATE),
}


@contextmanager
def memory_of(kind: str) -> Iterator[Area]:
    """Give memory of a kind, untouched."""
    with ExitStack() as stack:
        yield KINDS[kind](stack)


every_kind = pytest.mark.parametrize("kind", KINDS)

"""How a caller of PAGEMAP_SCAN loses pages without doing anything that looks wrong; and that dirtylog does not.

Each trap three times: bare, where the loss is the kernel's; in dirtylog, where nothing is lost; and in dirtylog without its guard,
so that the scenario is known to see the loss.
"""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dirtylog
from address_space import DONTNEED, HUGE, PAGE, READ, Area
from bare_uffd import WRITTEN, bare
from dirtylog.linux import abi, probe
from dirtylog.linux.abi import Category, Scan
from dirtylog.linux.buffer_port import BufferPort
from dirtylog.linux.mappings import PageSizes
from dirtylog.linux.pagemap import POPULATED, Pagemap, Scanner
from dirtylog.linux.userfaultfd import Userfaultfd
from memory_kinds import MADV_HUGEPAGE, memory_of
from uffd_here import needs_uffd, port_of_its_own, watched, written

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dirtylog.linux.abi import PmScanArg

    Patch = pytest.MonkeyPatch

pytestmark = needs_uffd

KERNEL_BUFFER = 512
"""Regions that the kernel gathers before it writes them to the vector."""
NPAGES = 4 * KERNEL_BUFFER
ALTERNATE = set(range(0, 3 * KERNEL_BUFFER, 2))
PER_HUGE = HUGE // PAGE


@pytest.fixture(autouse=True)
def _own_port() -> Iterator[None]:
    with port_of_its_own():
        yield


def tamper(patch: Patch, change: Callable[[PmScanArg], None]) -> None:
    """Let scans ask the kernel for something else than dirtylog does."""
    real = Pagemap.ioctl

    def ioctl(self: Pagemap, request: int, argument: PmScanArg, *rest: Any) -> int:
        asked = abi.PmScanArg.from_buffer_copy(argument)
        change(asked)
        count = real(self, request, asked, *rest)
        argument.walk_end = asked.walk_end
        return count

    patch.setattr(Pagemap, "ioctl", ioctl)


# --- L1: a vector that cannot be written


def test_l1_bare_pages_that_cannot_be_delivered_are_armed_all_the_same() -> None:
    with Area.map(NPAGES) as area, bare(area) as scene, Area.map(16, protection=READ) as vector:
        area.store(*ALTERNATE)
        assert scene.scan(vec=vector.address, vec_len=2048).errno == errno.EFAULT
        assert len(scene.scan().pages) == len(ALTERNATE) - KERNEL_BUFFER


def lost_in_a_vector(change: Callable[[PmScanArg], None], patch: Patch) -> set[int]:
    with Area.map(NPAGES) as area, watched(area) as log:
        area.store(*ALTERNATE)
        with patch.context() as inner:
            tamper(inner, change)
            try:
                found = written(log)
            except dirtylog.DirtyLogError:
                found = set()
        return ALTERNATE - found - written(log)


def test_l1_the_vector_is_memory_of_its_own(monkeypatch: Patch) -> None:
    assert lost_in_a_vector(lambda _: None, monkeypatch) == set()
    with Area.map(16, protection=READ) as unwritable:

        def misplace(asked: PmScanArg) -> None:
            asked.vec, asked.vec_len = unwritable.address, 2048

        assert lost_in_a_vector(misplace, monkeypatch)


# --- L2: an error after pages have been taken


def half_watched(area: Area) -> None:
    """Write pages, and map memory that nobody watches behind them."""
    area.store(*ALTERNATE)
    area.map_again(NPAGES - 100, 50)


def test_l2_bare_a_range_that_is_watched_in_part_loses_the_count_and_the_place() -> None:
    with Area.map(NPAGES) as area, bare(area) as scene:
        half_watched(area)
        answer = scene.scan()
        assert (answer.errno, answer.runs) == (errno.EPERM, [])
        assert answer.walk_end != NPAGES - 100, "where it stopped is not said"
        assert scene.scan(0, NPAGES - 100).pages == set(), "armed already: whoever believes the error has lost them"
        vector = scene.vector[scene.vector["end"] != 0]
        assert {first for first, _ in scene.runs(vector)} == ALTERNATE, "but here they are"


def lost_to_an_error() -> set[int]:
    with Area.map(NPAGES) as area, watched(area) as log:
        half_watched(area)
        return (ALTERNATE | set(range(NPAGES - 100, NPAGES - 50))) - written(log) - written(log)


def test_l2_what_an_error_leaves_in_the_vector_is_delivered(monkeypatch: Patch) -> None:
    """Twice over: what is registered afresh has no marks at all."""
    assert lost_to_an_error() == set()
    monkeypatch.setattr(Userfaultfd, "register_afresh", Userfaultfd.register)
    assert lost_to_an_error() == set()
    monkeypatch.setattr(Scanner, "settle", lambda _self, _deliver: None)
    assert lost_to_an_error() == ALTERNATE


# --- L3: memory that nobody watches is passed over in silence


def test_l3_bare_memory_mapped_anew_has_nothing_to_report() -> None:
    with Area.map(16) as area, bare(area) as scene:
        area.map_again(4, 4)
        area.store(*range(16))
        assert scene.scan(4, 4, flags=Scan.WP_MATCHING).runs == []
        assert scene.scan(4, 4).errno == errno.EPERM, "PM_SCAN_CHECK_WPASYNC says so"


def lost_where_nobody_watches() -> set[int]:
    with Area.map(16) as area, watched(area) as log:
        area.map_again(4, 4)
        area.store(*range(16))
        lost = set(range(16)) - written(log)
        area.store(*range(16))
        return lost | set(range(16)) - written(log)


def test_l3_every_scan_checks_that_the_memory_is_watched(monkeypatch: Patch) -> None:
    assert lost_where_nobody_watches() == set()
    monkeypatch.setattr("dirtylog.linux.pagemap.Scan", SimpleNamespace(WP_MATCHING=Scan.WP_MATCHING, CHECK_WPASYNC=0))
    assert lost_where_nobody_watches() == {4, 5, 6, 7}


# --- L4: without a vector the masks count for nothing


def test_l4_bare_a_scan_without_a_vector_arms_what_does_not_match() -> None:
    with Area.map(16) as area, bare(area) as scene:
        area.store(3)
        impossible = {"category_mask": Category.FILE, "return_mask": 0}
        assert scene.scan(vec=0, vec_len=0, **impossible).runs == []
        assert scene.scan().pages == set()


def test_l4_every_scan_that_arms_has_a_vector(monkeypatch: Patch) -> None:
    assert lost_in_a_vector(lambda _: None, monkeypatch) == set()

    def leave_out(asked: PmScanArg) -> None:
        asked.vec = asked.vec_len = 0

    assert lost_in_a_vector(leave_out, monkeypatch) == ALTERNATE


# --- L5: a vector that is too short


def test_l5_bare_a_short_vector_has_the_first_pages_only() -> None:
    with Area.map(NPAGES) as area, bare(area) as scene:
        area.store(*ALTERNATE)
        answer = scene.scan(vec_len=32)
        assert len(answer.runs) == 32
        assert 62 < answer.walk_end <= 64, "which is all that tells"


def lost_after_a_short_vector(patch: Patch) -> set[int]:
    """Return what a get does not report: here it counts only what that one get reports."""
    patch.setattr("dirtylog.linux.uffd_port.Scanner", lambda pagemap: Scanner(pagemap, 32))
    with Area.map(NPAGES) as area, watched(area) as log:
        area.store(*ALTERNATE)
        return ALTERNATE - written(log)


def test_l5_a_scan_goes_on_where_the_vector_was_full(monkeypatch: Patch) -> None:
    assert lost_after_a_short_vector(monkeypatch) == set()
    real = Pagemap.ioctl

    def to_the_end(self: Pagemap, request: int, argument: PmScanArg, *rest: Any) -> int:
        count = real(self, request, argument, *rest)
        argument.walk_end = argument.end
        return count

    monkeypatch.setattr(Pagemap, "ioctl", to_the_end)
    monkeypatch.setattr(BufferPort, "_instance", None)
    assert lost_after_a_short_vector(monkeypatch)


# --- L6: part of a huge page of hugetlbfs


def test_l6_bare_a_part_of_a_huge_page_is_walked_for_ever() -> None:
    with memory_of("hugetlb-private") as area, bare(area) as scene:
        area.store(0)
        answer = scene.scan(end=area.address + PAGE)
        assert (answer.runs, answer.walk_end) == ([], 0), "whoever goes on from walk_end never comes to an end"
        assert scene.scan().pages == {0}


def test_l6_a_part_of_a_huge_page_is_tracked_as_the_whole(monkeypatch: Patch) -> None:
    with memory_of("hugetlb-private") as area:
        area.octets[:] = 1
        part = area.octets[HUGE + 3 * PAGE : HUGE + 5 * PAGE]
        with dirtylog.track(part, port="uffd") as log:
            slot = log.memory.slots[0]
            assert (slot.npages, slot.page_size, slot.host_address) == (1, HUGE, area.address + HUGE)
            part[-1] = 2
            assert written(log) == {0}
        with bare(area), Pagemap() as pagemap:
            area.store(0)
            with pytest.raises(dirtylog.DirtyLogError, match="hugetlbfs"):
                Scanner(pagemap).take(area.address, area.address + PAGE, lambda _: None)
        monkeypatch.setattr(PageSizes, "of", lambda _self, _mapping: PAGE)
        with pytest.raises(dirtylog.InvalidArgumentError):
            dirtylog.track(part, port="uffd")


# --- L7: pages that are written, and not there


def test_l7_bare_asking_for_pages_that_are_present_misses_those_that_have_gone() -> None:
    with Area.map(16) as area, bare(area) as scene:
        area.store(3)
        area.advise(DONTNEED, 3, 1)
        present = WRITTEN | Category.PRESENT
        assert scene.scan(category_mask=present, return_mask=present).pages == set()
        assert scene.scan().pages == {3}


def lost_when_it_goes() -> set[int]:
    with Area.map(16) as area:
        area.octets[:] = 1
        with watched(area) as log:
            area.advise(DONTNEED, 3, 1)
            return {3} - written(log)


def test_l7_written_is_all_that_is_asked_for(monkeypatch: Patch) -> None:
    assert lost_when_it_goes() == set()

    def present_only(asked: PmScanArg) -> None:
        asked.category_mask |= Category.PRESENT

    tamper(monkeypatch, present_only)
    assert lost_when_it_goes() == {3}


# --- L8: kernels that take what was discarded together with its page table for clean (until July 2026)


def test_l8_bare_the_probe_says_what_a_scan_really_sees() -> None:
    with Area.map(PER_HUGE, align=HUGE) as area:
        area.advise(MADV_HUGEPAGE)
        area.octets[:] = 1
        with bare(area) as scene:
            area.advise(DONTNEED)
            assert (scene.scan().pages == set(range(PER_HUGE))) == probe.sees_discarded_tables()


def lost_with_its_table() -> set[int]:
    lost: set[int] = set()
    with Area.map(2 * PER_HUGE, align=HUGE) as area:
        area.advise(MADV_HUGEPAGE)
        area.octets[:] = 1
        with watched(area) as log:
            for pages in (range(PER_HUGE), range(PER_HUGE + 5, PER_HUGE + 7)):
                area.advise(DONTNEED, pages.start, len(pages))
                lost |= set(pages) - written(log)
                area.store(*pages)
                lost |= set(pages) - written(log)
    return lost


def test_l8_on_a_kernel_that_does_not_see_them_they_are_looked_for(monkeypatch: Patch) -> None:
    """Such a kernel is had by asking this one for what is there only: it then leaves holes alone."""

    def take_what_is_there(asked: PmScanArg) -> None:
        if asked.flags & Scan.WP_MATCHING:
            asked.category_anyof_mask = POPULATED

    assert lost_with_its_table() == set()
    tamper(monkeypatch, take_what_is_there)
    sees = probe.sees_discarded_tables.__wrapped__()
    assert not sees, "the probe finds out"
    monkeypatch.setattr("dirtylog.linux.uffd_port.sees_discarded_tables", lambda: sees)
    assert lost_with_its_table() == set()
    monkeypatch.setattr(Scanner, "holes", lambda *_: None)
    assert lost_with_its_table(), "without the second scan"
    monkeypatch.undo()
    tamper(monkeypatch, take_what_is_there)
    monkeypatch.setattr("dirtylog.linux.uffd_port.sees_discarded_tables", lambda: True)
    assert np.isin(range(PER_HUGE), list(lost_with_its_table())).all(), "without the probe"

"""The kinds of memory that another process has, the huge and the many, and what of it cannot be logged or not fully."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from address_space import ANONYMOUS, DONTNEED, HUGE, HUGETLB, MFD_HUGETLB, NONE, NORESERVE, PAGE, PRIVATE, READ, SHARED, WRITE
from dirtylog.linux.mappings import read_mappings
from puppets import Puppet, follow, logged, slot_at
from victims import needs_victims

if TYPE_CHECKING:
    from collections.abc import Iterator

    import dirtylog

pytestmark = needs_victims

NPAGES = 64
EVERYTHING = set(range(NPAGES))
GIB, TIB = 1 << 30, 1 << 40


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    with Puppet() as started:
        yield started


# --- files, and memory that is shared


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("flags", [PRIVATE, SHARED])
@pytest.mark.parametrize("kind", ["memfd", "disk"])
def test_a_mapping_of_a_file(puppet: Puppet, tmp_path: Path, kind: str, flags: int, early: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"f" * NPAGES * PAGE)
    fd = puppet.open(str(path)) if kind == "disk" else puppet.memory_file(NPAGES)
    address = puppet.map(NPAGES, flags, fd=fd) if early else 0
    with logged(puppet) as (memory, log):
        follow(log)
        if not early:
            address = puppet.map(NPAGES, flags, fd=fd)
            assert follow(log).at(address, NPAGES) == EVERYTHING
        slot = slot_at(memory, address)
        assert not slot.anonymous
        for pages in ({1}, {1, 2, 63}, set(), EVERYTHING):
            puppet.store(address, pages, 7)
            assert follow(log).at(address, NPAGES) == pages
            assert (memory.read(slot.id, sorted(pages))[:, 0] == 7).all()
        seen = any("shared" in reason for reason in memory.incomplete)
        assert seen == (flags == SHARED), memory.incomplete


def test_what_another_process_writes_to_shared_memory_is_said_not_to_be_seen(puppet: Puppet) -> None:
    address = puppet.map(NPAGES, SHARED | ANONYMOUS)
    with logged(puppet) as (memory, log):
        follow(log)
        puppet.order(f"fork fill {address} {PAGE} {NPAGES} 9")
        assert follow(log).at(address, NPAGES) == set()
        assert puppet.peek(address, 1) == b"\x09"
        assert any("shared" in reason for reason in memory.incomplete)
        assert any("by another process" in spot for spot in memory.blind_spots)


def test_private_memory_alone_is_complete(puppet: Puppet) -> None:
    with logged(puppet) as (memory, log):
        puppet.map(NPAGES)
        follow(log)
        assert memory.incomplete == ()
        assert [skipped for skipped in memory.skipped if "w" in skipped.mapping.permissions] == []


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("kind", ["private", "shared", "memfd"])
def test_huge_pages_of_hugetlbfs(puppet: Puppet, kind: str, early: bool) -> None:
    npages = 3

    def make() -> int:
        try:
            if kind == "memfd":
                fd = puppet.memory_file(npages, MFD_HUGETLB, page_size=HUGE)
                return puppet.map(npages, SHARED, fd=fd, page_size=HUGE)
            flags = (SHARED if kind == "shared" else PRIVATE) | ANONYMOUS | HUGETLB
            return puppet.map(npages, flags, page_size=HUGE)
        except OSError as error:
            pytest.skip(f"no huge pages are free: {error.strerror}")

    address = make() if early else 0
    with logged(puppet) as (memory, log):
        follow(log)
        if not early:
            address = make()
            puppet.store(address, [1], page_size=HUGE)
            assert follow(log).at(address, npages, HUGE) >= {1}
        slot = slot_at(memory, address)
        assert (slot.npages, slot.page_size) == (npages, HUGE)
        puppet.store(address, [0, 2], 5, page_size=HUGE)
        puppet.order(f"fill {address + 2 * HUGE + 77 * PAGE} 1 1 6")
        assert follow(log).at(address, npages, HUGE) == {0, 2}
        contents = memory.read(slot.id, [2])
        assert contents.shape == (1, HUGE)
        assert (contents[0, 0], contents[0, 77 * PAGE]) == (5, 6)
        assert follow(log).at(address, npages, HUGE) == set()


# --- the huge


def test_a_sparse_reservation_costs_what_is_there(puppet: Puppet) -> None:
    npages = 64 * GIB // PAGE
    with logged(puppet) as (_, log):
        follow(log)
        address = puppet.map(npages, PRIVATE | ANONYMOUS | NORESERVE)
        pages = {0, 1000, npages // 2, npages - 1}
        puppet.store(address, pages)
        assert follow(log).at(address, npages) == pages
        tables = page_tables_kib(puppet.pid)
        assert follow(log).at(address, npages) == set()
        puppet.store(address, [1000, 1001])
        began = time.perf_counter()
        assert follow(log).at(address, npages) == {1000, 1001}
        assert time.perf_counter() - began < 5.0
        puppet.advise(address + 900 * PAGE, 101, DONTNEED)
        assert follow(log).at(address, npages) == {1000}
        assert page_tables_kib(puppet.pid) - tables < 256


def test_a_reservation_larger_than_a_slot(puppet: Puppet) -> None:
    """As runtimes reserve address space: in several slots, none of which holds anything."""
    npages = 20 * TIB // PAGE
    with logged(puppet) as (memory, log):
        follow(log)
        address = puppet.map(npages, PRIVATE | ANONYMOUS | NORESERVE, protection=NONE)
        assert follow(log).at(address, npages) == set()
        slots = [slot for slot in memory.slots if address <= slot.host_address < address + npages * PAGE]
        assert len(slots) == 3
        assert sum(slot.npages for slot in slots) == npages
        middle = 9 * TIB // PAGE
        puppet.protect(address + middle * PAGE, 16, READ | WRITE)
        puppet.store(address, [middle, middle + 3])
        began = time.perf_counter()
        assert follow(log).at(address, npages) == {middle, middle + 3}
        assert time.perf_counter() - began < 20.0
        puppet.unmap(address + 10 * TIB, 16)
        assert follow(log).at(address, npages) <= set(range(10 * TIB // PAGE, 10 * TIB // PAGE + 16))
        assert memory.incomplete == ()


def test_two_thousand_mappings(puppet: Puppet) -> None:
    count = 2000
    place = puppet.map(2 * count, protection=NONE)
    puppet.unmap(place, 2 * count)
    addresses = [place + 2 * number * PAGE for number in range(count)]
    puppet.orders(*(f"call 9 {address} {PAGE} 3 {PRIVATE | ANONYMOUS | 0x10} -1 0" for address in addresses[::2]))
    with logged(puppet) as (memory, log):
        follow(log)
        puppet.orders(*(f"call 9 {address} {PAGE} 3 {PRIVATE | ANONYMOUS | 0x10} -1 0" for address in addresses[1::2]))
        puppet.orders(*(f"fill {address} 1 1 1" for address in addresses))
        assert follow(log).at(place, 2 * count) == set(range(0, 2 * count, 2))
        assert len(memory.slots) > count
        random = np.random.default_rng(1)
        for _ in range(5):
            chosen = set((2 * random.integers(count, size=50)).tolist())
            puppet.store(place, chosen)
            began = time.perf_counter()
            assert follow(log).at(place, 2 * count) == chosen
            assert time.perf_counter() - began < 10.0
        puppet.orders(*(f"call 11 {address} {PAGE}" for address in addresses[::3]))
        follow(log)
        assert memory.stats.mappings == len(memory.slots) < 2 * count


# --- what is chosen, and what is skipped


@pytest.mark.parametrize(
    ("maps", "chosen"),
    [
        (["anonymous"], {"anonymous", "heap", "stack"}),
        (["heap"], {"heap"}),
        (["stack", "heap"], {"heap", "stack"}),
        (["shared"], {"shared"}),
        (["file"], {"shared", "program"}),
        (["*/puppet*"], {"program"}),
        (["/memfd:*"], {"shared"}),
        (["writable"], {"anonymous", "heap", "stack", "shared", "program"}),
    ],
)
def test_a_choice_of_mappings(puppet: Puppet, maps: list[str], chosen: set[str]) -> None:
    puppet.brk(puppet.brk() + 16 * PAGE)
    places = {
        "anonymous": puppet.map(NPAGES),
        "shared": puppet.map(NPAGES, SHARED, fd=puppet.memory_file(NPAGES)),
        "heap": puppet.brk() // PAGE * PAGE - PAGE,
        "stack": puppet.order("stack 8"),
        "program": next(one.start for one in read_mappings(puppet.pid) if one.name.endswith("puppet") and one.is_kind("writable")),
    }
    with logged(puppet, maps=maps) as (memory, log):
        follow(log)
        assert {name for name, place in places.items() if is_logged(memory, place)} == chosen
        new = puppet.map(NPAGES)
        follow(log)
        assert is_logged(memory, new) == ("anonymous" in chosen), "the choice is made anew for what is mapped later"


def test_a_range_of_addresses(puppet: Puppet) -> None:
    first, second = puppet.map(NPAGES), puppet.map(NPAGES, SHARED | ANONYMOUS)
    with logged(puppet, maps=[f"{second + PAGE:#x}-{second + 2 * PAGE:#x}"]) as (memory, log):
        puppet.store(second, [60])
        assert follow(log).at(second, NPAGES) == {60}
        assert [slot.host_address for slot in memory.slots] == [second]
        assert not is_logged(memory, first)


def test_what_cannot_be_watched_is_skipped(puppet: Puppet, tmp_path: Path) -> None:
    """Only where the process could write it, it is told of as a gap."""
    path = tmp_path / "file"
    path.write_bytes(b"f" * PAGE)
    harmless = puppet.map(1, SHARED, fd=puppet.open(str(path), os.O_RDONLY), protection=READ)
    with logged(puppet) as (memory, log):
        follow(log)
        assert [skipped.mapping.start for skipped in memory.skipped] == [harmless]
        assert "may not be written" in memory.skipped[0].reason
        assert memory.incomplete == ()
        assert memory.stats.skipped == 1


def page_tables_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmPTE:"))


def is_logged(memory: dirtylog.Memory, address: int) -> bool:
    return any(slot.host_address <= address < slot.host_address + slot.nbytes for slot in memory.slots)

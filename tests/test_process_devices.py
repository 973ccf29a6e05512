"""Memory of another process that is pinned for a device (registered buffers of io_uring): what is read into it makes no fault."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from address_space import PAGE, SHARED
from dirtylog.linux.preflight import read_status
from puppet_rings import PuppetRing
from puppets import Puppet, follow, logged, slot_at
from victims import eventually, needs_victims

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_victims

NPAGES = 64
PINNED = {8, 9, 10, 11}


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    with Puppet() as started:
        yield started


@pytest.fixture
def ring(puppet: Puppet) -> PuppetRing:
    try:
        return PuppetRing(puppet)
    except OSError as error:
        pytest.skip(f"no io_uring here: {error.strerror}")


@pytest.fixture
def source(puppet: Puppet) -> int:
    """A file of one page."""
    fd = puppet.memory_file(1)
    page = puppet.map(1, SHARED, fd=fd)
    puppet.order(f"fill {page} 1 {PAGE} 122")
    puppet.unmap(page, 1)
    return fd


def test_registered_buffers_count_as_written_always(puppet: Puppet, ring: PuppetRing, source: int) -> None:
    address = puppet.map(NPAGES)
    puppet.fill(address, NPAGES)
    with logged(puppet) as (memory, log):
        follow(log)
        ring.register(address + 8 * PAGE, len(PINNED))
        assert follow(log).at(address, NPAGES) == PINNED
        assert follow(log).at(address, NPAGES) == PINNED
        ring.read(source, address + 9 * PAGE, PAGE)
        assert follow(log).at(address, NPAGES) == PINNED
        slot = slot_at(memory, address)
        page = (address - slot.host_address) // PAGE + 9
        assert (memory.read(slot.id, [page]) == ord("z")).all()
        assert not any("VmPin" in reason for reason in memory.incomplete), "all that is pinned is known"
        puppet.store(address, [30])
        assert follow(log).at(address, NPAGES) == PINNED | {30}


@pytest.mark.parametrize("how", ["unregister", "close"])
def test_what_was_read_before_a_buffer_is_let_go_is_reported(puppet: Puppet, ring: PuppetRing, source: int, how: str) -> None:
    address = puppet.map(NPAGES)
    puppet.fill(address, NPAGES)
    ring.register(address + 8 * PAGE, len(PINNED))
    with logged(puppet) as (_, log):
        follow(log)
        follow(log)
        ring.read(source, address + 9 * PAGE, PAGE)
        if how == "close":
            puppet.unmap(ring._rings, 4)
            puppet.unmap(ring._sqes, 1)
            ring.close()
        else:
            ring.unregister()
        eventually(lambda: read_status(puppet.pid).pinned == 0, "the pages are not pinned any more")
        assert 9 in follow(log).at(address, NPAGES), "the last read came after the get before"
        assert follow(log).at(address, NPAGES) == set()

"""A million logged stores on each port, the guest never stopped, against the oracle of what was stored."""

from __future__ import annotations

import numpy as np
import pytest

from dirtylog import DirtyLog
from dirtylog.emulated.isa import ISAS
from dirtylog.emulated.machine import EmulatedMemory
from dirtylog.guests.machine import RAM_SLOT
from dirtylog.guests.programs import Pattern
from sources import open_source, sources

STORES = 500_000
NATIVE_STORES = 40 * STORES
"""For threads of a process, which no exit to a hypervisor or emulator slows down."""
PAGES = 2048
VCPUS = 2


def last_value_of_each_page(pattern: Pattern) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Return what the last round over all pages stores: their order has the period PAGES."""
    assert pattern.count is not None
    values = np.zeros(PAGES, np.uint64)
    page = pattern.page
    for number in range(pattern.count % PAGES + PAGES):
        values[page] = pattern.value + (pattern.count // PAGES * PAGES - PAGES + number) * pattern.step
        page = page * pattern.mul + pattern.add & pattern.mask
    return values


@pytest.mark.parametrize("source", sources())
def test_a_million_stores_lose_nothing(source: str) -> None:
    """The copy is made from the log alone while both vCPUs store; when they halt, it is what was stored last."""
    count = NATIVE_STORES if source.startswith(("buffer", "process")) else STORES
    loops = [
        Pattern(base=index * PAGES << 12, page=index, mul=1664525, add=1013904223 % PAGES | 1, mask=PAGES - 1, count=count)
        for index in range(VCPUS)
    ]
    npages = VCPUS * PAGES + 3
    reports = 0
    with open_source(source, npages << 12, vcpus=VCPUS, loops=loops) as memory, DirtyLog(memory) as log:
        copy = memory.read(RAM_SLOT, np.arange(npages))
        memory.resume()
        while not memory.wait(timeout=0.002):
            pages = log.get(RAM_SLOT).pages()
            copy[pages] = memory.read(RAM_SLOT, pages)
            reports += len(pages)
        pages = log.get(RAM_SLOT).pages()
        copy[pages] = memory.read(RAM_SLOT, pages)
        isa = ISAS.get(memory.port.isa) if isinstance(memory, EmulatedMemory) else ISAS["x86"]
        word = np.dtype(f"{'>' if isa and isa.byte_order == 'big' else '<'}u{isa.word_bytes if isa else 8}")
        for index, pattern in enumerate(loops):
            stored = copy[index * PAGES : (index + 1) * PAGES, : word.itemsize].copy().view(word).ravel()
            lost = np.flatnonzero(stored != last_value_of_each_page(pattern))
            assert not len(lost), f"vCPU {index}: {len(lost)} pages lost, first {lost[:5]}"
        assert reports > 2 * PAGES, "the log was read while the guest ran"
        assert np.array_equal(copy, memory.read(RAM_SLOT, np.arange(npages)))

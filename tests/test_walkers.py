"""Every port against a second reading of its tables: :mod:`walkers` decodes the raw bytes, and the two must agree.

The tests drive the vCPUs themselves, so that nothing happens between two looks at the tables.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dirtylog import BadSlotError, DirtyBitmap, DirtyLog, GuestFaultError, InvalidArgumentError, SlotFlags
from dirtylog.emulated.arch import PORTS
from dirtylog.emulated.arch.ppc_hv import PpcHvPort
from dirtylog.emulated.arch.x86 import X86PmlPort
from dirtylog.emulated.cpu_trace import Access
from dirtylog.emulated.machine import EmulatedMemory
from dirtylog.port import ProtectPort
from scene import InlineVcpu
from walkers import Mapping, find, walk_ept

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dirtylog.memslot import MemorySlot

BLOCK_PAGES = {"x86": 512, "x86-pml": 512, "arm": 512, "arm64": 512, "riscv": 512, "loongarch": 512, "s390": 256}
"""How many pages a block has, of the ports that have blocks."""

PROTECT = [name for name, port in PORTS.items() if issubclass(port, ProtectPort)]


class RunningVcpu(InlineVcpu):
    """A vCPU that is in the guest while ``in_guest`` says so: it flushes when it is waited for, not when it is asked."""

    def request_flush(self) -> int | None:
        return 1 if self.in_guest else super().request_flush()

    def wait_flushed(self, ticket: int) -> None:
        assert ticket == 1
        super().request_flush()


class Machine:
    """Slots 0, 1, ... of some (base, length), two vCPUs, and what a test knows of them: the contents, and what was written."""

    def __init__(self, arch: str, *slots: tuple[int, int], readonly: Iterable[int] = ()) -> None:
        self.memory = EmulatedMemory(PORTS[arch])
        self.port = self.memory.port
        for number, (base, npages) in enumerate(slots):
            self.memory.add_slot(number, base, npages, SlotFlags.READONLY if number in readonly else SlotFlags.NONE)
        self.vcpus = [RunningVcpu(self.memory, index) for index in range(2)]
        self.port.vcpus = self.vcpus
        # Only ia64 has tables of its own for each vCPU.
        self.table_vcpus = range(2 if arch == "ia64" else 1)
        self.written: dict[int, set[int]] = {slot.id: set() for slot in self.memory.slots}
        """Pages that the next get owes, by slot."""
        self.words: dict[tuple[int, int], int] = {}
        self.left: set[int] = set()
        """Guest frames that a slot has moved away from, or that it had when it was removed."""
        self._value = 0

    def slot(self, number: int = 0) -> MemorySlot:
        return self.memory.slots[number]

    def gfns(self, number: int) -> range:
        return range(self.slot(number).base_gfn, self.slot(number).end_gfn)

    def store(self, page: int, number: int = 0, vcpu: int = 0) -> None:
        """Store a value that was never stored before."""
        self._value += 1
        self.vcpus[vcpu].cpu.access(Access((self.slot(number).base_gfn + page) << 12, self._value))
        self._has_written(number, page)

    def load(self, page: int, number: int = 0, vcpu: int = 0) -> None:
        """Load, and see that the last value stored is there."""
        found = self.vcpus[vcpu].cpu.access(Access((self.slot(number).base_gfn + page) << 12))
        assert found == self.words.get((number, page), 0)

    def host_write(self, page: int, number: int = 0) -> None:
        self._value += 1
        contents = np.zeros((1, 4096), np.uint8)
        contents[0, :8] = np.frombuffer(self._value.to_bytes(8, "little"), np.uint8)
        self.memory.write(number, [page], contents)
        self._has_written(number, page)

    def find(self, page: int, number: int = 0, vcpu: int = 0) -> Mapping | None:
        return find(self.port, self.slot(number).base_gfn + page, vcpu)

    def mapped(self, page: int, number: int = 0) -> Mapping:
        mapping = self.find(page, number)
        assert mapping is not None
        return mapping

    def writable(self, pages: Iterable[int], number: int = 0) -> set[int]:
        """Return the pages to which some vCPU may store without anybody learning of it."""
        found = ((page, self.find(page, number, vcpu)) for page in pages for vcpu in self.table_vcpus)
        return {page for page, mapping in found if mapping is not None and mapping.writable}

    def move(self, number: int, base_gfn: int) -> None:
        before = set(self.gfns(number))
        self.memory.move_slot(number, base_gfn)
        self.left |= before

    def remove(self, number: int) -> None:
        self.left |= set(self.gfns(number))
        self.memory.remove_slot(number)

    def check(self) -> None:
        """Hold every page of every slot against the port, the log and the TLBs, without changing a table's mappings."""
        here = {gfn: (slot, gfn - slot.base_gfn) for slot in self.memory.slots for gfn in self.gfns(slot.id)}
        for vcpu in self.table_vcpus:
            for gfn, (slot, page) in here.items():
                mapping = find(self.port, gfn, vcpu)
                if mapping is not None:
                    self._check_page(slot, page, mapping, vcpu)
            for gfn in self.left - here.keys():
                assert find(self.port, gfn, vcpu) is None, f"gfn {gfn:#x} is mapped, and in no slot"
        for owner in self.vcpus:
            for gfn, (*_, writable) in owner.cpu._tlb.items():
                assert gfn in here, "a translation of a frame that is in no slot any more"
                slot, page = here[gfn]
                assert not writable or slot.dirty_bitmap is None or page in self.written[slot.id], "a stale translation"

    def touch_all(self) -> None:
        """Load every page: where the walker finds nothing the port must find nothing, and then both the same."""
        for slot in self.memory.slots:
            for page, gfn in enumerate(self.gfns(slot.id)):
                before, faults = find(self.port, gfn), self.port.stats.faults
                translation = self.port.translate(0, gfn, False)
                assert translation is not None
                assert self.port.stats.faults - faults == (before is None)
                after = self.mapped(page, slot.id)
                assert (after.address, after.writable) == translation
        self.check()

    def _check_page(self, slot: MemorySlot, page: int, mapping: Mapping, vcpu: int) -> None:
        assert mapping.address == slot.host_address + page * 4096
        first = slot.base_gfn + page & -mapping.npages
        assert slot.base_gfn <= first
        assert first + mapping.npages <= slot.end_gfn, "a block that maps more than its slot"
        assert not (mapping.writable and slot.readonly)
        assert not mapping.writable or slot.dirty_bitmap is None or page in self.written[slot.id], (
            f"page {page} of slot {slot.id} can be written, and no get would report it"
        )
        faults = self.port.stats.faults
        translation = self.port.translate(vcpu, slot.base_gfn + page, False)
        assert translation == (mapping.address, mapping.writable)
        assert self.port.stats.faults == faults

    def _has_written(self, number: int, page: int) -> None:
        self.words[number, page] = self._value
        self.written[number].add(page)


class Log:
    """A dirty log whose every answer is held against what was written."""

    def __init__(self, machine: Machine, *, manual_protect: bool = False, initially_all_set: bool = False) -> None:
        self.machine = machine
        self.log = DirtyLog(machine.memory, manual_protect=manual_protect, initially_all_set=initially_all_set)
        self.on = False

    def start(self) -> None:
        self.log.start()
        self.on = True
        for slot in self.machine.memory.slots:
            self.machine.written[slot.id] = set(range(slot.npages)) if self.log.initially_all_set else set()

    def stop(self) -> None:
        self.log.stop()
        self.on = False

    def get(self, number: int = 0) -> None:
        """Get; after it every page is in the current bitmap, or cannot be written without getting there."""
        machine = self.machine
        assert set(self.log.get(number).pages().tolist()) == machine.written[number]
        if not self.log.manual_protect:
            machine.written[number] = set()
        bitmap = machine.slot(number).dirty_bitmap
        assert bitmap is not None
        assert machine.writable(range(machine.slot(number).npages), number) <= set(bitmap.read().pages().tolist())

    def clear(self, first: int, pages: Sequence[int], number: int = 0) -> None:
        """Clear ``pages``, which lie in the 64 pages from ``first`` on."""
        npages = min(64, self.machine.slot(number).npages - first)
        self.log.clear(number, first, DirtyBitmap.from_pages(npages, [page - first for page in pages]))
        self.machine.written[number] -= set(pages)


# --- 1. random sequences

ODD_SLOTS = ((5, 131), (136, 77), (509, 520), (3000, 9))
"""Odd bases and lengths; the first two share a word of a bitmap by gfn and a segment, the third covers blocks."""
READONLY_SLOT = 3
PLACES = (5, 136, 509, 1100, 1533, 2045)
PAGES = (0, 2, 3, 64, 130, 258, 259, 514, 515)
"""Few pages, so that a sequence meets the same page often: among them the first and last of each block of the third slot."""

# Shrinking would run each failing sequence hundreds of times more; the sequences are short enough to be read as they are.
sequences = settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate], print_blob=True)


class Story:
    """What may happen to a machine and its log. Every step takes a vCPU, a slot, and a number to choose a page or more with."""

    def __init__(self, machine: Machine, log: Log) -> None:
        self.machine = machine
        self.log = log

    def take(self, step: Step) -> None:
        operation, vcpu, number, at = step
        if number in {slot.id for slot in self.machine.memory.slots}:
            operation(self, vcpu, number, at)

    def load(self, vcpu: int, number: int, at: int) -> None:
        self.machine.load(at % self.machine.slot(number).npages, number, vcpu)

    def store(self, vcpu: int, number: int, at: int) -> None:
        page = at % self.machine.slot(number).npages
        if number == READONLY_SLOT:
            with pytest.raises(GuestFaultError):
                self.machine.store(page, number, vcpu)
        else:
            self.machine.store(page, number, vcpu)

    def host_write(self, vcpu: int, number: int, at: int) -> None:  # noqa: ARG002 - every step takes the same
        self.machine.host_write(at % self.machine.slot(number).npages, number)

    def get(self, vcpu: int, number: int, at: int) -> None:  # noqa: ARG002 - every step takes the same
        if self.log.on:
            self.log.get(number)

    def clear(self, vcpu: int, number: int, at: int) -> None:
        npages = self.machine.slot(number).npages
        first = at % npages // 64 * 64
        self.log.clear(first, range(first + vcpu, min(first + 64, npages), 1 + at % 3), number)

    def start_or_stop(self, vcpu: int, number: int, at: int) -> None:  # noqa: ARG002 - every step takes the same
        if self.log.on:
            self.log.stop()
        else:
            self.log.start()

    def move(self, vcpu: int, number: int, at: int) -> None:  # noqa: ARG002 - every step takes the same
        place, npages = PLACES[at % len(PLACES)], self.machine.slot(number).npages
        others = [slot for slot in self.machine.memory.slots if slot.id != number]
        if any(place < other.end_gfn and other.base_gfn < place + npages for other in others):
            with pytest.raises(BadSlotError, match="overlaps"):
                self.machine.move(number, place)
        else:
            self.machine.move(number, place)

    def remove(self, vcpu: int, number: int, at: int) -> None:  # noqa: ARG002 - every step takes the same
        if at % 4 == 0:
            self.machine.remove(number)


Step = tuple[Callable[[Story, int, int, int], None], int, int, int]
STEPS: list[Callable[[Story, int, int, int], None]] = [
    *(Story.store, Story.store, Story.store, Story.load, Story.host_write),
    *(Story.get, Story.get, Story.start_or_stop, Story.move, Story.remove),
]
MANUAL_STEPS = [Story.store, Story.store, Story.load, Story.get, Story.clear, Story.clear]


@pytest.mark.parametrize("arch", PORTS)
@sequences
@given(
    sequence=st.lists(
        st.tuples(st.sampled_from(STEPS), st.integers(0, 1), st.integers(0, 3), st.sampled_from(PAGES)), min_size=10, max_size=40
    )
)
def test_walker_and_port_agree_about_every_page_after_every_step(arch: str, sequence: list[Step]) -> None:
    machine = Machine(arch, *ODD_SLOTS, readonly=[READONLY_SLOT])
    story = Story(machine, Log(machine))
    for step in sequence:
        story.take(step)
        machine.check()
    machine.touch_all()


@pytest.mark.parametrize("all_set", [False, True])
@pytest.mark.parametrize("arch", PROTECT)
@sequences
@given(
    sequence=st.lists(
        st.tuples(st.sampled_from(MANUAL_STEPS), st.integers(0, 1), st.integers(0, 2), st.sampled_from(PAGES)),
        min_size=10,
        max_size=40,
    ),
    warm=st.booleans(),
)
def test_walker_and_port_agree_in_manual_mode(arch: str, *, all_set: bool, warm: bool, sequence: list[Step]) -> None:
    machine = Machine(arch, *ODD_SLOTS[:3])
    if warm:
        for page in range(0, 520, 100):
            machine.store(page, 2)
    log = Log(machine, manual_protect=True, initially_all_set=all_set)
    log.start()
    story = Story(machine, log)
    for step in sequence:
        story.take(step)
        machine.check()
    for number in range(3):
        log.get(number)
    machine.touch_all()


@pytest.mark.parametrize("arch", PORTS)
def test_a_slot_that_moves_takes_its_log_along(arch: str) -> None:
    machine = Machine(arch, *ODD_SLOTS[:3])
    log = Log(machine)
    log.start()
    for number, places in ((1, (1100, 1801, 136)), (2, (1533, 2050, 509))):
        for page in PAGES[:4]:
            machine.store(page, number)
        log.get(number)
        for place in places:
            for page in PAGES[1:3]:
                machine.store(page, number)
            machine.move(number, place)
            machine.check()
            machine.store(PAGES[0], number, vcpu=1)
            machine.check()
            log.get(number)
            machine.load(PAGES[1], number)


@pytest.mark.parametrize("arch", PORTS)
def test_a_slot_that_moves_or_goes_leaves_its_neighbour_alone(arch: str) -> None:
    machine = Machine(arch, *ODD_SLOTS[:2])
    log = Log(machine)
    log.start()
    for page in range(0, 77, 5):
        machine.store(page, 0)
        machine.store(page, 1)

    def addresses() -> list[int | None]:
        return [None if (mapping := machine.find(page, 1)) is None else mapping.address for page in range(77)]

    before = addresses()
    for change in (partial(machine.move, 0, 1100), partial(machine.move, 0, 5), partial(machine.remove, 0)):
        change()
        machine.check()
        # Only ia64 has nothing finer than a purge of everything.
        assert arch == "ia64" or addresses() == before
    log.get(1)


@pytest.mark.parametrize("arch", PORTS)
def test_what_was_written_before_the_start_is_not_reported(arch: str) -> None:
    machine = Machine(arch, *ODD_SLOTS[:3])
    log = Log(machine)
    for logged in (False, True, False):
        if logged:
            log.start()
        elif log.on:
            log.stop()
        for number in range(3):
            for page in PAGES[:3]:
                machine.store(page, number)
    log.start()
    machine.check()
    for number in range(3):
        log.get(number)
        machine.store(PAGES[0], number)
        log.get(number)


@pytest.mark.parametrize("arch", PORTS)
def test_a_store_between_the_protection_and_the_flush_is_logged(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(arch, ODD_SLOTS[0])
    log = DirtyLog(machine.memory)
    flush = machine.port.flush_tlbs
    before_flush: list[int] = []

    def store_and_flush(slot: MemorySlot) -> None:
        while before_flush:
            # The other vCPU's TLB is empty: what it may do is what the tables say now.
            machine.store(before_flush.pop(), vcpu=1)
        flush(slot)

    monkeypatch.setattr(machine.port, "flush_tlbs", store_and_flush)
    machine.store(3)
    before_flush += [3, 60]
    log.start()
    assert set(log.get(0).pages().tolist()) == {3, 60}
    machine.store(3)
    before_flush += [3, 64]
    first = set(log.get(0).pages().tolist())
    assert first | {64} == {3, 64}
    assert first | set(log.get(0).pages().tolist()) == {3, 64}
    machine.written[0] = set()
    machine.check()


@pytest.mark.parametrize("arch", PORTS)
def test_a_large_slot_has_no_seams(arch: str) -> None:
    npages = (3 << 16) + 77
    machine = Machine(arch, (5, npages))
    # Ports work through a large slot in stretches, counted from its first page or from frame 0.
    pages = {0, npages - 1, *(page for seam in (1 << 16, 2 << 16, 3 << 16) for page in range(seam - 7, seam + 3))}
    log = DirtyLog(machine.memory)
    for page in pages:
        machine.store(page)
    log.start()
    assert not machine.writable(pages)
    for _ in range(2):
        for page in pages:
            machine.store(page)
        assert set(log.get(0).pages().tolist()) == pages
        assert not machine.writable(pages)


# --- 2. the right page


@pytest.mark.parametrize("logged", [False, True])
@pytest.mark.parametrize("arch", PORTS)
def test_a_store_through_the_walkers_address_is_a_store_to_the_page(arch: str, *, logged: bool) -> None:
    machine = Machine(arch, *ODD_SLOTS[:3])
    if logged:
        Log(machine).start()
    marks: dict[tuple[int, int], bytes] = {}
    for slot in machine.memory.slots:
        for page in range(slot.npages):
            machine.store(page, slot.id)
            marks[slot.id, page] = mark = (-1 - len(marks)).to_bytes(8, "little", signed=True)
            ram, offset = machine.memory.host_memory(machine.mapped(page, slot.id).address)
            ram[offset + 8 : offset + 16] = mark
    for (number, page), mark in marks.items():
        contents = machine.memory.read(number, [page])[0]
        assert int(contents[:8].view("<u8")[0]) == machine.words[number, page]
        assert contents[8:16].tobytes() == mark
        assert not contents[16:].any()
        machine.load(page, number, vcpu=1)


@pytest.mark.parametrize("slot", [(5, 131), (512, 1024)])
@pytest.mark.parametrize("arch", PORTS)
def test_a_read_only_slot_is_never_writable(arch: str, slot: tuple[int, int]) -> None:
    machine = Machine(arch, slot, readonly=[0])
    log = Log(machine)
    for logged in (False, True, False):
        if logged:
            log.start()
        elif log.on:
            log.stop()
        for page in range(0, slot[1], 13):
            machine.load(page)
            with pytest.raises(GuestFaultError):
                machine.store(page)
            assert not machine.mapped(page).writable
        assert not machine.writable(range(slot[1]))
        if logged:
            log.get()
    assert not machine.memory.read(0, range(slot[1])).any()


@pytest.mark.parametrize("arch", PORTS)
def test_no_frame_past_the_reach_of_the_tables_is_another_frame(arch: str) -> None:
    machine = Machine(arch, (5, 131))
    machine.store(3)
    for bit in range(PORTS[arch].max_gfn.bit_length() - 1, 60):
        for write in (False, True):
            assert machine.port.translate(0, (1 << bit) + 5 + 3, write) is None


@pytest.mark.parametrize("arch", PORTS)
def test_a_slot_whose_memory_no_entry_can_address_is_refused(arch: str) -> None:
    memory = EmulatedMemory(PORTS[arch])
    for number in range(70):
        try:
            memory.add_slot(number, 3 * number, 1)
        except InvalidArgumentError:
            assert number > 50, "hundreds of MiB can always be addressed"
            break
        assert memory.port.translate(0, 3 * number, True) is not None
        mapping = find(memory.port, 3 * number)
        assert mapping is not None
        assert mapping.address == memory.slots[number].host_address


# --- 3. blocks

HEAD, TAIL = 5, 70
"""Pages before the first block and after the last, which no block covers."""


def block_machine(arch: str) -> Machine:
    """Return a machine whose slot holds 1024 pages of whole blocks, and some pages more on both sides; filled at random."""
    machine = Machine(arch, (1536 - HEAD, HEAD + 1024 + TAIL))
    contents = np.random.default_rng(7).integers(0, 256, (HEAD + 1024 + TAIL, 4096), np.uint8)
    contents[:, :8] = 0
    machine.memory.write(0, range(len(contents)), contents)
    return machine


def contents_but_first_words(machine: Machine) -> bytes:
    contents = machine.memory.read(0, range(machine.slot().npages))
    return contents[:, 8:].tobytes()


@pytest.mark.parametrize("arch", BLOCK_PAGES)
def test_blocks_map_what_a_slot_covers(arch: str) -> None:
    machine, pages = block_machine(arch), BLOCK_PAGES[arch]
    address, stats = machine.slot().host_address, machine.memory.stats
    machine.store(HEAD + 3)
    assert (stats.huge_mappings, stats.faults) == (1, 1)
    assert [machine.find(page) for page in range(HEAD, HEAD + pages)] == [
        Mapping(address + page * 4096, writable=True, npages=pages) for page in range(HEAD, HEAD + pages)
    ]
    assert not any(machine.find(page) for page in (*range(HEAD), *range(HEAD + pages, machine.slot().npages)))
    for edge in (0, HEAD - 1, HEAD + 1024, machine.slot().npages - 1):
        machine.store(edge)
        assert machine.mapped(edge) == Mapping(address + edge * 4096, writable=True)
    assert stats.huge_mappings == 1
    machine.check()
    # Guest and host are no longer congruent modulo a block, so that no block can map them.
    machine.move(0, 4096 + 1)
    machine.store(HEAD + 3)
    assert machine.mapped(HEAD + 3).npages == 1
    assert stats.huge_mappings == 1
    machine.touch_all()


@pytest.mark.parametrize("arch", BLOCK_PAGES)
def test_the_log_protects_splits_and_restores_blocks(arch: str) -> None:
    machine, pages = block_machine(arch), BLOCK_PAGES[arch]
    contents, stats, log = contents_but_first_words(machine), machine.memory.stats, Log(machine)
    block = range(HEAD, HEAD + pages)
    machine.store(HEAD + 3)
    log.start()
    assert [machine.mapped(page).npages for page in block] == [pages] * pages, "the log's start splits nothing"
    assert not machine.writable(block)
    if arch == "x86-pml":
        assert isinstance(machine.port, X86PmlPort)
        raw = walk_ept(machine.port.tables.memory.read, machine.port.tables.root, machine.slot().base_gfn + HEAD)
        assert raw is not None
        assert not raw.writable, "a block whose D bit alone were clear would log its first page only"
    machine.load(HEAD + 4)
    assert stats.splits == 0
    machine.store(HEAD + pages - 1)
    assert (stats.splits, stats.huge_mappings) == (1, 1)
    assert [machine.mapped(page).npages for page in block] == [1] * pages
    assert machine.writable(block) == {HEAD + pages - 1}
    faults = stats.faults
    for page in block:
        machine.load(page, vcpu=1)
    assert stats.faults == faults, "the split keeps every page mapped"
    machine.check()
    log.get()
    assert not machine.writable(range(machine.slot().npages))
    # While it is logged, the slot's other blocks are mapped page by page.
    machine.store(HEAD + pages)
    assert machine.mapped(HEAD + pages).npages == 1
    log.stop()
    for page in (HEAD + 8, HEAD + pages + 8):
        machine.store(page)
        assert machine.mapped(page).npages == pages
    assert (stats.splits, stats.huge_mappings) == (1, 3)
    assert contents_but_first_words(machine) == contents
    machine.touch_all()
    log.start()
    machine.store(HEAD)
    log.get()


@pytest.mark.parametrize("arch", [arch for arch in BLOCK_PAGES if arch in PROTECT])
def test_clearing_a_few_pages_protects_the_blocks_that_hold_them_a216e24fc947(arch: str) -> None:
    machine = block_machine(arch)
    contents, stats = contents_but_first_words(machine), machine.memory.stats
    every = range(machine.slot().npages)
    first, second = range(HEAD, HEAD + 512), range(HEAD + 512, HEAD + 1024)
    for page in (HEAD, HEAD + 512):
        machine.store(page)
    log = Log(machine, manual_protect=True, initially_all_set=True)
    log.start()
    assert machine.writable(every) == {*first, *second}, "nothing is protected at the start"
    log.get()
    log.clear(128, range(130, 140))
    assert machine.writable(every) == {*second}, "a block cannot be protected in part"
    assert machine.mapped(HEAD).npages == 512
    log.clear(512, range(512, 576))  # its first pages belong to the first block, the others to the second
    assert not machine.writable(every)
    assert stats.splits == 0
    for page in (HEAD, 129, 130, 139, 512, HEAD + 511, HEAD + 512, 575, 576, HEAD + 1023):
        machine.store(page)
        log.get()
        machine.check()
    assert (stats.splits, stats.huge_mappings) == (2, 2)
    for start in range(0, len(every), 64):
        log.clear(start, range(start, min(start + 64, len(every))))
    assert not machine.writable(every)
    for page in every:
        machine.store(page, vcpu=page % 2)
    log.get()
    assert machine.written[0] == set(every)
    assert contents_but_first_words(machine) == contents
    machine.touch_all()


@pytest.mark.parametrize("arch", [arch for arch in PORTS if arch not in BLOCK_PAGES])
def test_ports_without_blocks_have_none(arch: str) -> None:
    machine = block_machine(arch)
    log = Log(machine)
    for page in range(0, 1024, 64):
        machine.store(HEAD + page)
    log.start()
    for page in range(0, 1024, 64):
        machine.store(HEAD + page)
    log.get()
    log.stop()
    machine.touch_all()
    assert {machine.mapped(page).npages for page in range(0, machine.slot().npages, 7)} == {1}
    assert (machine.memory.stats.huge_mappings, machine.memory.stats.splits) == (0, 0)


# --- 4. what only one port has


def clean_and_mapped(arch: str, *slots: tuple[int, int], pages: Iterable[int]) -> tuple[Machine, Log]:
    """Return a logged machine in which ``pages`` of slot 0 are mapped, as after a write that a get has reported."""
    machine = Machine(arch, *slots)
    log = Log(machine)
    log.start()
    for page in pages:
        machine.store(page)
    log.get()
    return machine, log


def test_the_modification_log_is_filled_from_its_last_entry_down() -> None:
    machine, log = clean_and_mapped("x86-pml", (5, 1200), pages=range(1200))
    assert isinstance(machine.port, X86PmlPort)
    order = np.random.default_rng(3).permutation(1200)[:300].tolist()
    for page in order:
        machine.store(page)
        machine.store(page)  # D is set already: nothing is logged
    modification_log = machine.port._logs[0]
    assert modification_log.index == 511 - 300
    raw = np.frombuffer(modification_log.entries.tobytes(), "<u8")
    assert raw[::-1][:300].tolist() == [5 + page << 12 for page in order]
    log.get()
    assert modification_log.index == 511


@pytest.mark.parametrize("nstores", [511, 512, 513, 1024, 1025, 1200])
def test_a_modification_log_that_wraps_loses_nothing(nstores: int) -> None:
    machine, log = clean_and_mapped("x86-pml", (5, 1200), (1300, 100), pages=range(1200))
    for page in range(100):
        machine.store(page, 1, vcpu=1)
    log.get(1)
    for page in np.random.default_rng(nstores).permutation(1200)[:nstores].tolist():
        machine.store(page)
        if page < 100:
            machine.store(page, 1, vcpu=page % 2)
    machine.check()
    log.get()
    log.get(1)
    machine.check()


def test_a_changed_bit_may_come_late_but_no_later_than_the_next_get() -> None:
    machine = Machine("ppc-hv", (5, 131))
    log = DirtyLog(machine.memory)
    log.start()
    running, paused = machine.vcpus
    running.in_guest = True
    machine.store(7)
    machine.store(9, vcpu=1)
    assert not machine.mapped(7).writable, "the processor has not written C yet"
    first = set(log.get(0).pages().tolist())
    assert 9 in first, "a vCPU that is not in the guest has nothing left to write"
    assert first <= {7, 9}
    machine.store(7)  # through the translation that was never flushed
    machine.store(11)
    second = set(log.get(0).pages().tolist())
    assert 7 in second
    assert second <= {7, 11}
    assert not any(running.cpu._tlb.values())
    third = set(log.get(0).pages().tolist())
    assert 11 in second | third
    assert not log.get(0).any()
    machine.written[0] = set()
    machine.check()
    assert not paused.in_guest


def test_a_paused_guest_reports_every_page_at_once_6c576e74fd91() -> None:
    machine = Machine("ppc-hv", (5, 131), (136, 77))
    log = Log(machine)
    log.start()
    for vcpu in machine.vcpus:
        vcpu.in_guest = True
    for page in range(0, 77, 3):
        machine.store(page, page % 2, vcpu=page % 2)
    for vcpu in machine.vcpus:
        vcpu.in_guest = False
    for number in range(2):
        log.get(number)
    machine.check()


def test_a_hashed_page_table_that_grows_keeps_every_entry_and_every_late_bit() -> None:
    same_groups = range(2, 20 * 2048, 2048)
    machine = Machine("ppc-hv", (3, 20 * 2048))
    port = machine.port
    assert isinstance(port, PpcHvPort)
    log = Log(machine)
    log.start()
    machine.vcpus[0].in_guest = True
    before = port.table.ngroups
    for page in same_groups:
        machine.load(page + 1)
        machine.store(page)
        assert machine.find(page) is not None
    assert port.table.ngroups > before
    address = machine.slot().host_address
    for page in same_groups:
        machine.load(page, vcpu=1)
        machine.load(page + 1, vcpu=1)
        assert machine.mapped(page).address == address + page * 4096
        assert machine.mapped(page + 1) == Mapping(address + (page + 1) * 4096, writable=False)
    machine.vcpus[0].in_guest = False
    log.get()
    assert not machine.writable(same_groups)


def test_a_shadow_table_whose_groups_overflow_loses_no_page() -> None:
    # Sixteen places, and 24 pages for them: the hash modulo 2^14 of twelve is 77, of the others the complement of that. The
    # first twelve fill their own group and half the other.
    npages = 3 << 16
    gfns = np.arange(7, npages)
    hashes = (0x1000 + (gfns >> 16) ^ gfns & 0xFFFF) & 0x3FFF
    pages = [gfn - 7 for value in (77, 0x3FFF - 77) for gfn in gfns[hashes == value].tolist()]
    assert len(pages) == 24
    machine = Machine("ppc-pv", (7, npages - 7))
    log = Log(machine)
    for logged in (False, True):
        if logged:
            log.start()
        for page in pages:
            machine.store(page)
            assert machine.mapped(page) == Mapping(machine.slot().host_address + page * 4096, writable=True)
        present = [page for page in pages if machine.find(page) is not None]
        assert len(present) <= 16
        for page in (*pages, *reversed(pages)):
            machine.load(page, vcpu=1)
            assert machine.mapped(page).address == machine.slot().host_address + page * 4096
            machine.vcpus[1].cpu.flush_tlb()
    log.get()
    assert not any(machine.find(page) for page in pages), "reading the log drops every shadow entry of the slot"
    for page in pages[::-5]:
        machine.store(page)
    log.get()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("arch", ["ia64", "s390"])
def test_neighbours_keep_and_report_their_own_pages(arch: str, order: tuple[int, int]) -> None:
    # Frames 0 to 63 share a word of ia64's log area, 0 to 255 a segment of s390.
    machine = Machine(arch, (10, 30), (40, 250))
    log = Log(machine)
    log.start()
    for number, page in ((0, 0), (0, 29), (1, 0), (1, 23), (1, 24), (1, 215), (1, 216), (1, 249)):
        machine.store(page, number)
    first, second = order
    log.get(first)
    machine.check()
    if arch == "s390":
        assert machine.writable(range(250), second) == machine.written[second], "the neighbour is not protected"
    machine.store(3, first)
    machine.store(4, second)
    log.get(second)
    log.get(first)
    machine.check()


def test_user_change_is_set_by_a_write_fault_and_cleared_by_the_sync() -> None:
    machine = Machine("s390", (100, 100), (200, 100))
    log = Log(machine)

    def user_change(number: int) -> set[int]:
        return {page for page in range(100) if (mapping := machine.find(page, number)) is not None and mapping.user_change}

    machine.store(1)
    assert not user_change(0), "nobody asks for it"
    log.start()
    for page in (1, 55, 56, 99):
        machine.load(page - 1)
        for number in range(2):
            machine.store(page, number)
            assert user_change(number) == machine.written[number]
    log.get(0)
    assert (user_change(0), user_change(1)) == (set(), {1, 55, 56, 99})
    log.get(1)
    assert user_change(1) == set()

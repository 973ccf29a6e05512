"""The dirty rings against a model of the kernel's side: nothing that is stored gets lost, whatever comes between."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from hypothesis import Phase, reject, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from dirtylog import CoverageLostError, DirtyBitmap, InvalidArgumentError, SlotTable, UnsupportedError
from dirtylog.kvm.abi import Cap
from dirtylog.kvm.ring import DirtyRing
from dirtylog.kvm.ring_port import KvmRingPort, choose_ring
from interrupts import interrupt
from ring_model import ARM64, RESERVED, SIZE, U32, X86, ModelArchitecture, ModelRing, ModelVm, RingScene, meanwhile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dirtylog.kvm.arch.architecture import Architecture
    from dirtylog.kvm.vm import KvmVm

SMM = 1 << 16 | 2
SLOTS = {0: 451, 7: 65, SMM: 333}
PAGES = [(slot, page) for slot, npages in SLOTS.items() for page in range(npages)]
STRETCHES = [1, 3, 20, 100, 191, 192, 193, 250, 256, 300, 600, 800]

slots = st.sampled_from(list(SLOTS))
vcpus = st.integers(0, 1)
stores = st.tuples(vcpus, st.integers(0, len(PAGES) - 1), st.sampled_from(STRETCHES), st.sampled_from([1, -1, 5]))
"""A vCPU, the first of its pages, how many there are, and how far apart."""
moments = st.dictionaries(st.integers(0, 60) | st.integers(0, 600), stores, max_size=3)
"""By step of a call: what is stored there."""

if TYPE_CHECKING:
    Stores = tuple[int, int, int, int]
    Moments = dict[int, Stores]


class Rings(RuleBasedStateMachine):
    """Slots with a version for each page, and a copy that takes over the versions of what each get reports."""

    @initialize(
        size=st.sampled_from([256, 256, 512, 1024]),
        vcpus=st.integers(1, 2),
        late=st.sampled_from([0, 0, 70, 130, 450, 1000]),
        laps=st.integers(0, 2),
    )
    def begin(self, size: int, vcpus: int, late: int, laps: int) -> None:
        # The kernel's indexes begin a few laps before they wrap.
        self.scene = RingScene(SLOTS, size=size, vcpus=vcpus, late=late, start=-laps * size)
        self.vcpus = vcpus
        # When the get began that last reported each page.
        self.reported = {slot: np.full(npages, -1) for slot, npages in SLOTS.items()}
        # How often everything had been reported when each ring was last known to be in step: since then what is reported is exact.
        self.exact_at = 0
        # Whether anything else than an overflow may have made it report everything.
        self.disturbed = False

    def store(self, vcpu: int, first: int, count: int, apart: int, *, waits: bool = False) -> None:
        """Store to pages, until the vCPU may not run; or let it ask for room."""
        for number in range(count):
            slot, page = PAGES[(first + number * apart) % len(PAGES)]
            if page >= len(self.scene.versions.get(slot, ())) or slot not in self.scene.vm.slots:
                continue
            if waits:
                self.scene.store(slot, page, vcpu % self.vcpus)
            elif not self.scene.try_store(slot, page, vcpu % self.vcpus):
                break

    def meanwhile(self, action: Callable[[], object], moments: Moments) -> None:
        # With so many stores during a harvest the kernel comes round, be it behind the reset: who sees it then cannot tell.
        self.disturbed |= sum(count for _, _, count, _ in moments.values()) >= RESERVED
        meanwhile(self.scene, action, {step: partial(self.store, *stores) for step, stores in moments.items()})

    @rule(stores=stores)
    def the_guest_stores(self, stores: Stores) -> None:
        self.store(*stores, waits=True)

    @rule(slot=slots, moments=moments)
    def get(self, slot: int, moments: Moments) -> None:
        scene, begun = self.scene, self.scene.clock
        before = scene.versions[slot].copy()
        pages: list[int] = []
        self.meanwhile(lambda: pages.extend(scene.get(slot)), moments)
        lost = np.flatnonzero(scene.copies[slot] < before)
        assert not len(lost), f"slot {slot}: these were stored before the get and are not reported: {lost}"
        if scene.port.stats.overflows == self.exact_at:
            again = [page for page in pages if scene.versions[slot][page] <= self.reported[slot][page]]
            assert not again, f"slot {slot}: reported again, and nobody stored to them: {again}"
        self.reported[slot][pages] = begun

    @rule(moments=moments)
    def the_collector_comes(self, moments: Moments) -> None:
        self.meanwhile(self.scene.collect, moments)

    @rule(vcpu=vcpus, moments=moments)
    def a_vcpu_that_is_full_asks_for_room(self, vcpu: int, moments: Moments) -> None:
        vcpu %= self.vcpus
        if self.scene.leave_if_full(vcpu):
            others = {step: stores for step, stores in moments.items() if stores[0] % self.vcpus != vcpu}
            self.meanwhile(lambda: self.scene.ask_for_room(vcpu), others)

    @rule(after=st.integers(0, 300), can_be_blocked=st.booleans())
    def a_signal_will_end_the_next_reset(self, after: int, can_be_blocked: bool) -> None:
        self.scene.vm.signal_after, self.scene.vm.signal_can_be_blocked = after, can_be_blocked
        self.disturbed |= not can_be_blocked

    @rule(slot=slots)
    def everything_is_copied(self, slot: int) -> None:
        """One get of each slot with nothing between suffices."""
        for other in (slot, *SLOTS):
            self.get(other, {})
        assert not self.scene.lost()
        if not any(ring.used for ring in self.scene.vm.rings):
            self.exact_at = self.scene.port.stats.overflows

    @rule(npages=st.sampled_from([65, 40, 64, 1]), moments=moments)
    def a_slot_is_replaced(self, npages: int, moments: Moments) -> None:
        self.meanwhile(lambda: self.scene.remove_slot(7), moments)
        self.reported[7] = np.full(npages, -1)
        self.meanwhile(lambda: self.scene.add_slot(7, npages, logged=True), moments)
        self.scene.copies[7][:] = self.scene.versions[7]

    @rule(moments=moments)
    def the_log_is_stopped_and_started(self, moments: Moments) -> None:
        self.meanwhile(self.scene.log.stop, moments)
        self.meanwhile(self.scene.log.start, moments)
        for slot, copy in self.scene.copies.items():
            copy[:] = self.scene.versions[slot]
            self.reported[slot][:] = -1
            self.get(slot, {})
            self.reported[slot][:] = -1

    @invariant()
    def a_host_whose_vcpus_stop_in_time_has_no_overflow(self) -> None:
        assert self.scene.late or self.disturbed or not self.scene.port.stats.overflows

    @invariant()
    def no_reset_passes_the_kernel_s_next_entry(self) -> None:
        assert all(ring.used <= U32 >> 1 for ring in self.scene.vm.rings), "this vCPU will never run again"

    def teardown(self) -> None:
        if hasattr(self, "scene"):
            self.everything_is_copied(0)


def _unless_it_gives_up(collect: Callable[[KvmRingPort], int], port: KvmRingPort) -> int:
    try:
        return collect(port)
    except CoverageLostError:
        reject()


class InterruptedRings(Rings):
    """The same, with a Ctrl-C now and then.

    One that comes just when the kernel answers, with a ring that is full, ends it: nobody knows the ring's place then, and the port
    says so for good.
    """

    @rule(slot=slots, step=st.integers(0, 200))
    def a_get_is_interrupted(self, slot: int, step: int) -> None:
        out = DirtyBitmap(len(self.scene.versions[slot]))
        port = self.scene.port
        port.collect = partial(_unless_it_gives_up, KvmRingPort.collect, port)  # type: ignore[method-assign]  # a test looks on
        if interrupt(lambda: self.scene.log.get(slot, out), step):
            self.exact_at, self.disturbed = -1, True
        pages = out.pages()
        self.scene.copies[slot][pages] = self.scene.versions[slot][pages]
        self.reported[slot][pages] = self.scene.clock


EFFORT = settings(
    max_examples=40,
    stateful_step_count=16,
    deadline=None,
    report_multiple_bugs=False,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
)
TestRings = Rings.TestCase
TestRings.settings = EFFORT
TestInterruptedRings = InterruptedRings.TestCase
TestInterruptedRings.settings = EFFORT


# --- entries


def one_ring(*pages: int, size: int = SIZE, start: int = 0) -> tuple[ModelVm, ModelRing, DirtyRing]:
    """Return a ring with these pages of slot 0 in it, as the kernel has it and as dirtylog has it."""
    vm, model = ModelVm(X86), ModelRing(size, start)
    vm.rings.append(model)
    for page in pages:
        model.push(0, page)
    return vm, model, DirtyRing(model.entries)


def offsets(ring: DirtyRing) -> list[int]:
    return cast("list[int]", ring.ahead(ring.waiting())["offset"].tolist())


def test_entries_come_in_the_order_in_which_the_kernel_made_them() -> None:
    pages = np.random.default_rng(1).integers(0, 1 << 40, 190).tolist()
    _, _, ring = one_ring(*pages)

    assert offsets(ring) == pages


def test_a_part_of_what_waits_can_be_harvested_and_the_rest_waits_on() -> None:
    vm, model, ring = one_ring(5, 3, 9, 9, 1)

    ring.give(2)
    ring.taken(vm.reset_dirty_rings())
    assert (ring.next, ring.given) == (2, 0), "the kernel stops at the first that is not harvested"
    assert (model.used, offsets(ring)) == (3, [9, 9, 1])


@pytest.mark.parametrize("start", [0, -SIZE, -5 * SIZE])
def test_the_ring_and_the_kernel_s_indexes_wrap(start: int) -> None:
    scene = RingScene({0: 131}, start=start)
    generator = np.random.default_rng(2)
    for _ in range(60):
        pages = np.unique(generator.integers(0, 131, 40)).tolist()
        scene.stores(0, pages)
        assert scene.get(0) == pages
    assert scene.port.stats.harvested > 6 * SIZE
    assert not scene.port.stats.overflows


def test_as_many_entries_are_reset_as_were_harvested_with_one_call_for_each_ring() -> None:
    scene = RingScene({0: 131, 1: 40}, vcpus=2)
    for first in range(5):
        scene.stores(0, range(first, 131, 5), vcpu=first % 2)
        scene.stores(1, range(first, 40, 3), vcpu=1)
        expected = [ring.used for ring in scene.vm.rings if ring.used]
        scene.get(0)
        assert scene.vm.resets()[-len(expected) :] == expected
    assert len(scene.vm.resets()) == 8
    assert scene.port.stats.harvested == sum(scene.vm.resets())


def test_where_nothing_was_stored_a_get_costs_no_call() -> None:
    scene = RingScene({0: 131})
    scene.store(0, 1)
    scene.get(0)
    calls = len(scene.vm.calls)
    scene.get(0)
    scene.collect()

    assert len(scene.vm.calls) == calls


def test_pages_that_the_kernel_takes_in_one_batch_are_counted_one_by_one() -> None:
    scene = RingScene({0: 300})
    pages = [5, 5, 4, 6, 68, 67, 5, 299, 236, 235, 5]
    for page in pages:
        scene.vm.rings[0].push(0, page)

    assert scene.get(0) == sorted(set(pages))
    assert scene.vm.resets() == [len(pages)]
    assert not scene.unseen_after_a_store_to_every_page()


def test_every_entry_finds_its_slot_by_the_whole_of_its_id() -> None:
    scene = RingScene({2: 70, SMM: 70, 0: 70}, vcpus=2)
    scene.stores(2, [1, 69])
    scene.stores(SMM, [2, 68])
    scene.store(0, 3, vcpu=1)

    assert [scene.get(slot) for slot in (SMM, 2, 0)] == [[2, 68], [1, 69], [3]]


def test_entries_of_no_slot_and_of_no_page_are_reset_and_ignored() -> None:
    scene = RingScene({0: 131, SMM: 65})
    stray = [(5, 0), (1 << 16, 0), (U32, 0), (0, 131), (SMM, 65), (0, 1 << 63), (0, (1 << 64) - 1), (SMM, (1 << 64) - 64)]
    for number, (slot, offset) in enumerate(stray):
        scene.vm.rings[0].push(slot, offset)
        scene.store(0, 16 * number)

    assert scene.get(0) == list(range(0, 128, 16))
    assert scene.get(SMM) == []
    assert scene.vm.resets() == [16]


def test_entries_of_a_slot_that_has_gone_or_shrunk_since_are_ignored() -> None:
    scene = RingScene({0: 131, 7: 100})
    scene.remove_slot(7)
    scene.vm.rings[0].push(7, 3)
    scene.store(0, 9)
    assert scene.get(0) == [9]
    scene.add_slot(7, 64, logged=True)
    scene.vm.rings[0].push(7, 99)
    scene.store(7, 63)
    assert scene.get(7) == [63]


# --- how rings are set up


@pytest.mark.parametrize(
    ("extensions", "chosen"),
    [
        ({Cap.DIRTY_LOG_RING: 1 << 20}, (Cap.DIRTY_LOG_RING, False)),
        (X86, (Cap.DIRTY_LOG_RING_ACQ_REL, False)),
        (ARM64, (Cap.DIRTY_LOG_RING_ACQ_REL, True)),
    ],
    ids=["before 6.1", "acquire and release", "with a bitmap"],
)
def test_the_ring_is_the_best_that_the_kernel_has(extensions: Mapping[Cap, int], chosen: tuple[Cap, bool]) -> None:
    vm = ModelVm(extensions)
    assert choose_ring(vm.check_extension, cast("Architecture", ModelArchitecture())) == chosen
    make_port(vm, entries=512)
    expected: list[tuple[Any, ...]] = [("ring", chosen[0], 512 * 16)]
    assert vm.calls == expected + [("cap", Cap.DIRTY_LOG_RING_WITH_BITMAP)] * chosen[1]


def make_port(vm: ModelVm, *, entries: int = SIZE, alone_loses: bool = False, offset_pages: int = 64) -> KvmRingPort:
    architecture = ModelArchitecture(offset_pages=offset_pages, alone_loses=alone_loses)
    return KvmRingPort(cast("KvmVm", vm), cast("Architecture", architecture), SlotTable(), [], entries=entries)


def test_where_there_are_no_rings_none_is_enabled() -> None:
    for vm, offset_pages in ((ModelVm({}), 64), (ModelVm(X86), 0)):
        with pytest.raises(UnsupportedError, match="no dirty rings"):
            make_port(vm, offset_pages=offset_pages)
        assert not vm.calls


def test_where_a_ring_alone_loses_pages_it_is_only_taken_with_a_bitmap() -> None:
    vm = ModelVm({Cap.DIRTY_LOG_RING_ACQ_REL: 1 << 20})
    with pytest.raises(UnsupportedError, match="KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP"):
        make_port(vm, alone_loses=True)
    assert not vm.calls
    vm = ModelVm(ARM64)
    make_port(vm, alone_loses=True)
    assert vm.calls[-1] == ("cap", Cap.DIRTY_LOG_RING_WITH_BITMAP)


@pytest.mark.parametrize("entries", [0, -256, 255, 257, 4095])
def test_a_length_that_is_no_power_of_two_is_refused_before_any_call(entries: int) -> None:
    vm = ModelVm(X86)
    with pytest.raises(InvalidArgumentError, match=f"{entries} entries"):
        make_port(vm, entries=entries)
    assert not vm.calls


# --- with a bitmap


def test_a_get_adds_what_was_written_without_a_vcpu_and_asks_for_it_last() -> None:
    scene = RingScene({0: 131, 7: 65}, extensions=ARM64)
    scene.stores(0, [3, 130])
    scene.write_without_vcpu(0, 64)
    scene.write_without_vcpu(0, 3)
    scene.write_without_vcpu(7, 64)
    scene.vm.calls.clear()

    assert scene.get(0) == [3, 64, 130]
    assert scene.vm.calls == [("reset", 2), ("get", 0)]
    assert (scene.get(0), scene.get(7)) == ([], [64])
    assert not scene.lost()


# --- the collector


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_collector_makes_room_before_anybody_asks() -> None:
    scene = RingScene({0: 131}, collector=True)
    try:
        scene.stores(0, range(64))
        wait_until(lambda: scene.vm.rings[0].used == 0)
        assert scene.port.stats.full_exits == 0
        assert scene.get(0) == list(range(64))
    finally:
        scene.port.close()


def test_a_collector_that_failed_makes_every_get_say_so() -> None:
    scene = RingScene({0: 131}, collector=True)
    try:
        scene.vm.failure = OSError(5, "no more resets")
        scene.stores(0, range(100))
        wait_until(lambda: scene.port._failure is not None)
        for _ in range(2):
            with pytest.raises(CoverageLostError, match="no more resets"):
                scene.get(0)
    finally:
        scene.port.close()

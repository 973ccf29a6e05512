"""Dirty rings that overflow, resets that signals end, gets that end early: against the model of the kernel's side."""

from __future__ import annotations

import dis
import itertools
import signal
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from dirtylog import CoverageLostError, DirtyBitmap
from dirtylog.kvm import ring, ring_port
from interrupts import interrupt
from ring_model import ARM64, RESERVED, SIZE, U32, RingScene, meanwhile

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

NPAGES = 600


def overrun(scene: RingScene, used: int, first: int = 0, vcpu: int = 0) -> int:
    """Store to page after page, and past every limit, until so many entries are in use or no page is left; return the next."""
    model, npages = scene.vm.rings[vcpu], len(scene.versions[0])
    late, scene.late = scene.late, used
    for _ in range(npages):
        if model.used >= used:
            break
        scene.try_store(0, first % npages, vcpu)
        first += 1
    scene.late = late
    return first


def turned_by(entries: int, **options: Any) -> RingScene:
    """Return a scene whose ring is empty, after so many entries."""
    scene = RingScene({0: NPAGES}, **options)
    for first in range(0, entries, 100):
        scene.stores(0, range(first, min(first + 100, entries)))
        scene.get(0)
    return scene


def in_a_gap(gap: int, *, before: int = 0, **options: Any) -> RingScene:
    """Return a scene whose ring has overflowed by ``gap``, and has been harvested, after so many entries."""
    scene = turned_by(before, **options)
    overrun(scene, SIZE + gap)
    scene.get(0)
    return scene


def check_that_nothing_is_lost(scene: RingScene, when: str = "", vcpu: int = 0) -> None:
    for slot in scene.versions:
        scene.get(slot)
    assert not scene.lost(), f"{when}: not reported"
    for page in (0, 1, 0):
        scene.store(0, page, vcpu)
        scene.get(0)
        assert not scene.lost(), f"{when}: a single store is not reported"
    assert not scene.unseen_after_a_store_to_every_page(vcpu), f"{when}: not armed again"
    assert all(model.used <= U32 >> 1 for model in scene.vm.rings)


# --- overflow


@pytest.mark.parametrize("excess", [0, 1, 2, 63, 64, 100, 191, 192, 193, 255, 256, 257, 450, 700])
def test_an_overflow_loses_nothing_and_after_it_the_ring_is_exact_again(excess: int) -> None:
    scene = RingScene({0: 1000, 7: 65})
    following = overrun(scene, SIZE + excess)
    scene.get(0)
    assert not scene.lost()
    assert scene.port.stats.overflows == 1
    assert len(scene.get(7)) == 65, "nobody knows which were lost, so all are reported"
    # By now the kernel is ahead of its own reset by the excess, and a vCPU may not run before much of that is made good.
    scene.store(0, 3)
    scene.store(0, following)
    assert {3, following} <= set(scene.get(0))
    assert not scene.lost()
    assert scene.vm.rings[0].used == 0, "back in step"
    scene.get(7)
    for page in (5, 3, 64):
        scene.store(0, page)
        scene.store(7, page)
        assert (scene.get(0), scene.get(7)) == ([page], [page])
    check_that_nothing_is_lost(scene)


@pytest.mark.parametrize("again", [1, 5, 39, 40, 41, 100])
def test_an_overflow_in_the_gap_of_the_last_one_loses_nothing(again: int) -> None:
    """Up to 40 later, what is written over are free entries: no entry is lost, but the order of the others is."""
    scene = in_a_gap(40)
    overrun(scene, SIZE + again, first=300)
    scene.get(0)
    assert not scene.lost()
    scene.store(0, 500)
    scene.get(0)
    assert not scene.lost()
    check_that_nothing_is_lost(scene)


@pytest.mark.parametrize("excess", [1, 7, 100, 300])
@pytest.mark.parametrize("gap", [0, 40])
def test_an_overflow_at_any_step_of_a_get_loses_nothing(excess: int, gap: int) -> None:
    """Above all after an entry was read and before it is marked as harvested, and after that and before it is reset."""
    # The kernel's steps from entry to entry are alike: not all of them are tried.
    for step in itertools.chain(range(60), range(60, 400, 37)):
        scene = in_a_gap(gap) if gap else turned_by(0)
        following = overrun(scene, SIZE - 6, first=400)
        meanwhile(scene, partial(scene.get, 0), {step: partial(overrun, scene, SIZE + excess, following)})
        check_that_nothing_is_lost(scene, f"{excess} entries too many at step {step}")


def test_a_vcpu_that_keeps_to_its_limit_is_never_taken_for_one_that_overran_it() -> None:
    """Above all when it goes on with what a reset has just freed."""
    for step in range(0, 300, 3):
        scene = RingScene({0: NPAGES})
        scene.stores(0, range(100))
        meanwhile(scene, partial(scene.get, 0), {step: partial(store_to_the_limit, scene, 100)})
        assert not scene.port.stats.overflows, f"at step {step}"


def store_to_the_limit(scene: RingScene, first: int) -> None:
    for page in range(first, NPAGES):
        if not scene.try_store(0, page):
            break


def test_after_an_overflow_during_a_reset_the_ring_gets_into_step_at_every_place() -> None:
    """What is left in the ring of a harvest that failed must not be given to the kernel before it comes there."""
    scene = RingScene({0: NPAGES})
    following = overrun(scene, SIZE - 6)
    scene.vm.between = lambda: overrun_once(scene, following)
    scene.get(0)
    for page in range(2 * SIZE):
        scene.store(0, page)
        scene.get(0)
        assert not scene.lost()
        assert scene.vm.rings[0].used <= SIZE, "the kernel's reset has passed its next entry"


def overrun_once(scene: RingScene, following: int) -> None:
    scene.vm.between = lambda: None
    overrun(scene, SIZE + 1, following)


def test_a_vcpu_gets_out_of_a_gap_while_another_keeps_storing() -> None:
    scene = RingScene({0: NPAGES, 7: 64}, vcpus=2)
    overrun(scene, 2 * SIZE)
    scene.get(0)
    assert scene.leave_if_full(0), "the gap is so long that vCPU 0 may not run"
    for turn in itertools.count():
        scene.store(7, turn % 64, vcpu=1)
        scene.ask_for_room(0)
        if not scene.leave_if_full(0):
            break
        assert turn < 20
    check_that_nothing_is_lost(scene)


def test_what_lies_in_a_gap_does_not_keep_the_kernel_from_protecting_its_neighbours() -> None:
    """The kernel takes neighbours in one batch, and drops a batch that reaches past the end of its slot."""
    scene = RingScene({0: NPAGES, 7: 128})
    overrun(scene, SIZE)
    scene.late = SIZE
    for page in range(95, 105):
        assert scene.try_store(7, page), "written over the oldest entries: this is what the gap will hold"
    scene.late = 0
    scene.get(0)
    scene.remove_slot(7)
    scene.add_slot(7, 90, logged=True)
    for _ in range(3):
        scene.store(7, 89)
        scene.get(7)
        assert not scene.lost()


def test_a_call_that_fails_while_everything_is_protected_is_made_good_by_the_next_get() -> None:
    for failing in itertools.count():
        scene = RingScene({0: NPAGES, 7: 65})
        overrun(scene, SIZE + 10)
        fail_at_region(scene, failing)
        try:
            scene.get(0)
        except OSError:
            check_that_nothing_is_lost(scene, f"call {failing} failed")
        else:
            break
    assert failing >= 4


def test_a_call_that_fails_for_a_vcpu_in_a_long_gap_is_made_good_by_the_next_get() -> None:
    for failing in itertools.count():
        scene = RingScene({0: NPAGES, 7: 65}, vcpus=2)
        overrun(scene, 2 * SIZE)
        scene.get(0)
        scene.get(7)
        assert scene.leave_if_full(0)
        scene.ask_for_room(0)
        fail_at_region(scene, failing)
        try:
            scene.ask_for_room(0)
        except OSError:  # with which this vCPU faults; the other runs on
            check_that_nothing_is_lost(scene, f"call {failing} failed", vcpu=1)
        else:
            break


def fail_at_region(scene: RingScene, number: int) -> None:
    """Let the call of this number, of those that switch logging off and on, fail."""
    calls = itertools.count()

    def fail() -> None:
        if next(calls) == number:
            raise OSError(12, "no memory")

    scene.vm.between_regions = fail


# --- signals


@pytest.mark.parametrize("can_be_blocked", [True, False], ids=["a signal", "a freezer"])
@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_reset_that_ends_early_leaves_no_page_unprotected(vcpus: int, can_be_blocked: bool) -> None:
    """Since Linux 6.17 entries that were gathered for a batch count as reset, and their pages are not protected."""
    for after in range(13):
        scene = RingScene({0: 300}, vcpus=vcpus)
        for page in (3, 4, 5, 6, 99, 98, 97, 200, 201, 202, 299, 298):
            scene.store(0, page, vcpu=page % vcpus)
        scene.vm.signal_after, scene.vm.signal_can_be_blocked = after, can_be_blocked
        scene.get(0)
        check_that_nothing_is_lost(scene, f"after {after} entries")


@pytest.mark.parametrize("after", [0, 1, 5, 63])
def test_a_reset_that_ends_early_while_a_long_gap_is_crossed_loses_nothing(after: int) -> None:
    scene = in_a_gap(SIZE - 10)
    assert scene.leave_if_full(0)
    while scene.leave_if_full(0):
        freeze_next_reset(scene, after)
        scene.ask_for_room(0)
    scene.vm.signal_after = None
    check_that_nothing_is_lost(scene)


def freeze_next_reset(scene: RingScene, after: int) -> None:
    scene.vm.signal_after, scene.vm.signal_can_be_blocked = after, False


# --- interrupts


def plain(extensions: Any = None) -> RingScene:
    scene = RingScene({0: NPAGES, 7: 65}, **({"extensions": extensions} if extensions else {}))
    scene.stores(7, [64, 0])
    scene.stores(0, range(5, 300, 7))
    return scene


def with_a_bitmap() -> RingScene:
    scene = plain(ARM64)
    scene.write_without_vcpu(0, 500)
    return scene


def across_the_end() -> RingScene:
    scene = turned_by(SIZE - 20)
    scene.stores(0, range(100))
    return scene


def overflowed() -> RingScene:
    scene = plain()
    overrun(scene, SIZE + 20, 400)
    return scene


def behind_a_gap() -> RingScene:
    scene = in_a_gap(20)
    scene.stores(0, range(400, 440))
    return scene


def behind_a_gap_across_the_end() -> RingScene:
    scene = in_a_gap(30, before=SIZE - 10)
    scene.stores(0, range(400, 440))
    return scene


SCENES = [plain, with_a_bitmap, across_the_end, overflowed, behind_a_gap, behind_a_gap_across_the_end]
each_scene = pytest.mark.parametrize("make", SCENES, ids=lambda make: make.__name__)


def check_interrupts(make: Callable[[], RingScene], interrupt: Callable[[Callable[[], object], int], bool]) -> None:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    for step in itertools.count():
        scene = make()
        out = DirtyBitmap(NPAGES)
        interrupted = interrupt(partial(scene.log.get, 0, out), step)
        left = signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        assert left == blocked, f"interrupted at step {step}: signals are still blocked"
        pages = out.pages()
        scene.copies[0][pages] = scene.versions[0][pages]
        try:
            check_that_nothing_is_lost(scene, f"interrupted at step {step}")
        except CoverageLostError:
            # Interrupted just when the kernel answered, with a ring that is full: nobody knows its place, and it says so for good.
            assert make is overflowed
            for _ in range(2):
                with pytest.raises(CoverageLostError):
                    scene.get(0)
        if not interrupted:
            break
    assert step > 10, "the steps were not seen"


# An interrupt in a generator that is being closed is printed and gone.
swallows = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@swallows
@each_scene
def test_an_interrupt_at_any_point_loses_nothing(make: Callable[[], RingScene]) -> None:
    check_interrupts(make, interrupt)


_FILES = {ring.__file__, ring_port.__file__}


class _InterruptError(BaseException):
    """As a Ctrl-C: no `except Exception` stops it."""


def looks_for_signals(frame: FrameType) -> bool:
    """Return whether Python looks for signals after the instruction that it is at: a call, or the end of a loop's turn."""
    name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
    return name.startswith("CALL") or name == "JUMP_BACKWARD"


def interrupt_anywhere(action: Callable[[], object], step: int) -> bool:
    """Run ``action`` and raise where Python looks for signals in the ring's code, the time of this number; tell if it got there."""
    left = step
    came_from: dict[FrameType, bool] = {}

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in _FILES:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= came_from.get(frame, False)
            came_from[frame] = looks_for_signals(frame)
            if left < 0:
                raise _InterruptError
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except _InterruptError:
        return True
    finally:
        sys.settrace(before)
    return False


@swallows
@each_scene
def test_an_interrupt_between_two_turns_of_a_loop_loses_nothing(make: Callable[[], RingScene]) -> None:
    check_interrupts(make, interrupt_anywhere)


@swallows
def test_a_vcpu_that_finds_its_ring_harvested_by_a_get_that_was_interrupted_does_not_skip_entries() -> None:
    for step in itertools.count():
        scene = RingScene({0: NPAGES})
        scene.stores(0, range(SIZE - RESERVED))
        assert scene.leave_if_full(0)
        scene.get(0)
        scene.ask_for_room(0)  # somebody was faster
        scene.stores(0, range(SIZE - RESERVED))
        assert scene.leave_if_full(0)
        interrupted = interrupt(partial(scene.get, 0), step)
        scene.ask_for_room(0)
        assert scene.vm.rings[0].used <= SIZE, f"interrupted at step {step}: the kernel's reset has passed its next entry"
        if not interrupted:
            break
    assert step > 15, "the steps were not seen"

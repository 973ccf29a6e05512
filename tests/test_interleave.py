"""Which orders are right: every question of the catalogue, and the explorer itself."""

from __future__ import annotations

import re
import signal
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from dirtylog.emulated.arch import PORTS
from interleave import orders
from interleave.catalogue import ONE, SAFE, TWO, UNSAFE, Question, guest
from interleave.cooperation import StepLock
from interleave.explorer import Result, Run, Scene, explore, replay
from interleave.readers import toggler
from interleave.rings import RingExploration
from interleave.scenes import GuestScene

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dirtylog.emulated.cpu_trace import TraceCpu
    from dirtylog.guests.vcpu import Vcpu

ORDERING = Path(__file__).parent.parent / "docs" / "ordering.md"
_STORY = re.compile(r"<!-- story: (.+?) -->\n+```text\n(.*?)\n```", re.DOTALL)

_seen: list[tuple[Question, Result]] = []


@pytest.fixture(scope="module", autouse=True)
def _tell(pytestconfig: pytest.Config) -> Iterator[None]:
    """Print how much was explored."""
    yield
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        for question, result in sorted(_seen):
            print(f"\n{question.name}: {result}", end="")


def named(question: Question) -> str:
    return question.name.replace(" ", "-")


@pytest.mark.parametrize("question", SAFE, ids=named)
def test_an_order_that_is_safe(question: Question) -> None:
    result = explore(question.scene, bound=question.bound)
    _seen.append((question, result))
    assert result.violations == []
    assert result.schedules > 5


@pytest.mark.parametrize("question", UNSAFE, ids=named)
def test_an_order_that_is_not_is_found(question: Question) -> None:
    result = explore(question.scene, bound=question.bound)
    _seen.append((question, result))
    assert len(result.violations) == 1
    story = result.violations[0].splitlines()
    wrong, told = replay(question.scene(), result.seeds[0])
    assert wrong == story[0]
    assert [line.split(maxsplit=2)[2] for line in story[1:-1]] == [line.split(" ", 1)[1].strip() for line in told]
    assert story[-1] == f"  seed {result.seeds[0]}"


def test_the_stories_in_the_documentation_are_the_explorers() -> None:
    stories = dict(_STORY.findall(ORDERING.read_text(encoding="utf-8")))
    assert set(stories) == {question.name for question in UNSAFE}
    for question in UNSAFE:
        assert stories[question.name] == explore(question.scene, bound=question.bound).violations[0], question.name


# --- the explorer


class Toy:
    """Actors over a shared list; what is wrong is up to ``judge``."""

    def __init__(self, bodies: dict[str, Callable[[Toy], None]], judge: Callable[[Toy], str | None] = lambda _: None) -> None:
        self._bodies, self._judge = bodies, judge

    def begin(self, run: Run) -> None:
        self.run = run
        self.log: list[str] = []
        self.number = 0
        self.locks = {name: StepLock(run, name) for name in "AB"}
        for name, body in self._bodies.items():
            run.actor(name, lambda body=body: body(self))  # type: ignore[misc]  # a stand-in

    def check(self) -> str | None:
        return self._judge(self)


def adds_one(toy: Toy) -> None:
    toy.run.step("loads", reads=["number"])
    loaded = toy.number
    toy.run.step("stores", writes=["number"])
    toy.number = loaded + 1


def test_a_lost_update_is_found() -> None:
    result = explore(lambda: Toy({"a": adds_one, "b": adds_one}, lambda toy: None if toy.number == 2 else f"it is {toy.number}"))
    assert result.violations[0].startswith("it is 1\n")


@pytest.mark.parametrize("bound", [None, 0, 1, 2, 9])
def test_every_end_is_seen(bound: int | None) -> None:
    """Of two lost updates of three, all numbers are seen; with no preemptions only the right one."""
    ends = set[int]()

    def judge(toy: Toy) -> None:
        ends.add(toy.number)

    explore(lambda: Toy(dict.fromkeys("abc", adds_one), judge), bound=bound)
    assert ends == {None: {1, 2, 3}, 0: {3}, 1: {1, 2, 3}, 2: {1, 2, 3}, 9: {1, 2, 3}}[bound]


def test_without_sleep_sets_and_without_a_bound_that_matters_the_count_is_what_combinatorics_says() -> None:
    result = explore(lambda: Toy({"a": adds_one, "b": adds_one, "c": adds_one}), bound=99)
    assert result.schedules == 90  # 6! / 2!**3


def ends_of(make: Callable[[], Scene], bound: int | None) -> set[tuple[object, ...]]:
    """Return every end state of a scene: memory, copies, bitmap, TLBs, rings."""
    seen: set[tuple[object, ...]] = set()

    def watched() -> Scene:
        scene = make()
        check = scene.check

        def check_and_see() -> str | None:
            seen.add(state_of(scene))
            return check()

        scene.check = check_and_see  # type: ignore[method-assign]  # a test looks on
        return scene

    explore(watched, bound=bound, stop_at_first=False)
    return seen


def state_of(scene: Scene) -> tuple[object, ...]:
    if isinstance(scene, RingExploration):
        model = scene.scene
        parts = (model.copies[0], model.versions[0], model.vm.slots[0].armed, model.vm.rings[0].entries["flags"])
        return tuple(part.tobytes() for part in parts)
    assert isinstance(scene, GuestScene)
    bitmap = scene.slot.dirty_bitmap
    marks = None if bitmap is None else bitmap._current.tobytes()
    tlbs = tuple(str(sorted((gfn, entry[2]) for gfn, entry in tlb_of(vcpu).items())) for vcpu in scene.memory.vcpus)
    return scene.copy.tobytes(), scene.memory.read(0, range(scene.slot.npages)).tobytes(), marks, tlbs


def tlb_of(vcpu: Vcpu) -> dict[int, Any]:
    return cast("TraceCpu", vcpu.cpu)._tlb


SMALL: dict[str, tuple[Callable[[], Scene], int]] = {
    "a store": (guest([[0]]), 99),
    "a fault": (guest([[1]], cold=True), 3),
    "copy, then wipe": (guest([[1]], get=orders.copy_then_wipe), 3),
    "two getters": (guest([[0]], TWO), 2),
    "off and on": (guest([[0]], (("toggler", toggler),)), 3),
    **{name: (partial(GuestScene, PORTS[name], [[1]], ONE), 3) for name in ("x86-pml", "ppc-hv", "ppc-pv", "s390", "ia64")},
    "a ring": (lambda: RingExploration([0]), 3),
    "a ring that is full": (lambda: RingExploration([0, 1, 2, 3]), 1),
}


@pytest.mark.parametrize("name", SMALL)
def test_sleep_sets_lose_no_end(name: str) -> None:
    """Or a step would touch more than it says: then an order that matters would be taken for one that does not."""
    make, bound = SMALL[name]
    ends = ends_of(make, bound)
    assert len(ends) > 1
    assert ends <= ends_of(make, None)


def test_what_has_nothing_in_common_is_run_in_one_order() -> None:
    def own(name: str) -> Callable[[Toy], None]:
        def body(toy: Toy) -> None:
            for _ in range(3):
                toy.run.step("writes its own", writes=[name])

        return body

    assert explore(lambda: Toy({name: own(name) for name in "abc"})).schedules == 1


def test_who_only_reads_is_run_in_one_order() -> None:
    def reads(toy: Toy) -> None:
        toy.run.step("reads", reads=["number"])
        toy.run.step("reads", reads=["number"])

    assert explore(lambda: Toy({"a": reads, "b": reads})).schedules == 1


def test_a_deadlock_is_found() -> None:
    def takes(first: str, second: str) -> Callable[[Toy], None]:
        def body(toy: Toy) -> None:
            with toy.locks[first], toy.locks[second]:
                pass

        return body

    result = explore(lambda: Toy({"a": takes("A", "B"), "b": takes("B", "A")}))
    assert result.violations[0].startswith("deadlock: a waits, who takes B; b waits, who takes A")
    assert explore(lambda: Toy({"a": takes("A", "B"), "b": takes("A", "B")})).violations == []


def test_a_seed_of_another_scene_is_refused() -> None:
    with pytest.raises(ValueError, match="'01z' is not of this scene: after 2 steps actor 35 cannot go on"):
        replay(Toy({"a": adds_one, "b": adds_one}), "01z")


def test_an_error_in_an_actor_is_told() -> None:
    def fails(toy: Toy) -> None:
        toy.run.step("fails")
        raise ValueError("so it is")

    assert explore(lambda: Toy({"a": fails})).violations[0].startswith("a fails: ValueError: so it is\n")


def test_who_does_not_end_is_told() -> None:
    def spins(toy: Toy) -> None:
        while True:
            toy.run.step("goes on", writes=["number"])

    assert "it does not end" in explore(lambda: Toy({"a": spins})).violations[0]


@pytest.mark.parametrize("question", [SAFE[0], *(one for one in SAFE if "ring" in one.name)], ids=named)
def test_nothing_is_left(question: Question) -> None:
    threads, blocked = threading.active_count(), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    explore(question.scene, bound=1)
    assert threading.active_count() == threads
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == blocked

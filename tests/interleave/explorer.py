"""Runs logical threads one step at a time, under a scheduler that goes through their schedules systematically.

An *actor* is a coroutine (a greenlet) that runs real code. Where it is about to touch what others touch, it *steps*: it says what
it is about to do, and what that touches, and is suspended until the scheduler chooses it. Nothing else runs from there to the next.

Two steps that touch nothing in common, or only read what they have in common, may come in either order: with *sleep sets*
(Godefroid), of all schedules that differ in such exchanges only, one is run to its end. No end state and no deadlock is lost.
Where there are too many even so, a bound of *preemptions* (of an actor that could have gone on) takes the place of the sleep sets,
for both together would leave schedules out.

Each schedule begins anew, with a scene of its own: a schedule is the list of the actors' numbers, and as text it is the *seed*
that replays it.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from greenlet import GreenletExit, getcurrent, greenlet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_ENDLESS = 2000


class Step(NamedTuple):
    """What an actor is about to do: in words, with what it reads and writes, and when it can."""

    what: str
    reads: frozenset[str]
    writes: frozenset[str]
    possible: Callable[[], bool]
    idle: bool
    """Whether it is no loss if this never comes: a vCPU that waits for something to do."""

    def depends(self, other: Step) -> bool:
        """Return whether it matters which of two steps comes first."""
        return bool(self.writes & (other.reads | other.writes) or self.reads & other.writes)


class ViolationError(AssertionError):
    """A schedule at whose end something is wrong; says the story."""


class Scene(Protocol):
    """What is run: made anew for each schedule."""

    def begin(self, run: Run) -> None:
        """Put everything up, and name the actors."""

    def check(self) -> str | None:
        """Return what is wrong at the end, or None."""


@dataclass(eq=False)
class Actor:
    """One logical thread."""

    name: str
    body: Callable[[], None]
    coroutine: greenlet
    pending: Step | None = None
    over: bool = False
    error: BaseException | None = None
    intent: str = ""
    """What it takes a lock for, in the words of a story; for the next lock only."""


def _always() -> bool:
    return True


class Run:
    """One schedule, while it runs."""

    def __init__(self) -> None:
        self.actors: list[Actor] = []
        self.story: list[str] = []
        self._hub = getcurrent()
        self._closing = False
        # All actors have one signal mask, which one may take for the mask of before that another has set.
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def actor(self, name: str, body: Callable[[], None]) -> Actor:
        """Add a logical thread."""
        actor: Actor = Actor(name, body, greenlet(lambda: self._live(actor)))
        self.actors.append(actor)
        return actor

    def step(
        self,
        what: str,
        *,
        reads: Iterable[str] = (),
        writes: Iterable[str] = (),
        possible: Callable[[], bool] = _always,
        idle: bool = False,
    ) -> None:
        """Wait to be chosen. Outside of actors, while a scene is put up or checked, there is nobody to wait for.

        While an actor is being ended, what it does on its way out is no step; where it would wait for something to do, it ends.
        """
        if self._closing:
            if idle:
                raise GreenletExit
            return
        current = getcurrent()
        for actor in self.actors:
            if actor.coroutine is current:
                actor.pending = Step(what, frozenset(reads), frozenset(writes), possible, idle)
                self._hub.switch()
                return
        assert possible(), f"{what}: nobody is there to make it possible"

    def current(self) -> Actor | None:
        """Return the actor that runs."""
        current = getcurrent()
        return next((actor for actor in self.actors if actor.coroutine is current), None)

    def intend(self, what: str) -> None:
        """Say what the next lock is taken for."""
        actor = self.current()
        if actor is not None:
            actor.intent = what

    def say(self, what: str) -> None:
        """Add to the story what has become of a step."""
        if self.current() is not None:
            self.story[-1] += f"{',' if ': ' in self.story[-1] else ':'} {what}"

    def settle(self) -> None:
        """Have actors that are new come to their first step."""
        for actor in self.actors:
            if actor.pending is None and not actor.over:
                actor.coroutine.switch()

    def possible(self) -> list[int]:
        """Return the actors that can go on."""
        return [number for number, actor in enumerate(self.actors) if actor.pending is not None and actor.pending.possible()]

    def go(self, number: int) -> None:
        """Let an actor make its step."""
        actor = self.actors[number]
        assert actor.pending is not None
        self.story.append(f"{actor.name} {actor.pending.what}")
        actor.pending = None
        actor.coroutine.switch()
        self.settle()

    def stuck(self) -> list[Actor]:
        """Return who waits for something that will not come."""
        return [actor for actor in self.actors if actor.pending is not None and not actor.pending.idle]

    def close(self) -> None:
        """End every coroutine, and leave no signal blocked."""
        self._closing = True
        for actor in self.actors:
            if not actor.over:
                actor.coroutine.throw(GreenletExit)
            assert actor.coroutine.dead, f"{actor.name} cannot be ended"
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _live(self, actor: Actor) -> None:
        try:
            actor.body()
        except GreenletExit:
            pass
        except BaseException as error:  # noqa: BLE001 - it is told at the end of the schedule
            actor.error = error
        finally:
            actor.over, actor.pending = True, None


@dataclass
class _Node:
    """A state on the path: which actors can go on from here, who sleeps, who has been tried."""

    possible: list[int]
    steps: dict[int, Step]
    sleep: set[int]
    preemptions: int
    before: int | None
    choice: int = -1
    tried: list[int] = field(default_factory=list)


@dataclass
class Result:
    """What an exploration has seen. ``redundant`` schedules were left in their middle: their ends had been seen."""

    schedules: int = 0
    redundant: int = 0
    states: int = 0
    bound: int | None = None
    violations: list[str] = field(default_factory=list)
    """Stories."""
    seeds: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        bounded = "all of them" if self.bound is None else f"all with at most {self.bound} preemptions"
        return f"{self.schedules} schedules ({bounded}), {self.states} states, {len(self.violations)} with a loss"


def explore(scene: Callable[[], Scene], *, bound: int | None = None, stop_at_first: bool = True) -> Result:
    """Run every schedule of a scene that differs in something that matters, or all within a bound of preemptions."""
    result = Result(bound=bound)
    path: list[_Node] = []
    while True:
        violation = _run(scene(), path, result, bound)
        if violation is not None:
            result.violations.append(violation)
            result.seeds.append(seed_of(path))
            if stop_at_first:
                return result
        while path:
            node = path[-1]
            node.tried.append(node.choice)
            left = _candidates(node, bound)
            if left:
                node.choice = left[0]
                break
            path.pop()
        else:
            return result


def replay(scene: Scene, seed: str) -> tuple[str | None, list[str]]:
    """Run one schedule again; return what is wrong at its end, or None, and its story. ValueError for another scene's seed."""
    run = Run()
    scene.begin(run)
    try:
        run.settle()
        for number in (int(word, 36) for word in seed):
            if number not in run.possible():
                raise ValueError(f"seed {seed!r} is not of this scene: after {len(run.story)} steps actor {number} cannot go on")
            run.go(number)
        while possible := run.possible():
            run.go(possible[0])
        return _verdict(run, scene), run.story
    finally:
        run.close()


def seed_of(path: list[_Node]) -> str:
    """Return the choices as text, a digit each."""
    return "".join("0123456789abcdefghijklmnopqrstuvwxyz"[node.choice] for node in path)


def _candidates(node: _Node, bound: int | None) -> list[int]:
    """Return who may be chosen, the one who has just run first: a story with few changes is read more easily."""
    order = sorted(node.possible, key=lambda number: (number != node.before, number))
    if bound is None:
        return [number for number in order if number not in node.sleep and number not in node.tried]
    preempts = node.before in node.possible
    allowed = node.preemptions < bound or not preempts
    return [number for number in order if number not in node.tried and (allowed or number == node.before)]


def _run(scene: Scene, path: list[_Node], result: Result, bound: int | None) -> str | None:
    """Run one schedule: along the path, and from its end on as comes first. Return the story of what is wrong at the end."""
    run = Run()
    scene.begin(run)
    try:
        run.settle()
        for node in path:
            run.go(node.choice)
        while possible := run.possible():
            node = _arrive(run, path, possible, bound)
            result.states += 1
            left = _candidates(node, bound)
            if not left:
                result.redundant += 1
                return None
            node.choice = left[0]
            path.append(node)
            run.go(node.choice)
            if len(path) > _ENDLESS:
                return f"it does not end:\n{_told(run)}"
        result.schedules += 1
        wrong = _verdict(run, scene)
        return None if wrong is None else f"{wrong}\n{_told(run)}\n  seed {seed_of(path)}"
    finally:
        run.close()


def _arrive(run: Run, path: list[_Node], possible: list[int], bound: int | None) -> _Node:
    steps = {number: actor.pending for number, actor in enumerate(run.actors) if actor.pending is not None}
    if not path:
        return _Node(possible, steps, set(), 0, None)
    parent = path[-1]
    made = parent.steps[parent.choice]
    # Whoever was tried before in the parent's place, or slept there, sleeps on until a step comes on which his depends.
    sleep = {
        number for number in (*parent.sleep, *parent.tried) if number in parent.steps and not parent.steps[number].depends(made)
    }
    preempted = parent.before is not None and parent.before in parent.possible and parent.choice != parent.before
    return _Node(possible, steps, sleep if bound is None else set(), parent.preemptions + preempted, parent.choice)


def _verdict(run: Run, scene: Scene) -> str | None:
    stuck = run.stuck()
    if stuck:
        return f"deadlock: {'; '.join(f'{actor.name} waits, who {actor.pending.what}' for actor in stuck if actor.pending)}"
    for actor in run.actors:
        if isinstance(actor.error, ViolationError):
            return str(actor.error)
        if actor.error is not None:
            return f"{actor.name} fails: {type(actor.error).__name__}: {actor.error}"
    return scene.check()


def _told(run: Run) -> str:
    width = max((len(actor.name) for actor in run.actors), default=0)
    lines = []
    for number, line in enumerate(run.story, 1):
        name, _, what = line.partition(" ")
        lines.append(f"  {number:3}  {name:<{width}}  {what}")
    return "\n".join(lines)

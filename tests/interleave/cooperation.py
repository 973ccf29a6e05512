"""Locks, conditions and threads as the scheduler has them, in the places where the real code keeps its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable

    from interleave.explorer import Actor, Run


class StepLock:
    """A lock. To take it is a step; to let it go is one too, if others could have come in between.

    ``reads`` is what who has it looks at without a lock of its own.
    """

    def __init__(self, run: Run, name: str, *, reentrant: bool = False, reads: tuple[str, ...] = ()) -> None:
        self.name = name
        self._reads = reads
        self._run = run
        self._reentrant = reentrant
        self._owner: Actor | None = None
        self._depth = 0
        self._steps = 0

    @property
    def held(self) -> bool:
        """Whether somebody has it."""
        return self._depth > 0

    def acquire(self) -> bool:
        """Take it, when it is free."""
        current = self._run.current()
        if self._depth and self._reentrant and self._owner is current:
            self._depth += 1
            return True
        intent = f"takes {self.name}"
        if current is not None and current.intent:
            intent, current.intent = current.intent, ""
        self._run.step(intent, reads=self._reads, writes=[self.name], possible=lambda: not self._depth)
        self._owner, self._depth, self._steps = current, 1, len(self._run.story)
        return True

    def release(self) -> None:
        """Let it go."""
        if self._depth == 1 and len(self._run.story) != self._steps:
            self._run.step(f"lets {self.name} go", writes=[self.name])
        self._depth -= 1

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class StepCondition:
    """A condition with a lock of its own."""

    def __init__(self, run: Run, name: str) -> None:
        self.lock = StepLock(run, name)
        self._run = run
        self._notified = 0

    def __enter__(self) -> Self:
        self.lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def notify_all(self) -> None:
        """Wake whoever waits."""
        self._notified += 1

    def wait(self) -> None:
        """Wait to be notified: for something to do."""
        before = self._notified
        self._wait("has something to do again", lambda: self._notified != before, idle=True)

    def wait_for(self, true: Callable[[], bool], timeout: float | None = None) -> bool:  # noqa: ARG002 - time stands still here
        """Wait until something is true."""
        if not true():
            who = self.lock.name.removesuffix("'s lock")
            self._wait(f"sees that {who} has answered", true, idle=False)
        return True

    def _wait(self, what: str, true: Callable[[], bool], *, idle: bool) -> None:
        lock = self.lock
        owner, lock._depth = lock._owner, 0
        self._run.step(what, writes=[lock.name], possible=lambda: not lock.held and true(), idle=idle)
        lock._owner, lock._depth, lock._steps = owner, 1, len(self._run.story)


class StepThreading:
    """What :mod:`dirtylog.guests.vcpu` takes from :mod:`threading`."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._conditions = 0

    def Lock(self) -> None:  # noqa: N802 - as in threading
        """Return nothing: a condition has its own."""

    def Condition(self, _lock: object) -> StepCondition:  # noqa: N802 - as in threading
        """Return a condition, for each vCPU one."""
        self._conditions += 1
        return StepCondition(self._run, f"vcpu-{self._conditions - 1}'s lock")

    def Thread(self, *, target: Callable[[], None], name: str, daemon: bool) -> Any:  # noqa: N802, ARG002 - as in threading
        """Return what becomes an actor when it is started."""
        return _StepThread(self._run, name, target)


class _StepThread:
    def __init__(self, run: Run, name: str, target: Callable[[], None]) -> None:
        self._run, self._name, self._target = run, name, target

    def start(self) -> None:
        self._run.actor(self._name, self._target)


class StepTlb(dict[int, Any]):
    """A TLB of the trace CPU. A store is one step with the look into the TLB that lets it through; to fill it is another."""

    def __init__(self, run: Run, vcpu: int, page_of: Callable[[int], str]) -> None:
        super().__init__()
        self._run, self._vcpu, self._page_of = run, vcpu, page_of

    def get(self, gfn: int, default: Any = None) -> Any:
        """Look a frame up; if it is there, what follows is the access."""
        page = self._page_of(gfn)
        self._run.step(f"accesses {page}", reads=[f"vcpu-{self._vcpu}'s lock"], writes=[page])
        entry = super().get(gfn, default)
        self._run.say("not in the TLB" if entry is None else f"through the TLB, {'writable' if entry[2] else 'read-only'}")
        return entry

    def peek(self, gfn: int) -> bool:
        """Return whether a frame can be stored to through it."""
        entry = super().get(gfn)
        return entry is not None and bool(entry[2])

    def __setitem__(self, gfn: int, entry: Any) -> None:
        """Fill it after a miss; what follows is the access."""
        page = self._page_of(gfn)
        self._run.step(f"fills its TLB and accesses {page}", reads=[f"vcpu-{self._vcpu}'s lock"], writes=[page])
        super().__setitem__(gfn, entry)

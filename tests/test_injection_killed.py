"""Whoever makes a system call in another process may die at any point of it: the process must not notice."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from dying_injector import Died, DyingInjector
from injection_stages import FEWEST_STAGES
from known_limits import known_limit
from victims import EINTR_PRONE, Victim, Worker, descriptors_of, eventually, needs_root, needs_victims, tracer_of, watched_mappings

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = needs_victims

KILLED = 9
# The kernel forgets how long these were to sleep: a frame can only have them end with EINTR.
FORGOTTEN = ("nanosleep", "futex", "poll")
TARGETS = ("compute", "futex@4", "poll@4", "epoll_wait@4", "nanosleep@4", "sequence@1")


@pytest.fixture(scope="module")
def injector() -> Iterator[DyingInjector]:
    """Give the program that forks: it has imported everything already."""
    with DyingInjector() as program:
        yield program


class Death(NamedTuple):
    """One death, and how many EINTRs it gave the target."""

    stage: str
    spurious: int


def new_descriptors(pid: int, before: dict[int, str]) -> list[str]:
    """Return the files that are open since, each of which must be closed by an execve."""
    new = {fd: name for fd, name in descriptors_of(pid).items() if fd not in before}
    for fd in new:
        flags = next(
            line for line in Path(f"/proc/{pid}/fdinfo/{fd}").read_text(encoding="ascii").splitlines() if line.startswith("flags:")
        )
        assert int(flags.split()[1], 8) & os.O_CLOEXEC
    return list(new.values())


def die_at_every_stage(injector: DyingInjector, victim: Victim, worker: Worker, *, after: bool) -> list[Death]:
    """Inject and die, one stage later each time until an injection is done; the target must be well each time."""
    deaths: list[Death] = []
    while True:
        victim.forget()
        before = descriptors_of(victim.pid)
        died = injector.inject(victim.pid, worker.tid, stage=len(deaths), after=after)
        victim.check()
        if not died.signal:
            assert died.exit == 0
            assert len(deaths) >= FEWEST_STAGES
            return deaths
        assert died.signal == KILLED
        assert died.stage, "it died of itself"
        left = new_descriptors(victim.pid, before)
        assert left in ([], ["anon_inode:[userfaultfd]"]), f"{died.stage} left {left}"
        deaths.append(Death(died.stage, sum(victim.spurious().values())))
        if left:
            # It is not in the way of the next one.
            assert injector.inject(victim.pid, worker.tid) == Died(0, 0, ""), died.stage
            victim.check()


def allowed_eintr(deaths: list[Death], kind: str, *, after: bool) -> list[str]:
    """Return the stages at which a death may give the target an EINTR.

    Until its registers are changed, a thread is only stopped, which the prone calls answer with EINTR; and so they do at the end,
    when it stands in its call again. From the first change until its registers are its own again, it goes on with a
    frame, in which a forgotten sleep has no other result.
    """
    names = [death.stage.split()[1] for death in deaths]
    changes = [number for number, name in enumerate(names) if name == "SETREGSET"]
    first, last = changes[0] + (not after), changes[-1] + (not after)
    if kind in EINTR_PRONE:
        entered = max(number for number, name in enumerate(names) if name == "SYSCALL") + (not after)
        return [death.stage for death in (*deaths[:first], *deaths[entered:])]
    return [death.stage for death in deaths[first:last]] if kind in FORGOTTEN else []


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("load", ["", "+ticked"], ids=["quiet", "1kHz"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_death_at_any_stage_leaves_the_target_as_it_was(injector: DyingInjector, target: str, load: str, after: bool) -> None:
    with Victim(target + load) as victim:
        worker = victim.workers[0]
        deaths = die_at_every_stage(injector, victim, worker, after=after)
        got = [number for number, death in enumerate(deaths) if death.spurious]
        allowed = allowed_eintr(deaths, worker.kind, after=after)
        assert [deaths[number].stage for number in got if deaths[number].stage not in allowed] == []
        assert watched_mappings(victim.pid) == 0


@pytest.mark.parametrize("kind", ["compute", "poll@3", "epoll_wait@3"])
def test_a_death_leaves_a_process_of_one_thread_as_it_was(injector: DyingInjector, kind: str) -> None:
    with Victim("--single", kind) as victim:
        worker = victim.workers[0]
        memory = os.open(f"/proc/{victim.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for stage in range(100):
                died = injector.inject(victim.pid, worker.tid, stage=stage, after=stage % 2)
                assert tracer_of(victim.pid) == 0
                done = rounds(memory, worker)
                eventually(lambda done=done: rounds(memory, worker) > done + 1, f"it does nothing any more after {died}")  # type: ignore[misc]  # a stand-in
                if not died.signal:
                    break
                assert died.signal == KILLED
        finally:
            os.close(memory)
        assert stage >= FEWEST_STAGES
        victim.terminate()


def rounds(memory: int, worker: Worker) -> int:
    """Return how many rounds a thread has done, without asking it."""
    return int.from_bytes(os.pread(memory, 8, worker.counter), "little")


def test_a_death_takes_no_signal_with_it(injector: DyingInjector) -> None:
    """The thread stops for its tracer to deliver the signal. Whether that lives or not, the handler is called."""
    with Victim("compute", "pause@60000") as victim:
        for worker in victim.workers:

            def handled(tid: int = worker.tid) -> int:
                return next(report.handled for report in victim.reports() if report.tid == tid)

            before = [injector.inject(victim.pid, worker.tid, stage=stage, after=False).stage for stage in range(5)]
            first = before.index("before INTERRUPT") + 1
            for stage in range(first, first + 20):
                count = handled()
                died = injector.inject(victim.pid, worker.tid, stage=stage, after=False, signal=int(signal.SIGUSR1))
                eventually(lambda count=count, handled=handled: handled() > count, f"death {died.stage} took the signal with it")  # type: ignore[misc]  # a stand-in
        victim.close()


def test_deaths_at_random_moments_under_signals(injector: DyingInjector) -> None:
    moments = random.Random(2024)
    died = 0
    kinds = (
        "compute*2+ticked",
        "sequence@1",
        "rseq*2",
        "nanosleep@3",
        "futex@3",
        "epoll_wait@3+ticked",
        "accept@3",
        "read@3",
        "wait4@3",
    )
    with Victim(*kinds) as victim:
        for _ in range(150):
            worker = moments.choice(victim.workers)
            end = injector.inject(victim.pid, worker.tid, delay=moments.uniform(0.001, 0.012))
            died += end.signal == KILLED
            # A thread in a restartable sequence is not taken: then it says so.
            assert end.signal in {0, KILLED}
            assert tracer_of(victim.pid, worker.tid) == 0
        victim.check()
        assert watched_mappings(victim.pid) == 0
    assert died >= 20


@known_limit
@needs_root
@pytest.mark.parametrize("action", ["errno", "kill"])
def test_a_death_does_not_let_a_seccomp_filter_loose_on_the_target(injector: DyingInjector, action: str) -> None:
    for after in (False, True):
        for stage in range(100):
            with Victim(f"--seccomp={action}", "compute") as victim:
                died = injector.inject(victim.pid, victim.workers[0].tid, stage=stage, after=after)
                # Time for the kernel to end it.
                time.sleep(0.002)
                assert not victim.ended, f"death {died.stage} ended it: {victim.wait()}"
                victim.check()
            if not died.signal:
                break


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        ("red zone", "the red zone was overwritten"),
        ("alternate stack", "the alternate stack is"),
        ("extended state", "register changed"),
        ("mask", "the signal mask is"),
        ("registers", "r12 is"),
    ],
)
def test_the_target_would_notice_a_wrong_frame(injector: DyingInjector, spoil: str, complaint: str) -> None:
    victim = Victim("compute")
    try:
        said = "ok"
        # Some more than once: it does not hold all its registers all the time.
        for stage in [*range(FEWEST_STAGES)] * 4:
            if said != "ok":
                break
            injector.inject(victim.pid, victim.workers[0].tid, stage=stage, after=False, spoil=spoil)
            victim.order("check")
            said = victim.line()
        assert said.startswith("bad compute: ")
        assert complaint in said
    finally:
        victim.close()

"""A userfaultfd made in another process, which stays just what it was: its threads, their registers, signals and system calls."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from dirtylog.linux.injection import inject_userfaultfd
from dirtylog.linux.mappings import read_mappings
from dirtylog.linux.pagemap import Pagemap, Scanner
from victims import EINTR_PRONE, GENTLE, Victim, needs_root, needs_victims, only_thread, same_descriptors, watched_mappings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

pytestmark = needs_victims

PAGE = os.sysconf("SC_PAGESIZE")
# Of everything that a thread can be at.
CROWD = (
    *("compute", "compute+ticked", "sequence@1", "rseq*2", "nanosleep@3", "futex@3", "poll@3", "ppoll@3", "epoll_wait@3"),
    *("epoll_pwait@3", "sigtimedwait@3", "read@3", "wait4@3", "pause@3", "sigsuspend@3", "accept@3", "select@3+ticked"),
)


def take(scanner: Scanner, start: int, end: int) -> set[int]:
    """Return the addresses of the pages written since the last look, and arm them."""
    found: set[int] = set()

    def deliver(regions: NDArray[np.void]) -> None:
        for first, last, _ in regions.tolist():
            found.update(range(first, last, PAGE))

    scanner.take(start, end, deliver)
    return found


def test_the_descriptor_watches_the_memory_of_the_other_process() -> None:
    with Victim("compute", "nanosleep@5") as victim, same_descriptors(victim.pid):
        counters = {worker.counter // PAGE * PAGE for worker in victim.workers}
        mapping = next(one for one in read_mappings(victim.pid) if one.start <= min(counters) < one.end)
        with inject_userfaultfd(victim.pid) as uffd, Pagemap(victim.pid) as pagemap:
            assert watched_mappings(victim.pid) == 0
            uffd.register(mapping.start, mapping.end - mapping.start)
            assert watched_mappings(victim.pid) == 1
            scanner = Scanner(pagemap)
            take(scanner, mapping.start, mapping.end)
            for _ in range(3):
                victim.check()
                assert counters <= take(scanner, mapping.start, mapping.end)
        assert watched_mappings(victim.pid) == 0


def test_two_hundred_injections_into_every_kind_of_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    with Victim(*CROWD) as victim, same_descriptors(victim.pid), same_descriptors(os.getpid()):
        # In a restartable sequence nothing is done to a thread: the sequences' own test is below.
        workers = [worker for worker in victim.workers if worker.kind != "rseq"]
        for number in range(200):
            only_thread(monkeypatch, workers[number % len(workers)].tid)
            inject_userfaultfd(victim.pid).close()
        victim.check()
        assert victim.spurious() == {}


def test_the_injector_chooses_a_thread_itself() -> None:
    with Victim(*CROWD) as victim, same_descriptors(victim.pid):
        for _ in range(50):
            inject_userfaultfd(victim.pid).close()
        victim.check()
        assert victim.spurious() == {}


@pytest.mark.parametrize("kind", [*GENTLE, *EINTR_PRONE])
def test_a_system_call_goes_on_as_if_nothing_had_been(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    with Victim(f"{kind}@25") as victim, same_descriptors(victim.pid):
        only_thread(monkeypatch, victim.workers[0].tid)
        for _ in range(8):
            inject_userfaultfd(victim.pid).close()
            time.sleep(0.004)
        victim.check()
        assert victim.spurious() == {}


def test_sleeps_take_as_long_as_they_were_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that began anew, at the injections after two thirds of it, would take half as long again at least."""
    kinds = ("nanosleep", "clock_nanosleep", "poll", "ppoll", "select", "pselect", "futex", "futex_until", "read_timer")
    with Victim(*(f"{kind}@1500" for kind in kinds)) as victim:
        time.sleep(1.0)
        for worker in victim.workers * 2:
            only_thread(monkeypatch, worker.tid)
            inject_userfaultfd(victim.pid).close()
        victim.check()
        slowest = {report.kind: report.slowest for report in victim.reports()}
        assert {kind: time for kind, time in slowest.items() if time > 2_300_000} == {}
        assert victim.spurious() == {}


@pytest.mark.parametrize("kind", ["compute", "compute+ticked", "poll@10", "epoll_wait@10", "nanosleep@10+ticked", "rseq"])
def test_a_process_of_one_thread(kind: str) -> None:
    with Victim("--single", kind) as victim, same_descriptors(os.getpid()):
        for _ in range(30):
            try:
                inject_userfaultfd(victim.pid).close()
            except Exception as error:
                if kind != "rseq":
                    raise
                # It is hardly ever anywhere else.
                assert "restartable sequence" in str(error)  # noqa: PT017 - whether there is one, is a matter of luck
        victim.terminate()


def test_a_process_of_sixty_four_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    with Victim("compute*16", "poll@5*16", "epoll_wait@5*16", "futex@5*16") as victim, same_descriptors(victim.pid):
        for worker in victim.workers:
            only_thread(monkeypatch, worker.tid)
            inject_userfaultfd(victim.pid).close()
        monkeypatch.undo()
        for _ in range(10):
            inject_userfaultfd(victim.pid).close()
        victim.check()
        assert victim.spurious() == {}


@pytest.mark.parametrize("flags", [("-static",), ("-static-pie",), ("-no-pie",)], ids=lambda flags: flags[0])
def test_a_program_linked_in_another_way(flags: tuple[str, ...]) -> None:
    with Victim("compute", "epoll_wait@5", "poll@5+ticked", flags=flags) as victim, same_descriptors(victim.pid):
        for _ in range(20):
            inject_userfaultfd(victim.pid).close()
        victim.check()


@needs_root
@pytest.mark.parametrize("action", ["errno", "kill"])
def test_a_seccomp_filter_is_suspended_by_root(monkeypatch: pytest.MonkeyPatch, action: str) -> None:
    with Victim(f"--seccomp={action}", "compute", "poll@5") as victim, same_descriptors(victim.pid):
        for worker in victim.workers * 5:
            only_thread(monkeypatch, worker.tid)
            with inject_userfaultfd(victim.pid) as uffd:
                uffd.register(worker.counter // PAGE * PAGE, PAGE)
        victim.check()


@needs_root
def test_a_seccomp_filter_that_only_the_chosen_thread_has(monkeypatch: pytest.MonkeyPatch) -> None:
    with Victim("poll@5+filter", "compute") as victim:
        only_thread(monkeypatch, victim.workers[0].tid)
        inject_userfaultfd(victim.pid).close()
        victim.check()


def test_a_thread_that_handles_system_calls_itself_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    from dirtylog.linux import injection  # noqa: PLC0415 - only here

    with Victim("compute+dispatched", "poll@5") as victim, same_descriptors(victim.pid):
        monkeypatch.setattr(injection, "threads_by_preference", lambda *_: [worker.tid for worker in victim.workers])
        for _ in range(5):
            inject_userfaultfd(victim.pid).close()
        victim.check()


def test_signals_in_every_stage_are_handled_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads that count numbered signals would complain of a lost, doubled or late one; here they come from two sides."""
    with Victim("sequence@1", "sequence@1", "compute+ticked", "pause@1") as victim:
        for number in range(60):
            only_thread(monkeypatch, victim.workers[number % 4].tid)
            os.kill(victim.pid, signal.SIGUSR1)
            inject_userfaultfd(victim.pid).close()
        victim.check()
        assert victim.spurious() == {}

"""Buffers that a thread of this process writes: what is reported against the writer's own record, and how it stands and ends."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest

import dirtylog
from dirtylog import DirtyLog, DirtyLogError, Exactness, InvalidArgumentError
from dirtylog.buffers.program import PROGRAMS, WrittenBuffer
from dirtylog.cli import main
from uffd_here import needs_uffd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

SOON = 20.0
SIZE = "8MiB"
NPAGES = 2048
HOT = set(range(992, 1056))
"""A 32nd, in the middle."""
WRITING = [name for name in PROGRAMS if name != "idle"]

each_port = pytest.mark.parametrize("port", [pytest.param("uffd", marks=needs_uffd), "compare"])


def until(met: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not met():
        assert time.monotonic() < end, "this should have happened long ago"
        time.sleep(0.001)


def stores(memory: WrittenBuffer, first: int, end: int) -> NDArray[np.int64]:
    """Return the pages of these stores, by their numbers from 0."""
    numbers = np.arange(first, end, dtype=np.int64)
    return numbers if memory.page_of is None else memory.page_of(numbers)


def written(memory: WrittenBuffer, first: int, end: int) -> set[int]:
    return set(stores(memory, first, end).tolist())


def contents(memory: WrittenBuffer) -> NDArray[np.uint8]:
    return memory.read(0, np.arange(memory.slots[0].npages))


def recorded(memory: WrittenBuffer) -> NDArray[np.uint8]:
    """Return what the memory holds by the writer's record: in each page the number of its last store, counted from 1."""
    words = np.zeros((memory.slots[0].npages, memory.slots[0].page_size // 8), np.uint64)
    end = memory.stats.writes
    words[stores(memory, 0, end), 0] = np.arange(1, end + 1)
    return words.view(np.uint8)


def opened(target: str, *, size: str = SIZE, port: str | None = None) -> WrittenBuffer:
    memory = dirtylog.open(target, size=size, port=port)
    assert isinstance(memory, WrittenBuffer)
    return memory


@contextmanager
def logged(memory: WrittenBuffer) -> Iterator[DirtyLog]:
    with memory, DirtyLog(memory) as log:
        log.get(0)  # port uffd may report what is in no page table yet
        yield log


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "dirtylog-writer"]


# --- what is reported


@each_port
@pytest.mark.parametrize("program", PROGRAMS)
def test_what_is_reported_between_two_stops_is_what_was_written(program: str, port: str) -> None:
    memory = opened(f"buffer:{program}", port=port)
    with logged(memory) as log:
        for _ in range(5):
            before = memory.stats.writes
            memory.resume()
            if program == "idle":
                time.sleep(0.01)
            else:
                until(lambda: memory.stats.writes > before + 200)  # noqa: B023 - called in the same round
            memory.pause()
            reported = set(log.get(0).pages().tolist())
            expected = written(memory, before, memory.stats.writes)
            assert reported >= expected
            assert memory.exactness is Exactness.SUPERSET or reported == expected
        assert np.array_equal(contents(memory), recorded(memory))
        assert (memory.stats.writes == 0) == (program == "idle")


@each_port
@pytest.mark.parametrize("program", WRITING)
def test_nothing_is_lost_while_it_writes_and_a_copy_is_the_memory(program: str, port: str) -> None:
    """A store of a batch that was under way during a get is in that get or in the next one."""
    memory = opened(f"buffer:{program}", port=port)
    with logged(memory) as log:
        copy = np.zeros((NPAGES, memory.slots[0].page_size), np.uint8)
        memory.resume()
        since, reported_before = 0, set[int]()
        for _ in range(15):
            until(lambda: memory.stats.writes > since + 100)  # noqa: B023 - called in the same round
            certain = memory.stats.writes
            pages = log.get(0).pages()
            reported = set(pages.tolist())
            assert reported | reported_before >= written(memory, since, certain)
            since, reported_before = memory.stats.writes, reported
            copy[pages] = memory.read(0, pages)
        memory.pause()
        pages = log.get(0).pages()
        copy[pages] = memory.read(0, pages)
        assert np.array_equal(copy, contents(memory))
        assert np.array_equal(copy, recorded(memory))


# --- what the programs write


def test_a_sweep_goes_page_after_page() -> None:
    with opened("buffer") as memory:
        assert stores(memory, 0, 3 * NPAGES).tolist() == list(range(NPAGES)) * 3


def test_a_random_walk_writes_each_page_before_any_again() -> None:
    with opened("buffer:random") as memory:
        order = stores(memory, 0, 2 * NPAGES).tolist()
        assert sorted(order[:NPAGES]) == list(range(NPAGES)) != order[:NPAGES]
        assert order[NPAGES:] == order[:NPAGES]


def test_a_hot_set_is_a_32nd() -> None:
    with opened("buffer:hotset") as memory:
        assert written(memory, 0, 10 * NPAGES) == HOT


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_single_page_is_enough_for_each_program(program: str) -> None:
    with opened(f"buffer:{program}", size="4KiB", port="compare") as memory:
        memory.resume()
        if program != "idle":
            until(lambda: memory.stats.writes > 0)
            assert written(memory, 0, 100) == {0}


def test_phases_are_a_hot_set_and_a_sweep_that_goes_on_where_it_was() -> None:
    with WrittenBuffer(NPAGES * 4096, "phases", stores_per_second=10_000, period=0.05, port="compare") as memory:
        for phase in range(0, 8, 2):
            assert written(memory, 500 * phase, 500 * (phase + 1)) == HOT
        swept = [page for phase in range(1, 10, 2) for page in stores(memory, 500 * phase, 500 * (phase + 1)).tolist()]
        assert swept == [number % NPAGES for number in range(2500)]
        memory.resume()
        until(lambda: memory.stats.writes > 1100)
        memory.pause()
        assert np.array_equal(contents(memory), recorded(memory))


def test_the_writer_keeps_time() -> None:
    """It is never ahead of its time, a pause does not count, and it goes on with what it had."""
    with WrittenBuffer(NPAGES * 4096, stores_per_second=2000, port="compare") as memory:
        running, done = 0.0, 0
        for _ in range(3):
            began = time.monotonic()
            memory.resume()
            until(lambda: memory.stats.writes > done + 20)  # noqa: B023 - called in the same round
            memory.pause()
            running += time.monotonic() - began
            done = memory.stats.writes
            assert done <= running * 2000
            time.sleep(0.05)


def test_to_resume_what_runs_does_nothing() -> None:
    """The time that has come does not begin anew: else this writer would never be due."""
    with WrittenBuffer(NPAGES * 4096, stores_per_second=100, port="compare") as memory:

        def stored() -> bool:
            memory.resume()
            return memory.stats.writes > 0

        until(stored)


# --- how it stands and ends


def test_it_starts_paused_and_a_pause_stands_still() -> None:
    with opened("buffer:sweep", port="compare") as memory:
        time.sleep(0.02)
        assert memory.stats.writes == 0
        for _ in range(20):
            memory.resume()
            before = memory.stats.writes
            until(lambda: memory.stats.writes > before)  # noqa: B023 - called in the same round
            memory.pause()
            count, held = memory.stats.writes, contents(memory)
            assert np.array_equal(held, recorded(memory))
            time.sleep(0.01)
            assert memory.stats.writes == count
            assert np.array_equal(contents(memory), held)
        memory.resume()
        memory.end()
        count = memory.stats.writes
        time.sleep(0.01)
        assert memory.stats.writes == count


def test_a_pause_waits_for_the_batch_that_is_under_way() -> None:
    with opened("buffer:sweep", port="compare") as memory:
        order, begun = memory.page_of, threading.Event()
        assert order is not None

        def slowly(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
            begun.set()
            time.sleep(0.05)
            return order(numbers)

        memory.page_of = slowly
        memory.resume()
        assert begun.wait(SOON)
        memory.pause()
        count = memory.stats.writes
        time.sleep(0.1)
        assert memory.stats.writes == count


@pytest.mark.parametrize("state", ["new", "running", "paused"])
def test_close_ends_the_writer_and_a_second_close_does_nothing(state: str) -> None:
    memory = opened("buffer:sweep")
    if state != "new":
        memory.resume()
        assert len(writers()) == 1
    if state == "paused":
        memory.pause()
    memory.close()
    assert writers() == []
    memory.close()
    with pytest.raises(DirtyLogError, match="closed"):
        memory.resume()
    assert writers() == []


class StopHereError(Exception):
    """What a user's block raises."""


def test_an_error_in_the_block_ends_the_writer_too() -> None:
    with pytest.raises(StopHereError), opened("buffer:random") as memory, DirtyLog(memory) as log:
        memory.resume()
        log.get(0)
        raise StopHereError
    assert writers() == []


def test_a_close_that_is_interrupted_ends_the_writer_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: threading.Thread) -> None:
        raise KeyboardInterrupt

    memory = opened("buffer:sweep")
    memory.resume()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            memory.close()
    until(lambda: not writers())
    with pytest.raises(DirtyLogError, match="closed"):
        memory.read(0, [0])


# --- what is refused


@pytest.mark.parametrize("program", ["nope", "sweeps", "SWEEP", "sweep:random"])
def test_an_unknown_program_is_refused_with_the_names(program: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        dirtylog.open(f"buffer:{program}")
    assert repr(program) in str(caught.value)
    assert "sweep, random, hotset, idle, phases" in str(caught.value)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"vcpus": 2}, "vcpus are choices of guests"),
        ({"log": "ring"}, "log are choices of KVM guests"),
        ({"backing": "thp"}, "backing are choices of KVM guests"),
        ({"ring_entries": 1024}, "ring entries are choices of KVM guests"),
        ({"maps": ["heap"]}, "maps are choices of processes"),
        ({"port": "soft-dirty"}, "it is one of: auto, uffd, compare"),
        ({"size": 5000}, "whole pages"),
        ({"size": 0}, "at least one"),
        ({"size": "1000TiB"}, "this host has"),
    ],
)
def test_a_choice_that_a_buffer_does_not_have_is_refused(choices: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        dirtylog.open("buffer:sweep", **choices)  # type: ignore[arg-type]  # some are wrong on purpose


def test_an_image_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="image are choices of guests"):
        dirtylog.open("buffer", image=dirtylog.Image.raw(b"\xf4"))


@pytest.mark.parametrize("times", [{"stores_per_second": 0}, {"period": -1.0}, {"period": float("nan")}])
def test_a_writer_without_a_pace_is_refused(times: dict[str, float]) -> None:
    with pytest.raises(InvalidArgumentError, match="above 0"):
        WrittenBuffer(1 << 20, **times)  # type: ignore[arg-type]  # a dict of floats, of which each name is right


# --- the command line


def test_run_logs_a_buffer_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "buffer:hotset", "--size", SIZE, "--port", "compare", "--rounds", "3", "--interval", "0.05", "--json"]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["target"], document["port"], document["exactness"]) == ("buffer:hotset", "compare", "exact")
    assert (document["page_size"], document["complete"], document["incomplete"]) == (4096, True, [])
    assert document["blind_spots"]
    assert [found["round"] for found in document["rounds"]] == [1, 2, 3]
    assert all(0 < found["dirty_pages"] <= len(HOT) for found in document["rounds"])
    assert document["writes"] >= document["total"]["dirty_pages"]
    first = document["slots"][0]["base_gfn"]
    pages = {page - first for found in document["rounds"] for start, count in found["runs"] for page in range(start, start + count)}
    assert pages <= HOT
    assert {"pid", "vcpus"}.isdisjoint(document)
    assert writers() == []


@needs_uffd
def test_run_logs_a_buffer_in_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "buffer:phases", "--size", SIZE, "--rounds", "2", "--interval", "0.02"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("buffer:phases: port uffd (superset), page size 4096, 8 MiB of this process\n")
    assert "\nwrites " in told.out
    assert told.err == ""


def test_run_names_the_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "buffer:nope"]) == 2
    assert capsys.readouterr().err == (
        "dirtylog: unknown program 'nope'; the programs of a buffer are: sweep, random, hotset, idle, phases\n"
    )

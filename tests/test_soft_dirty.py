"""Soft-dirty bits: the probe, which must not be trapped, and the port on a kernel that has them.

Without CONFIG_MEM_SOFT_DIRTY the kernel accepts that the bits are cleared, and reports every page as clean for ever.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import dirtylog
from address_space import HUGE, PAGE, Area
from dirtylog import AccessDeniedError, DirtyLog, TargetGoneError, UnsupportedError
from dirtylog.linux import soft_dirty
from dirtylog.linux.soft_dirty import clear_soft_dirty, missing_soft_dirty, soft_dirty_pages
from launches import command, get_all, is_quiet, reports, rounds_of
from victims import state_of, tracer_of
from writers import ARENA, ARENA_MAP, EARLY_PAGE, NPAGES, Writer, arena_pages, finish, start

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dirtylog.linux.process import ProcessMemory

_MADV_HUGEPAGE = 14
has_soft_dirty = pytest.mark.skipif(missing_soft_dirty() is not None, reason=f"no soft-dirty bits: {missing_soft_dirty()}")
has_none = pytest.mark.skipif(missing_soft_dirty() is None, reason="this kernel has soft-dirty bits")


# --- the probe


@has_none
def test_the_trap_clearing_succeeds_and_everything_is_clean_for_ever() -> None:
    with Area.map(4) as area:
        clear_soft_dirty(os.getpid())
        for _ in range(3):
            area.store(0, 1, 2, 3)
            assert soft_dirty_pages(os.getpid(), area.address, 4, PAGE).tolist() == []
            clear_soft_dirty(os.getpid())


@has_none
def test_the_probe_is_not_trapped() -> None:
    missing = missing_soft_dirty()
    assert isinstance(missing, UnsupportedError)
    assert missing.reason == "a page was clean, then clean, then clean when written, cleared, and written again"
    assert missing.remedy is not None
    assert "CONFIG_MEM_SOFT_DIRTY" in missing.remedy
    with Writer() as target:
        with pytest.raises(UnsupportedError, match="soft-dirty"):
            dirtylog.open(f"pid:{target.pid}", port="soft-dirty")
        with dirtylog.open(f"pid:{target.pid}", port="auto") as memory:
            assert memory.port.name in ("uffd", "compare")


@pytest.mark.parametrize("seen", list(itertools.product((False, True), repeat=3)), ids=str)
def test_the_probe_wants_dirty_clean_dirty(seen: tuple[bool, bool, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of Power9's radix tables failed the third step only (bdwgc, issue 479)."""
    answers = iter(seen)
    cleared: list[int] = []
    monkeypatch.setattr(soft_dirty, "soft_dirty_pages", lambda *_: np.arange(int(next(answers))))
    monkeypatch.setattr(soft_dirty, "clear_soft_dirty", cleared.append)
    missing = missing_soft_dirty.__wrapped__()
    assert (missing is None) == (seen == (True, False, True))
    assert cleared == [os.getpid()]
    if missing is not None:
        assert missing.reason is not None
        assert [word in ("dirty", "dirty,") for word in missing.reason.split() if "dirty" in word or "clean" in word] == list(seen)


def test_a_probe_that_may_not_look_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AccessDeniedError("no")

    monkeypatch.setattr(soft_dirty, "soft_dirty_pages", refuse)
    assert isinstance(missing_soft_dirty.__wrapped__(), AccessDeniedError)


@pytest.mark.parametrize("call", [lambda pid: soft_dirty_pages(pid, 0, 1, PAGE), clear_soft_dirty])
def test_a_process_that_is_not_there(call: Callable[[int], object]) -> None:
    with pytest.raises(TargetGoneError, match="4194305") as caught:
        call(4194305)
    assert caught.value.pid == 4194305


# --- the kernel's own


@has_soft_dirty
def test_the_bits_of_this_process() -> None:
    with Area.map(300) as area:
        area.store(*range(300))
        clear_soft_dirty(os.getpid())
        assert soft_dirty_pages(os.getpid(), area.address, 300, PAGE).tolist() == []
        area.store(0, 7, 299)
        assert soft_dirty_pages(os.getpid(), area.address, 300, PAGE).tolist() == [0, 7, 299]
        assert soft_dirty_pages(os.getpid(), area.address, 300, PAGE).tolist() == [0, 7, 299], "to look changes nothing"


@pytest.fixture
def target() -> Iterator[Writer]:
    with Writer("store", *(str(page) for page in range(NPAGES))) as running:
        yield running


def opened(target: Writer, *maps: str) -> ProcessMemory:
    memory = dirtylog.open(f"pid:{target.pid}", port="soft-dirty", maps=maps or None)
    assert isinstance(memory, dirtylog.linux.process.ProcessMemory)
    return memory


@has_soft_dirty
def test_what_is_written_is_reported_once(target: Writer) -> None:
    with opened(target, ARENA_MAP) as memory, DirtyLog(memory) as log:
        assert get_all(log) == set()
        for pages in ({3}, {3, 4, 255}, set(range(0, NPAGES, 2)), set(range(NPAGES))):
            target.order(f"store {' '.join(map(str, pages))}")
            assert get_all(log) == pages
            assert get_all(log) == set()


@has_soft_dirty
def test_memory_that_is_new_is_reported_and_the_rest_goes_on(target: Writer) -> None:
    with opened(target) as memory, DirtyLog(memory) as log:
        get_all(log)
        target.order("share store 9")
        log.update()
        found = {slot.name: log.get(slot.id).count() for slot in memory.slots}
        assert found["/dev/zero (deleted)"] == 4
        target.order("store 9")
        assert get_all(log) == {9}


@has_soft_dirty
def test_the_target_runs_on_and_nobody_traces_it(target: Writer) -> None:
    with opened(target) as memory, DirtyLog(memory) as log:
        get_all(log)
        assert state_of(target.pid) == "S"
        assert tracer_of(target.pid) == 0
        memory.pause()
        assert state_of(target.pid) == "t"
        get_all(log)
        assert state_of(target.pid) == "t", "a get lets nobody go who was paused"
        memory.resume()
        target.order("store 1")
        assert get_all(log) == {1}


@has_soft_dirty
def test_a_shadow_of_a_target_that_writes_all_the_time_is_right_in_the_end() -> None:
    spun = [str(page) for page in range(0, NPAGES, 3)]
    with (
        Writer("spin", *spun, "spin", "1", "4", "7", "spin", *reversed(spun)) as running,
        opened(running, ARENA_MAP) as memory,
        DirtyLog(memory) as log,
    ):
        (slot,) = memory.slots
        shadow = memory.read(slot.id, np.arange(NPAGES))
        began, count = time.monotonic(), 0
        while time.monotonic() - began < 5:
            pages = log.get(slot.id).pages()
            shadow[pages] = memory.read(slot.id, pages)
            count += len(pages)
        memory.pause()
        pages = log.get(slot.id).pages()
        shadow[pages] = memory.read(slot.id, pages)
        assert (shadow == memory.read(slot.id, np.arange(NPAGES))).all()
        assert count > 1000
        memory.resume()


@has_soft_dirty
def test_a_command_from_its_first_instruction_to_its_last() -> None:
    with command("early", "store", "3", "sleep", "200", "store", "9", "exit", "4", port="soft-dirty") as (memory, log):
        found = set().union(*rounds_of(log))
        assert {3, 9, EARLY_PAGE} <= found
        memory.close()
        assert memory.status == 4


@has_soft_dirty
def test_several_threads_and_a_pause() -> None:
    with command("spin", "2", "spin", "3", "busy", "1", port="soft-dirty") as (memory, log):
        memory.resume()
        for _ in range(10):
            assert all(reports(log, page) for page in (1, 2, 3))
            memory.pause()
            assert is_quiet(log)
            memory.resume()


@has_soft_dirty
def test_on_the_command_line(target: Writer) -> None:
    words = (
        "run",
        f"pid:{target.pid}",
        "--port",
        "soft-dirty",
        "--map",
        ARENA_MAP,
        "--interval",
        "0.5",
        "--rounds",
        "4",
        "--jsonl",
    )
    with start(*words) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        target.order("store 5 6")
        ran = finish(process)
    assert ran.status == 0, ran.err
    assert (first["port"], first["attached"], first["exactness"]) == ("soft-dirty", "not", "superset")
    assert [arena_pages(line) for line in (first, *ran.lines) if line["runs"]] == [{5, 6}]


@has_soft_dirty
def test_a_huge_page_is_all_dirty_at_once() -> None:
    with Area.map(HUGE // PAGE, align=HUGE) as area:
        area.advise(_MADV_HUGEPAGE)
        area.store(*range(HUGE // PAGE))
        clear_soft_dirty(os.getpid())
        area.store(5)
        found = soft_dirty_pages(os.getpid(), area.address, HUGE // PAGE, PAGE).tolist()
        assert found in ([5], list(range(HUGE // PAGE)))
    assert ARENA % HUGE == 0

"""Memory of another process in batches of runs, against a model of what it holds: also where it has holes, or is protected."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from address_space import ANONYMOUS, HUGETLB, NONE, PAGE, PRIVATE, READ, SHARED, WRITE, Area
from dirtylog import AccessDeniedError, DirtyLogError, TargetGoneError
from dirtylog.linux import reading
from dirtylog.linux.reading import read_runs, runs_of, write_runs
from uffd_here import forks
from victims import NOBODY, eventually, needs_root, same_descriptors, state_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

pytestmark = forks

PAGES = 160
HOLES = (0, 1, 40, 77, 78, 79, 120, PAGES - 1)
GUARDED = (2, 41, 76, 121, PAGES - 2)
READ_ONLY = (3, 50, 90)

# A child that has the same memory, and does nothing.
_WAIT = "import os, sys; os.read(0, 1)"
_READ = """\
import encodings.ascii, json, os, sys
import numpy as np
from dirtylog.linux.reading import read_runs, write_runs
user, pid, address = map(int, sys.argv[1:])
os.setgroups([])
os.setgid(user)
os.setuid(user)
said = []
for call in (read_runs, write_runs):
    try:
        call(pid, np.array([[address, 8]], np.uint64), np.zeros(8, np.uint8))
    except Exception as error:
        said.append([type(error).__name__, getattr(error, "remedy", None)])
print(json.dumps(said))
"""


class Target(NamedTuple):
    """A process with an area like one of this process, and what the area holds in it."""

    pid: int
    area: Area
    contents: NDArray[np.uint8]


@contextmanager
def child_with(area: Area) -> Iterator[int]:  # noqa: ARG001 - the child has it
    """Give a forked child that waits, with the memory that this process has now."""
    end, kept = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(kept)
        os.read(end, 1)
        os._exit(0)
    os.close(end)
    try:
        yield pid
    finally:
        os.close(kept)
        os.waitpid(pid, 0)


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    """Give a target with holes and protected pages, among pages whose every byte tells where it is."""
    rng = np.random.default_rng(1)
    with Area.map(PAGES) as area:
        area.octets[:] = rng.integers(1, 256, area.octets.size, dtype=np.uint8)
        contents = area.octets.copy()
        for page in HOLES:
            area.unmap(page, 1)
            contents[page * PAGE : (page + 1) * PAGE] = 0
        for page in GUARDED:
            area.protect(NONE, page, 1)
        for page in READ_ONLY:
            area.protect(READ, page, 1)
        with child_with(area) as pid:
            yield Target(pid, area, contents)


def of_pages(target: Target, pages: list[int]) -> NDArray[np.uint8]:
    """Return what pages hold, one after the other."""
    return np.concatenate([target.contents[page * PAGE : (page + 1) * PAGE] for page in pages])


def check_read(target: Target, runs: NDArray[np.uint64]) -> None:
    """Read runs, and compare them with what they hold; not a byte beyond may be written here."""
    nbytes = int(runs[:, 1].sum())
    out = np.full(nbytes + 64, 0xEE, np.uint8)
    before = runs.copy()
    read_runs(target.pid, runs, out[:nbytes])
    base = target.area.address
    parts = [target.contents[start - base : start - base + length] for start, length in runs.astype(np.int64).tolist()]
    assert np.array_equal(out[:nbytes], np.concatenate(parts) if parts else np.empty(0, np.uint8))
    assert (out[nbytes:] == 0xEE).all()
    assert np.array_equal(runs, before)


@st.composite
def stretches(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Draw stretches of bytes, in any order and anywhere, as (offset, length)."""
    starts = draw(st.lists(st.integers(0, PAGES * PAGE - 1), max_size=12))
    return [(start, draw(st.integers(1, min(PAGES * PAGE - start, 9 * PAGE)))) for start in starts]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=stretches(), call_bytes=st.sampled_from([1, 3000, PAGE, 3 * PAGE + 1, 1 << 20]))
def test_any_runs_read_what_they_hold(
    monkeypatch: pytest.MonkeyPatch, target: Target, found: list[tuple[int, int]], call_bytes: int
) -> None:
    if call_bytes == 1:
        found = [(start, min(length, 300)) for start, length in found]
    with monkeypatch.context() as patch:
        patch.setattr(reading, "_CALL_BYTES", call_bytes)
        base = target.area.address
        check_read(target, np.array([(base + start, length) for start, length in found], np.uint64).reshape(-1, 2))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pages=st.lists(st.integers(0, PAGES - 1), max_size=60), most=st.sampled_from([1, 2, 1024]))
def test_any_pages_read_what_they_hold(monkeypatch: pytest.MonkeyPatch, target: Target, pages: list[int], most: int) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(reading, "_IOV_MAX", most)
        runs = runs_of(np.array(pages, np.int64), target.area.address, PAGE)
        assert int(runs[:, 1].sum()) == len(pages) * PAGE
        check_read(target, runs)


@pytest.mark.parametrize("page", [*HOLES, *GUARDED, *READ_ONLY, 10])
def test_single_pages(target: Target, page: int) -> None:
    check_read(target, runs_of(np.array([page]), target.area.address, PAGE))


@pytest.mark.parametrize(("first", "last"), [(0, 10), (30, 60), (70, 90), (110, PAGES), (0, PAGES)])
def test_holes_at_the_beginning_in_the_middle_and_at_the_end_of_a_run(target: Target, first: int, last: int) -> None:
    check_read(target, runs_of(np.arange(first, last), target.area.address, PAGE))


def test_more_runs_than_a_call_takes(target: Target) -> None:
    rng = np.random.default_rng(2)
    starts = rng.integers(0, PAGES * PAGE - 64, 5000)
    runs = np.stack([starts + target.area.address, rng.integers(1, 64, 5000)], axis=1).astype(np.uint64)
    check_read(target, runs)


def test_runs_of_pages_in_any_order() -> None:
    runs = runs_of(np.array([5, 6, 7, 9, 8, 3, 4, 4]), 0x7F00_0000_0000, PAGE)
    base = 0x7F00_0000_0000
    expected = [(base + first * PAGE, count * PAGE) for first, count in ((5, 3), (9, 1), (8, 1), (3, 2), (4, 1))]
    assert runs.dtype == np.uint64
    assert runs.tolist() == [list(run) for run in expected]


def test_no_pages_are_no_runs(target: Target) -> None:
    runs = runs_of(np.empty(0, np.int64), target.area.address, PAGE)
    assert runs.shape == (0, 2)
    read_runs(target.pid, runs, np.empty(0, np.uint8))
    write_runs(target.pid, runs, np.empty(0, np.uint8))


def test_a_run_of_no_bytes_is_passed_over(target: Target) -> None:
    address = target.area.address
    check_read(target, np.array([[address, 0], [address + 20 * PAGE, 5], [address, 0], [address + 7, 0]], np.uint64))


def test_huge_pages() -> None:
    try:
        area = Area.map(1, PRIVATE | ANONYMOUS | HUGETLB, page_size=2 << 20)
    except OSError as error:
        pytest.skip(f"no huge pages are free: {error.strerror}")
    with area, child_with(area) as pid:
        # The child's page is the parent's from before: it is copied when one of them writes.
        out = np.ones(2 << 20, np.uint8)
        read_runs(pid, runs_of(np.array([0]), area.address, 2 << 20), out)
        assert not out.any()


def test_what_is_written_is_there_and_nothing_else() -> None:
    rng = np.random.default_rng(3)
    with Area.map(PAGES, SHARED | ANONYMOUS) as area, child_with(area) as pid:
        model = np.zeros(PAGES * PAGE, np.uint8)
        for _ in range(30):
            pages = np.unique(rng.integers(0, PAGES, rng.integers(1, 60)))
            data = rng.integers(0, 256, len(pages) * PAGE, dtype=np.uint8)
            write_runs(pid, runs_of(pages, area.address, PAGE), data)
            model.reshape(PAGES, PAGE)[pages] = data.reshape(-1, PAGE)
            assert np.array_equal(area.octets, model)


def test_protected_pages_are_written_all_the_same() -> None:
    with Area.map(8) as area:
        area.octets[:] = 7
        area.protect(NONE, 2, 1)
        area.protect(READ, 5, 1)
        with child_with(area) as pid:
            data = np.arange(8 * PAGE, dtype=np.uint64).astype(np.uint8)
            runs = runs_of(np.arange(8), area.address, PAGE)
            write_runs(pid, runs, data)
            out = np.empty(8 * PAGE, np.uint8)
            read_runs(pid, runs, out)
            assert np.array_equal(out, data)
        area.protect(READ | WRITE)
        assert (area.octets == 7).all(), "the child's memory is its own"


def test_a_write_to_a_hole_says_where(target: Target) -> None:
    runs = runs_of(np.array([39, 40]), target.area.address, PAGE)
    data = of_pages(target, [39, 39])
    with pytest.raises(DirtyLogError, match=f"{target.area.address + 40 * PAGE:#x}") as caught:
        write_runs(target.pid, runs, data)
    assert caught.value.pid == target.pid


def test_a_process_that_has_ended() -> None:
    with Area.map(2) as area:
        runs = runs_of(np.array([0, 1]), area.address, PAGE)
        child = subprocess.Popen((sys.executable, "-c", _WAIT), stdin=subprocess.PIPE)
        os.kill(child.pid, signal.SIGKILL)
        eventually(lambda: state_of(child.pid) == "Z", "it does not end")
        # First not waited for, then gone.
        for _ in range(2):
            for call in (read_runs, write_runs):
                with pytest.raises(TargetGoneError) as caught:
                    call(child.pid, runs, np.empty(2 * PAGE, np.uint8))
                assert caught.value.pid == child.pid
            child.communicate()


@pytest.mark.parametrize("name", ["open", "pread"])
def test_a_process_that_ends_between_two_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """No zeros may be taken for what it held."""
    with Area.map(4) as area:
        area.octets[:] = 9
        area.protect(NONE, 3, 1)
        with child_with(area) as pid, same_descriptors(os.getpid()):
            call = getattr(os, name)

            def kill_and_call(*arguments: Any) -> Any:
                monkeypatch.undo()
                os.kill(pid, signal.SIGKILL)
                eventually(lambda: state_of(pid) == "Z", "it does not end")
                return call(*arguments)

            monkeypatch.setattr(os, name, kill_and_call)
            with pytest.raises(TargetGoneError):
                read_runs(pid, runs_of(np.arange(4), area.address, PAGE), np.empty(4 * PAGE, np.uint8))


@needs_root
def test_who_may_not_read_is_told_what_would_help() -> None:
    with Area.map(1) as area, child_with(area) as pid:
        command = (sys.executable, "-c", _READ, str(NOBODY), str(pid), str(area.address))
        said = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    for kind, remedy in said:
        assert kind == AccessDeniedError.__name__
        assert "CAP_SYS_PTRACE" in remedy
    assert len(said) == 2

"""What /proc says of threads in system calls: every number as it was written, and lines of any bytes."""

from __future__ import annotations

import contextlib

from hypothesis import example, given
from hypothesis import strategies as st

from dirtylog.errors import DirtyLogError
from dirtylog.linux import preflight, ptrace
from dirtylog.linux.arch import host_architecture
from dirtylog.linux.preflight import threads_by_preference
from dirtylog.linux.ptrace_abi import SystemCall
from test_fuzz_bounds import FUZZED, KIB, U32, U64, bounded
from test_fuzz_proc import PID, ZOMBIE, Process, one_line, proc_tree, processes


def call_line(call: SystemCall) -> bytes:
    numbers = (*call.arguments, call.stack_pointer, call.program_counter)
    return f"{call.number} {' '.join(f'{number:#x}' for number in numbers)}\n".encode()


system_calls = st.builds(SystemCall, st.integers(-1, 600) | U32, st.tuples(*[U64] * 6), U64, U64)


@FUZZED
@given(call=system_calls)
def test_a_system_call_that_is_slept_in_is_read_as_it_was_written(call: SystemCall) -> None:
    with proc_tree({f"proc/{PID}/task/{PID}/syscall": call_line(call)}, ptrace), bounded(64 * KIB):
        assert ptrace._sleeps_in(PID, PID) == call


@FUZZED
@given(line=st.sampled_from([b"running\n", b"-1 0x7ffd0 0x7f00\n", b"", b"-1 0x0 0x0\n"]))
def test_a_thread_that_sleeps_in_no_system_call_sleeps_in_none(line: bytes) -> None:
    with proc_tree({f"proc/{PID}/task/{PID}/syscall": line}, ptrace):
        assert ptrace._sleeps_in(PID, PID) is None


@FUZZED
@given(
    threads=st.dictionaries(
        st.integers(1, 1 << 22),
        st.tuples(processes(one_line), st.sampled_from([b"running\n", b"-1 0x1 0x2\n"]) | system_calls.map(call_line)),
        max_size=5,
    )
)
def test_every_thread_that_can_be_stopped_is_ranked(threads: dict[int, tuple[Process, bytes]]) -> None:
    files = {f"proc/{PID}/task/.keep/x": b""}
    for tid, (process, line) in threads.items():
        files |= {f"proc/{PID}/task/{tid}/status": process.status(), f"proc/{PID}/task/{tid}/syscall": line}
    del files[f"proc/{PID}/task/.keep/x"]
    if threads:
        with proc_tree(files, preflight), bounded(256 * KIB):
            found = threads_by_preference(PID, host_architecture())
        assert sorted(found) == sorted(tid for tid, (process, _) in threads.items() if process.state not in "DZXx")


# --- lines that the kernel would not write

broken_line = st.binary(max_size=100) | st.builds(
    lambda *words: " ".join(words).encode(), *[st.sampled_from(["0x1", "z", "-", ""])] * 9
)


@FUZZED
@given(line=broken_line)
@example(line=b"1 2 3 4 5 6 7 8 z")
def test_a_system_call_of_any_bytes_is_one_or_none(line: bytes) -> None:
    with proc_tree({f"proc/{PID}/task/{PID}/syscall": line}, ptrace), bounded(64 * KIB), contextlib.suppress(DirtyLogError):
        ptrace._sleeps_in(PID, PID)


@FUZZED
@given(line=broken_line)
@example(line=b"")
def test_threads_are_ranked_whatever_their_system_calls_are(line: bytes) -> None:
    process = ZOMBIE._replace(name=b"x", state="S")
    files = {f"proc/{PID}/task/{PID}/status": process.status(), f"proc/{PID}/task/{PID}/syscall": line}
    with proc_tree(files, preflight), bounded(64 * KIB), contextlib.suppress(DirtyLogError):
        threads_by_preference(PID, host_architecture())

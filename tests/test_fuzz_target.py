"""Numbers that come out of another process: its memory, its registers, how it stopped, and what it sends as its own agent."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import example, given, settings
from hypothesis import strategies as st

from dirtylog.errors import DirtyLogError, UnsupportedError
from dirtylog.linux.agents import address_of, ask_agent
from dirtylog.linux.arch.x86_64 import _extended_state
from dirtylog.linux.call_window import _in_critical_section
from dirtylog.linux.ptrace_abi import Event, stop_of
from test_fuzz_bounds import FUZZED, KIB, U32, U64, bounded

if TYPE_CHECKING:
    from dirtylog.linux.userfaultfd import Userfaultfd

AREA = 64
"""Where the test's memory has the thread's struct rseq; the descriptor of the section is behind it."""
_LARGEST_OFFSET = (1 << 63) - 1


def in_section(pointer: int, start: int, length: int, counter: int) -> bool:
    """Return what is said of a thread whose memory has these numbers."""
    fd = os.memfd_create("memory")
    try:
        os.pwrite(fd, struct.pack("=Q", pointer), AREA + 8)
        os.pwrite(fd, struct.pack("=IIQQQ", 0, 0, start, length, 0), AREA + 32)
        with bounded(16 * KIB):
            return _in_critical_section(fd, AREA, counter)
    finally:
        os.close(fd)


@FUZZED
@given(start=U64, length=U64, counter=U64)
def test_any_section_holds_the_addresses_from_its_start_on(start: int, length: int, counter: int) -> None:
    assert in_section(AREA + 32, start, length, counter) == (start <= counter < start + length)


@FUZZED
@given(pointer=st.integers(0, _LARGEST_OFFSET - 24) | U64.filter(lambda value: value <= _LARGEST_OFFSET - 24), counter=U64)
def test_any_pointer_to_a_section_is_one_or_none(pointer: int, counter: int) -> None:
    """Behind the end of memory nothing can be read, and nothing is a section of no length."""
    assert in_section(pointer, 0, 0, counter) in (False, True)


@FUZZED
@given(pointer=st.integers(_LARGEST_OFFSET - 23, (1 << 64) - 1), counter=U64)
@example(pointer=1 << 63, counter=0)
def test_a_pointer_of_the_kernel_s_half_is_no_section(pointer: int, counter: int) -> None:
    assert in_section(pointer, 0, 0, counter) is False


@FUZZED
@given(data=st.binary(max_size=4096), nbytes=st.integers(0, 12 * KIB))
def test_an_extended_state_of_any_bytes_becomes_a_frame_or_is_refused(data: bytes, nbytes: int) -> None:
    """A frame is the state with its software's bytes and a word behind it."""
    state = data[:nbytes].ljust(nbytes, b"\x5a")
    with bounded(4 * nbytes + 16 * KIB):
        try:
            frame = _extended_state(state, 1)
        except UnsupportedError:
            return
    assert frame[:464] == state[:464]
    size = struct.unpack_from("=I", frame, 464 + 16)[0]
    assert len(frame) == size + 4 <= nbytes + 4
    assert frame[512:size] == state[512:size]


@FUZZED
@given(
    status=st.integers(-(1 << 31), (1 << 31) - 1) | U32 | st.builds(lambda event, sig: event << 8 | sig, *[st.integers(0, 255)] * 2)
)
def test_any_status_of_a_stop_is_a_stop(status: int) -> None:
    stop = stop_of(status)
    assert stop.event in Event
    assert stop.signal == status & 0xFF


# --- an agent that sends anything


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def answered_with(message: bytes, fds: list[int]) -> Userfaultfd | None:
    """Ask an agent that answers so. It is this process itself, for nobody else would be believed."""

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            connection.sendmsg([message], ancillary)

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address_of(os.getpid()))
        listener.listen()
        agent = threading.Thread(target=answer)
        agent.start()
        try:
            return ask_agent(os.getpid())
        finally:
            agent.join()


greetings = st.sampled_from([b"dirtylog-agent 1", b"dirtylog-agent 2", b"dirtylog-agent 1\0", b"dirtylog-agent 1" * 100, b""])


@settings(FUZZED, max_examples=60)
@given(message=greetings | st.binary(max_size=200), kinds=st.lists(st.sampled_from(["pipe", "file"]), max_size=3))
@example(message=b"dirtylog-agent 1", kinds=["pipe"])
def test_an_agent_that_sends_anything_is_none_and_leaves_no_descriptor(message: bytes, kinds: list[str]) -> None:
    before = descriptors()
    fds: list[int] = []
    for kind in kinds:
        fds += os.pipe() if kind == "pipe" else [os.open("/dev/null", os.O_RDONLY)]
    try:
        assert answered_with(message, fds) is None
    except DirtyLogError:
        assert message == b"dirtylog-agent 1", "it said that it is one"
        assert fds
    finally:
        for fd in fds:
            os.close(fd)
    assert descriptors() == before


def test_an_agent_that_sends_a_directory_is_none() -> None:
    fd = os.open("/", os.O_RDONLY)
    before = descriptors()
    try:
        assert answered_with(b"dirtylog-agent 1", [fd]) is None
    finally:
        left = descriptors() - before
        os.close(fd)
        for name in left:
            with contextlib.suppress(OSError):
                os.close(int(name))
    assert not left

"""What /proc says of rings of io_uring: their registered buffers, whatever files are registered too, and files of any bytes."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dirtylog.linux import pins, preflight
from dirtylog.linux.pins import pins_of
from test_fuzz_bounds import FUZZED, KIB, MIB, U32, U64, bounded
from test_fuzz_proc import PID, ZOMBIE, proc_tree

buffers = st.lists(st.tuples(U64, st.integers(1, 1 << 30) | U32), max_size=6)


def fdinfo(found: list[tuple[int, int]], file: bytes = b"/x") -> bytes:
    """Return what the kernel says of a ring of io_uring (io_uring/fdinfo.c); a name there has no space, newline or backslash."""
    escaped = b"".join(b"\\%03o" % octet if octet in b" \t\n\\" else bytes([octet]) for octet in file)
    lines = b"".join(b"%5d: 0x%x/%d\n" % (number, *one) for number, one in enumerate(found))
    head = b"pos:\t0\nflags:\t02000002\nSqMask:\t0x7\nUserFiles:\t1\n    0: %s\nUserBufs:\t%d\n" % (escaped, len(found))
    return head + lines + b"PollList:\n  op=22, task_works=0\nCqOverflowList:\n"


names = st.sampled_from([b"/UserBufs:", b"/a\r    1: 0x1000/4096", b"/\xff", b"/ 0: 0x1/1\n 0: 0x1/1"]) | st.binary(max_size=20)


@FUZZED
@given(found=buffers, name=names, pinned=st.integers(1, 1 << 40))
def test_registered_buffers_are_read_as_they_were_written_whatever_file_is_registered(
    found: list[tuple[int, int]], name: bytes, pinned: int
) -> None:
    text = fdinfo(found, name)
    status = ZOMBIE._replace(name=b"x", state="S", memory_kb=1, pinned_kb=pinned).status()
    files = {f"proc/{PID}/fdinfo/3": text, f"proc/{PID}/fdinfo/4": b"pos:\t0\n", f"proc/{PID}/status": status}
    with proc_tree(files, preflight, pins), bounded(32 * (len(text) + len(status)) + 64 * KIB):
        pinned_there = pins_of(PID)
    assert pinned_there.ranges == tuple(sorted(set(found)))
    pages = sum(-(-(address + nbytes) // 4096) - address // 4096 for address, nbytes in set(found))
    assert pinned_there.unexplained == max(0, (pinned << 10) - 4096 * pages)


def buffers_in() -> list[tuple[int, int]]:
    """Return the buffers of the file that the tree has at its root."""
    path: Any = vars(pins)["Path"]
    return pins._buffers(path("/fdinfo"))


@FUZZED
@given(text=st.binary(max_size=2 * KIB) | st.builds(lambda rest: b"UserBufs:" + rest, st.binary(max_size=300)))
def test_an_fdinfo_of_any_bytes_is_read(text: bytes) -> None:
    with proc_tree({"fdinfo": text}, pins), bounded(64 * len(text) + 64 * KIB):
        for address, nbytes in buffers_in():
            assert address >= 0
            assert nbytes >= 0


def test_a_buffer_of_too_many_digits_is_none() -> None:
    with proc_tree({"fdinfo": b"UserBufs:\t1\n    0: 0x1000/" + b"9" * 5000 + b"\n"}, pins):
        buffers_in()


def test_empty_lines_take_no_longer_than_others() -> None:
    with proc_tree({"fdinfo": b"UserBufs:\n" + b"\n" * 64 * KIB}, pins), bounded(8 * MIB, seconds=1.0):
        buffers_in()

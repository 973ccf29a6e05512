"""Files of /proc about processes: what the kernel writes into them whatever a process calls itself, and files of any bytes.

A process chooses its name: 15 octets, of which the kernel escapes none in stat, and newlines and backslashes only in status.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dirtylog.errors import DirtyLogError
from dirtylog.linux import availability, call_window, preflight
from dirtylog.linux.preflight import Status, read_status
from test_fuzz_bounds import FUZZED, KIB, U32, U64, bounded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

PID = 7
LINE_ENDS = ("\r", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029")
"""What str.splitlines takes for the end of a line, and the kernel for part of a name."""


@contextlib.contextmanager
def proc_tree(files: dict[str, bytes], *modules: ModuleType) -> Iterator[None]:
    """Let these modules find these files, by their names below the root, and nothing else."""
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        for name, contents in files.items():
            path = Path(root, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents)
        for module in modules:
            stack.enter_context(patch.object(module, "Path", lambda name: Path(f"{root}{name}")))
        yield


class Process(NamedTuple):
    """What the kernel has to say of a process."""

    name: bytes
    state: str
    tracer: int
    memory_kb: int | None
    """None: it has no memory (any more)."""
    pinned_kb: int
    shadow_stack: bool
    seccomp: int
    threads: int
    signals: tuple[int, ...]

    def status(self) -> bytes:
        """Return its status as Linux 6.12 writes it (fs/proc/array.c)."""
        name = self.name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")
        lines = ["Umask:\t0022", f"State:\t{self.state} (of some kind)", f"Tgid:\t{PID}", "Ngid:\t0", f"Pid:\t{PID}", "PPid:\t1"]
        lines += [f"TracerPid:\t{self.tracer}", "Uid:\t0\t0\t0\t0", "FDSize:\t64", "Groups:\t0 20 "]
        if self.memory_kb is not None:
            lines += [f"VmRSS:\t{self.memory_kb:8d} kB", f"VmSwap:\t{self.pinned_kb:8d} kB"]
            lines += [f"VmPeak:\t{self.memory_kb:8d} kB", f"VmSize:\t{self.memory_kb:8d} kB", f"VmPin:\t{self.pinned_kb:8d} kB"]
        lines += [f"Threads:\t{self.threads}", "SigQ:\t1/96000"]
        masks = zip(("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt"), self.signals, strict=True)
        lines += [f"{key}:\t{mask:016x}" for key, mask in masks]
        lines += [f"CapEff:\t{self.signals[0]:016x}", f"Seccomp:\t{self.seccomp}"]
        lines += [f"x86_Thread_features:\t{'shstk ' if self.shadow_stack else ''}", "Mems_allowed:\t00000000,00000001"]
        return b"Name:\t" + name + b"\n" + "\n".join(lines).encode() + b"\n"

    def expected(self) -> Status:
        """Return what is to be read from it."""
        pinned = 0 if self.memory_kb is None else self.pinned_kb << 10
        has_memory = self.memory_kb is not None
        held = 0 if self.memory_kb is None else (self.memory_kb + self.pinned_kb) << 10
        return Status(self.state, self.tracer, self.seccomp != 0, has_memory, pinned, self.shadow_stack, self.threads, PID, held)


def is_one_line(name: bytes) -> bool:
    return not any(end in name.decode("utf-8", "replace") for end in LINE_ENDS)


_FORGED = [
    f"{end}{key}:{rest}".encode()
    for end in ("\r", "\v", "\u2028")
    for key in ("State", "VmPin", "VmSize", "SigPnd", "Threads")
    for rest in ("", "\tz", "1")
]
any_name = st.binary(max_size=15) | st.sampled_from([*_FORGED, b"a) R 1", b") (", b"Tgid:\t1", b"\\", b"\n"])
one_line = any_name.map(lambda name: name.replace(b"\0", b"")).filter(is_one_line)


def processes(name: st.SearchStrategy[bytes]) -> st.SearchStrategy[Process]:
    return st.builds(
        Process,
        name,
        st.sampled_from("RSDZXTtI"),
        st.integers(0, 1 << 22),
        st.none() | U64,
        st.integers(0, 1 << 54),
        st.booleans(),
        st.integers(0, 2),
        st.integers(1, 1 << 22),
        st.tuples(*[U64] * 5),
    )


ZOMBIE = Process(b"\rVmPin:", "Z", 0, None, 0, shadow_stack=False, seccomp=0, threads=1, signals=(0,) * 5)
NAMED_LIKE_A_MASK = ZOMBIE._replace(name=b"\rSigPnd:\tz", state="S", memory_kb=1)


def status_of(process: Process) -> Status:
    text = process.status()
    with proc_tree({f"proc/{PID}/status": text}, preflight), bounded(32 * len(text) + 64 * KIB):
        return read_status(PID)


@FUZZED
@given(process=processes(one_line))
def test_a_status_says_what_the_kernel_says_whatever_the_name(process: Process) -> None:
    assert status_of(process) == process.expected()


@FUZZED
@given(process=processes(any_name))
@example(process=ZOMBIE)
@example(process=ZOMBIE._replace(name=b"\rVmSize:1"))
def test_a_status_says_what_the_kernel_says_whatever_line_ends_are_in_the_name(process: Process) -> None:
    assert status_of(process) == process.expected()


def masks_of(process: Process) -> dict[str, int]:
    class Named:
        pid = tid = PID

    with proc_tree({f"proc/{PID}/task/{PID}/status": process.status()}, call_window):
        tracee: Any = Named()
        return call_window._signals(tracee)


@FUZZED
@given(process=processes(one_line))
def test_the_signals_of_a_thread_are_the_kernel_s_whatever_its_name(process: Process) -> None:
    assert tuple(masks_of(process).values()) == process.signals


@FUZZED
@given(process=processes(any_name))
@example(process=NAMED_LIKE_A_MASK)
def test_the_signals_of_a_thread_are_the_kernel_s_whatever_line_ends_are_in_its_name(process: Process) -> None:
    assert tuple(masks_of(process)[key] for key in ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt")) == process.signals


@pytest.mark.parametrize("name", [b"\rCapEff:", b"\rCapEff:\tz"])
def test_the_capabilities_are_the_kernel_s_whatever_the_name(name: bytes) -> None:
    process = ZOMBIE._replace(name=name, signals=(5, 0, 0, 0, 0))
    with proc_tree({"proc/self/status": process.status()}, availability):
        assert availability._capabilities() == 5


@FUZZED
@given(name=any_name, flags=U32, start=U64)
def test_a_thread_of_the_kernel_is_known_by_its_flags_whatever_its_name(name: bytes, flags: int, start: int) -> None:
    text = b"%d (%s) S 2 0 0 0 -1 %d 0 0 0 0 0 0 0 0 20 0 1 0 %d 0\n" % (PID, name, flags, start)
    with proc_tree({f"proc/{PID}/stat": text}, preflight), bounded(16 * len(text) + 64 * KIB):
        assert preflight._is_of_the_kernel(PID) == bool(flags & 0x200000)


# --- files that the kernel would not write

broken_status = st.binary(max_size=200) | st.builds(
    lambda key, value: f"Name:\tx\nState:\tS\n{key}:{value}\n".encode(),
    st.sampled_from(["TracerPid", "VmPin", "Threads", "Tgid"]),
    st.sampled_from(["", "\t", "\t-1", "\t1.5", "\t" + "9" * 5000, "\tz kB", "\t0x10"]),
)
UNTYPED = (IndexError, ValueError)
NO_TYPE = "a number that cannot be read is passed on as a ValueError or IndexError"


@FUZZED
@given(text=broken_status)
@example(text=b"VmPin:")
def test_a_status_of_any_bytes_is_one_or_an_error_of_ours(text: bytes) -> None:
    with proc_tree({f"proc/{PID}/status": text}, preflight), bounded(32 * len(text) + 64 * KIB), contextlib.suppress(DirtyLogError):
        assert isinstance(read_status(PID), Status)


@FUZZED
@given(text=st.binary(max_size=100))
@example(text=b"7 (x) S 1")
def test_a_stat_of_any_bytes_tells_or_is_an_error_of_ours(text: bytes) -> None:
    with proc_tree({f"proc/{PID}/stat": text}, preflight), bounded(16 * len(text) + 64 * KIB), contextlib.suppress(DirtyLogError):
        preflight._is_of_the_kernel(PID)

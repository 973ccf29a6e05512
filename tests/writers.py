"""Programs that write where a test tells them to (writer.c, compiled when it is first wanted), and dirtylog run on them."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import pytest

from victims import SOON, tracer_of, watched_mappings

if TYPE_CHECKING:
    from collections.abc import Callable

    from dirtylog import DirtyBitmap, MemorySlot

PAGE = 4096
NPAGES = 256
ARENA = 0x10000000000
ARENA_MAP = f"{ARENA:#x}-{ARENA + NPAGES * PAGE:#x}"
SHARED = 0x20000000000
SHARED_MAP = f"{SHARED:#x}-{SHARED + 4 * PAGE:#x}"
EARLY_PAGE = 255
_SOURCE = Path(__file__).with_name("writer.c")


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="dirtylog-writer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    folder.chmod(0o755)
    return folder


@functools.cache
def compiled(source: str, name: str, *flags: str) -> str:
    """Return the path of a program compiled from C; skip the test where that cannot be."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    target = _folder() / name
    command = (compiler, "-O2", "-pthread", "-w", *flags, "-x", "c", "-", "-o", str(target))
    made = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"cannot compile with {' '.join(flags)}: {made.stderr.splitlines()[0]}")
    return str(target)


def writer(*flags: str) -> str:
    """Return the path of the program."""
    return compiled(_SOURCE.read_text(encoding="ascii"), "-".join(("writer", *(flag.strip("-") for flag in flags))), *flags)


class Writer:
    """A running writer that obeys. On exit of the context it must be well and end well, unless the test has ended it."""

    def __init__(self, *words: str, user: int | None = None, flags: tuple[str, ...] = ()) -> None:
        self.process = subprocess.Popen(
            (writer(*flags), *words, "obey"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            user=user,
            group=user,
            extra_groups=None if user is None else (),
        )
        self.pid = self.process.pid
        self._buffer = b""
        assert self.line() == "ready"

    def line(self) -> str:
        """Return the next line that it says; fail when it ends or hangs instead."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + SOON
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the writer says nothing: {Path(f'/proc/{self.pid}/status').read_text(encoding='ascii')}"
            said = os.read(self.process.stdout.fileno(), 1 << 16)
            assert said, f"the writer ended: {self.process.wait()}"
            self._buffer += said
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def order(self, text: str) -> None:
        """Have it do something, and wait until it has."""
        self.say(text)
        while self.line() != "ok":
            continue

    def say(self, text: str) -> None:
        """Tell it to do something."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode() + b"\n")

    def check_unharmed(self) -> None:
        """Require that it obeys, that nobody traces it, and that nobody watches its memory."""
        self.order("store 0")
        assert tracer_of(self.pid) == 0
        assert watched_mappings(self.pid) == 0

    def end(self) -> int:
        """End its input, and return its exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(SOON)

    def kill(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait(SOON)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self.process.poll() is None:
                self.check_unharmed()
                assert self.end() == 0
        finally:
            self.kill()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()


class Ran(NamedTuple):
    """How dirtylog ended, and what it said."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """What ``--json`` printed: the last line, for a command may say something, too."""
        return json.loads(self.out.splitlines()[-1])

    @property
    def lines(self) -> list[Any]:
        """What ``--jsonl`` printed."""
        return [json.loads(line) for line in self.out.splitlines() if line.startswith("{")]


def command_line(*arguments: str) -> tuple[str, ...]:
    """Return dirtylog's command line."""
    return (sys.executable, "-m", "dirtylog", *arguments)


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Start dirtylog; :func:`finish` it."""
    return subprocess.Popen(command_line(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finish(process: subprocess.Popen[str], seconds: float = 60.0) -> Ran:
    """Wait for dirtylog to end. It shows no traceback, ever."""
    try:
        out, err = process.communicate(timeout=seconds)
    except BaseException:
        process.kill()
        raise
    assert "Traceback" not in err, err
    assert "Error:" not in err, err
    return Ran(process.returncode, out, err)


def dirtylog(*arguments: str, seconds: float = 60.0, **options: Any) -> Ran:
    """Run dirtylog."""
    return finish(start(*arguments, **options), seconds)


def run_in_process_of(uid: int, *arguments: str) -> Ran:
    """Run dirtylog as another user, who may not have read access to Python's own files."""
    program = (
        "import os, sys, dirtylog.cli, dirtylog.linux.launch, dirtylog.linux.process, encodings.ascii\n"
        f"os.setgroups([]); os.setresgid({uid}, {uid}, {uid}); os.setresuid({uid}, {uid}, {uid})\n"
        "sys.exit(dirtylog.cli.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        (sys.executable, "-c", program, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/"
    )
    return finish(process)


def arena_pages(found: Any, start: int = ARENA, npages: int = NPAGES) -> set[int]:
    """Return the pages of the arena that a round of ``--json`` reports."""
    base = start // PAGE
    pages = {page - base for first, count in found["runs"] for page in range(first, first + count)}
    return {page for page in pages if 0 <= page < npages}


def pages_in_arena(dirty: dict[MemorySlot, DirtyBitmap]) -> set[int]:
    """Return the pages of the arena that a round reports, or all gets of one."""
    found: set[int] = set()
    for slot, bitmap in dirty.items():
        offset = (slot.host_address - ARENA) // PAGE
        found |= {page + offset for page in bitmap.pages().tolist() if 0 <= page + offset < NPAGES}
    return found


def eventually(true: Callable[[], bool], what: str, seconds: float = SOON) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def is_gone(pid: int) -> bool:
    """Return whether a process has ended, or waits only for its parent to ask."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return True
    return text.rpartition(")")[2].split()[0] in "ZX"


def children() -> set[int]:
    """Return the children of this process."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):
            found |= {int(word) for word in (task / "children").read_text(encoding="ascii").split()}
    return found

"""Python programs that do what a test says, with and without an agent."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Self

from victims import SOON

if TYPE_CHECKING:
    from collections.abc import Callable

    from dirtylog import DirtyLog

PAGE = 4096
NPAGES = 64
# It does what each line says, in Python, and answers with one line. `store` is for the lines, and `area` is its memory.
WITHOUT_AGENT = """\
import ctypes, mmap, os, socket, sys, threading, time
area = mmap.mmap(-1, 64 * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
address = ctypes.addressof(ctypes.c_char.from_buffer(area))
def store(*pages):
    for page in pages:
        area[page * 4096] = (area[page * 4096] + 1) % 256
store(*range(64))
print("ready", hex(address), flush=True)
for line in sys.stdin:
    try:
        exec(line)
        print("ok", flush=True)
    except BaseException as error:
        print("failed", repr(error), flush=True)
"""
WITH_AGENT = f"import dirtylog.agent\n{WITHOUT_AGENT}"


class Agented:
    """A running Python program that does what it is told."""

    def __init__(
        self,
        program: str = WITH_AGENT,
        *,
        before: tuple[str, ...] = (),
        user: int | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.process = subprocess.Popen(
            (sys.executable, *before, *(() if before else ("-c", program))),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            user=user,
            group=user,
            extra_groups=None if user is None else (),
            preexec_fn=prepare,  # noqa: PLW1509 - it makes system calls only
        )
        self.pid = self.process.pid
        self._buffer = b""
        word, address = self.line().split()
        assert word == "ready"
        self.address = int(address, 16)

    @property
    def map(self) -> str:
        """Its area, as a range of addresses."""
        return f"{self.address:#x}-{self.address + NPAGES * PAGE:#x}"

    def say(self, line: str) -> None:
        """Tell it to do something."""
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")

    def order(self, line: str) -> None:
        """Have it do something, and require that it can."""
        self.say(line)
        answer = self.line()
        assert answer == "ok", answer

    def ask(self, expression: str) -> str:
        """Return what an expression is there."""
        self.say(f"print(repr({expression}), flush=True)")
        answer = self.line()
        assert self.line() == "ok"
        return answer

    def line(self) -> str:
        """Return the next line that it says; fail when it ends or hangs instead."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + SOON
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "it says nothing"
            said = os.read(self.process.stdout.fileno(), 1 << 16)
            assert said, f"it ended: {self.process.wait()}, {self.errors()}"
            self._buffer += said
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.decode()

    def errors(self) -> str:
        """End it, and return what it said on its standard error."""
        assert self.process.stdin is not None
        assert self.process.stderr is not None
        self.process.stdin.close()
        try:
            self.process.wait(SOON)
        finally:
            self.process.kill()
        return self.process.stderr.read().decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self.process.poll() is None:
                assert self.errors() == ""
                assert self.process.returncode == 0
        finally:
            self.process.kill()
            self.process.wait(SOON)
            for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
                if pipe is not None:
                    pipe.close()


def written(log: DirtyLog, target: Agented) -> set[int]:
    """Return the pages of a target's area that a get of every slot reports."""
    log.update()
    found: set[int] = set()
    for slot in log.memory.slots:
        offset = (slot.host_address - target.address) // PAGE
        found |= {page + offset for page in log.get(slot.id).pages().tolist()}
    return {page for page in found if 0 <= page < NPAGES}

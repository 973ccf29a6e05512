"""Marks in a recording: lines that a user types, that anybody writes into a named pipe, or that a guest writes to an I/O port."""

from __future__ import annotations

import contextlib
import os
import selectors
import stat
import sys
import threading
from typing import TYPE_CHECKING, Self

from dirtylog.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from dirtylog.kvm.bus import BusAccess

GUEST_PORT = 0xE9
"""The I/O port that emulators have for a guest's messages since Bochs: each octet written is a character."""
_LONGEST = 1000
_READ = 1 << 16


class Lines:
    """Gathers octets into lines, and tells of each that is not blank. A line too long is cut."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._line = b""

    def add(self, data: bytes) -> None:
        """Add some octets."""
        *lines, rest = (self._line + data).split(b"\n")
        self._line = rest[:_LONGEST]
        for line in lines:
            text = line[:_LONGEST].decode("utf-8", "replace").strip()
            if text:
                self._tell(text)


class GuestMarks:
    """What answers :data:`GUEST_PORT`: a line that a vCPU writes there is a mark."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._lines: dict[int, Lines] = {}

    def __call__(self, access: BusAccess) -> bytes | None:
        """Take a write; a read answers with the port's number, which says that something listens. Called by the bus."""
        if not access.is_write:
            return bytes([GUEST_PORT])
        self._lines.setdefault(access.vcpu, Lines(self._tell)).add(access.data)
        return None


class WrittenMarks:
    """Reads lines from a named pipe, which is made if it is not there, and from the terminal; a context manager.

    A thread reads them, so that a get waits for nobody who types.
    """

    def __init__(self, tell: Callable[[str], None], *, pipe: Path | None, terminal: bool) -> None:
        self._tell = tell
        self._made: Path | None = None
        self._selector = selectors.DefaultSelector()
        self._stop, self._stopper = os.pipe()
        self._selector.register(self._stop, selectors.EVENT_READ)
        self._pipe = None if pipe is None else self._open(pipe)
        if self._pipe is not None:
            self._selector.register(self._pipe, selectors.EVENT_READ, Lines(tell))
        if terminal and sys.stdin is not None and sys.stdin.isatty():
            self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ, Lines(tell))
        self._thread = threading.Thread(target=self._read, name="marks", daemon=True)

    def _open(self, path: Path) -> int:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkfifo(path, 0o600)
                self._made = path
            # For writing too: otherwise it would end with its first writer.
            descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise InvalidArgumentError(f"{str(path)!r} cannot be read for marks", reason=error.strerror) from error
        if not stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InvalidArgumentError(
                f"{str(path)!r} is no named pipe", remedy="name one, or a file that is not there: it is made"
            )
        return descriptor

    def _read(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                # A program in the background that reads from its terminal is stopped.
                if key.fd != self._pipe and os.tcgetpgrp(key.fd) != os.getpgrp():
                    self._selector.unregister(key.fd)
                    continue
                data = b""
                with contextlib.suppress(BlockingIOError):
                    data = os.read(key.fd, _READ)
                if data:
                    key.data.add(data)
                elif key.fd != self._pipe:
                    self._selector.unregister(key.fd)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._stopper)
        self._thread.join()
        self._selector.close()
        os.close(self._stop)
        if self._pipe is not None:
            os.close(self._pipe)
        if self._made is not None:
            self._made.unlink(missing_ok=True)

"""The guests' store loop in the memory of processes, under the guests' signature: in a buffer of this one, and in another."""

from __future__ import annotations

import ctypes
import functools
import select
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dirtylog
from dirtylog.buffers.memory import BUFFER_SLOT, BufferMemory
from dirtylog.guests.programs import Pattern, patterns
from dirtylog.linux.process import ProcessMemory
from dirtylog.options import ProcessOptions, ProcessPorts
from uffd_here import missing_uffd_here

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dirtylog import MemorySlot

_SOURCE = Path(__file__).with_name("store_guest.c")
_COMPILER = shutil.which("gcc") or shutil.which("cc")


def missing_store_guests(port: str) -> str | None:
    """Return what keeps this machine from having them, or None."""
    if _COMPILER is None:
        return "no C compiler"
    return missing_uffd_here() if port == "uffd" else None


@dataclass(frozen=True, slots=True)
class NoStats:
    """Nothing is counted."""


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def _compiled(*options: str) -> Path:
    assert _COMPILER is not None
    path = Path(_folder().name) / f"guest{len(options)}{options[0].strip('-')}"
    subprocess.run([_COMPILER, "-O2", "-pthread", *options, "-o", path, _SOURCE], check=True)
    return path


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_compiled("-shared", "-fPIC")))
    library.crew_start.restype = ctypes.c_void_p
    library.crew_start.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long)
    library.crew_unfinished.restype = ctypes.c_long
    for name in ("crew_resume", "crew_pause", "crew_unfinished"):
        getattr(library, name).argtypes = (ctypes.c_void_p,)
    library.crew_end.argtypes = (ctypes.c_void_p, ctypes.c_long)
    return library


class BufferGuest(BufferMemory):
    """Threads of this process that store to a buffer of its own, without Python's lock."""

    def __init__(self, port: str, npages: int, loops: Sequence[Pattern]) -> None:
        self.octets = dirtylog.empty(npages << 12, np.uint8)
        super().__init__(self.octets, port=port)
        self.vcpus = list(loops)
        self.stats = NoStats()
        registers = np.array([loop.registers() for loop in loops], np.uint64)
        self._crew: int | None = _library().crew_start(self.octets.ctypes.data, registers.ctypes.data, len(loops))

    def contents(self, slot: MemorySlot) -> NDArray[np.uint8]:
        assert slot.id == BUFFER_SLOT
        return self.octets.reshape(-1, 4096)

    def pause(self) -> None:
        _library().crew_pause(self._crew)

    def resume(self) -> None:
        _library().crew_resume(self._crew)

    def wait(self, timeout: float) -> bool:
        end = time.monotonic() + timeout
        while _library().crew_unfinished(self._crew):
            if time.monotonic() > end:
                return False
            time.sleep(0.001)
        return True

    def check(self) -> None:
        pass

    def close(self) -> None:
        if self._crew is not None:
            _library().crew_end(self._crew, len(self.vcpus))
            self._crew = None
        super().close()


class ProcessGuest(ProcessMemory):
    """Another process whose threads store to a mapping of theirs, the only one that is logged: slot 0."""

    def __init__(self, port: str, npages: int, loops: Sequence[Pattern]) -> None:
        self.vcpus = list(loops)
        self._npages = npages
        words = [str(value) for loop in loops for value in loop.registers()]
        self._program = subprocess.Popen(
            [_compiled("-DPROGRAM"), str(npages), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        try:
            assert self._program.stdout is not None
            start = int(self._program.stdout.readline(), 16)
            options = ProcessOptions(ProcessPorts(port), (f"{start:#x}-{start + (npages << 12):#x}",))
            super().__init__(self._program.pid, options)
        except BaseException:
            self._end()
            raise

    def contents(self, slot: MemorySlot) -> NDArray[np.uint8]:
        return self.read(slot.id, np.arange(self._npages))

    def resume(self) -> None:
        assert self._program.stdin is not None
        if not self._begun:
            self._program.stdin.write(b"g")
            self._begun = True
        super().resume()

    _begun = False

    def wait(self, timeout: float) -> bool:
        assert self._program.stdout is not None
        if not select.select([self._program.stdout], [], [], timeout)[0]:
            return False
        assert self._program.stdout.readline() == b"done\n"
        return True

    def check(self) -> None:
        self.check_alive()

    def close(self) -> None:
        super().close()
        self._end()

    def _end(self) -> None:
        self._program.kill()
        self._program.wait()
        for stream in (self._program.stdin, self._program.stdout):
            assert stream is not None
            stream.close()


def make_store_guest(
    name: str, nbytes: int, *, program: str = "sweep", vcpus: int = 1, loops: Sequence[Pattern] | None = None, **_: Any
) -> BufferGuest | ProcessGuest:
    """Return a paused guest: "buffer" or "process", and its port."""
    kind, _dash, port = name.partition("-")
    chosen = patterns(program, nbytes >> 12, vcpus) if loops is None else loops[:vcpus]
    return (BufferGuest if kind == "buffer" else ProcessGuest)(port, nbytes >> 12, chosen)


def needs_store_guests(name: str) -> pytest.MarkDecorator:
    """Return the mark that skips where there can be none."""
    reason = missing_store_guests(name.partition("-")[2])
    return pytest.mark.skipif(reason is not None, reason=reason or "")

"""Runs a function in a child of this process, and looks at each system call that changes files: to record, fail or end it.

By ptrace(2): the child stops at the entry and at the exit of every system call. One that is ended at an entry does not make it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import struct
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

_TRACEME, _POKEUSER, _SYSCALL, _SETOPTIONS, _GET_SYSCALL_INFO = 0, 6, 24, 0x4200, 0x420E
_OPTIONS = 1 | 1 << 20  # PTRACE_O_TRACESYSGOOD, PTRACE_O_EXITKILL
_SYSCALL_STOP = signal.SIGTRAP | 0x80
_ENTRY = 1  # PTRACE_SYSCALL_INFO_ENTRY
_RAX, _RDX, _ORIG_RAX = 80, 96, 120  # where user_regs_struct has them
_O_CREAT, _O_TRUNC = os.O_CREAT, os.O_TRUNC

_BY_DESCRIPTOR = {1: "write", 18: "pwrite64", 20: "writev", 40: "sendfile", 74: "fsync", 75: "fdatasync", 77: "ftruncate"}
_BY_DESCRIPTOR |= {285: "fallocate", 296: "pwritev", 326: "copy_file_range", 328: "pwritev2"}
_BY_PATH = {2: ("open", 0), 76: ("truncate", 0), 82: ("rename", 0), 83: ("mkdir", 0), 84: ("rmdir", 0), 85: ("creat", 0)}
_BY_PATH |= {86: ("link", 0), 87: ("unlink", 0), 88: ("symlink", 1), 257: ("openat", 1), 258: ("mkdirat", 1), 263: ("unlinkat", 1)}
_BY_PATH |= {264: ("renameat", 1), 265: ("linkat", 1), 266: ("symlinkat", 2), 316: ("renameat2", 1), 437: ("openat2", 1)}
"""Their names, and which argument is the path."""
FOR_THE_LIVING = "-shm"
"""What SQLite shares among the living: nothing of it outlasts them."""
WRITES = frozenset({"write", "pwrite64"})
SYNCS = frozenset({"fsync", "fdatasync"})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def missing() -> str | None:
    """Return why nothing can be traced here."""
    return None if platform.machine() == "x86_64" and os.name == "posix" else "the tracer knows x86_64 Linux only"


class Call(NamedTuple):
    """A system call that changes files: ``path`` in the folder, ``offset`` and ``data`` of a write, ``length`` of a cut."""

    name: str
    path: str
    offset: int = 0
    data: bytes = b""
    length: int = 0


class Action(NamedTuple):
    """What becomes of a call: it is not made and gives ``error``, or is made with ``nbytes`` only; ``kill`` ends the child."""

    error: int = 0
    nbytes: int | None = None
    kill: bool = False


class Told(NamedTuple):
    """What the child says at some instant."""

    text: str


class Run(NamedTuple):
    """What became of a child: the calls that were made, in between what it said; and its status as of waitpid."""

    events: list[Call | Told]
    status: int

    @property
    def calls(self) -> list[Call]:
        return [event for event in self.events if isinstance(event, Call)]

    @property
    def told(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Told)]


def traced(
    program: Callable[[Callable[[str], None]], object],
    folder: Path,
    act: Callable[[int, Call], Action | None] = lambda _number, _call: None,
    hear: Callable[[str], object] = lambda _text: None,
) -> Run:
    """Run ``program`` in a child. ``act`` is asked about each call that changes what is in ``folder``, numbered from 0 on.

    ``program`` is given a function by which it says something, and ``hear`` what it says, at that instant.
    """
    speaks, hears = os.pipe()[::-1]
    pid = os.fork()
    if not pid:
        _child(program, speaks)
    try:
        return _Tracer(pid, speaks, str(folder.resolve()) + "/", act, hear).run()
    finally:
        os.close(speaks)
        os.close(hears)


def _child(program: Callable[[Callable[[str], None]], object], speaks: int) -> None:
    status = 1
    try:
        _libc.ptrace(_TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        program(partial(_speak, speaks))
        status = 0
    except BaseException:  # noqa: BLE001 - nothing of this process may run on in the child
        traceback.print_exc()
    finally:
        os._exit(status)


def _speak(speaks: int, text: str) -> None:
    os.write(speaks, text.encode())


class _Tracer:
    def __init__(
        self,
        pid: int,
        speaks: int,
        folder: str,
        act: Callable[[int, Call], Action | None],
        hear: Callable[[str], object],
    ) -> None:
        self._pid, self._speaks, self._folder, self._act, self._hear = pid, speaks, folder, act, hear
        self._info = ctypes.create_string_buffer(88)
        self._count = 0
        self.events: list[Call | Told] = []

    def run(self) -> Run:
        assert os.WIFSTOPPED(os.waitpid(self._pid, 0)[1])
        self._ask(_SETOPTIONS, 0, _OPTIONS)
        pending: tuple[Call | Told, Action] | None = None
        deliver = 0
        with Path(f"/proc/{self._pid}/mem").open("rb", buffering=0) as self._memory:
            while True:
                self._ask(_SYSCALL, 0, deliver)
                deliver = 0
                status = os.waitpid(self._pid, 0)[1]
                if not os.WIFSTOPPED(status):
                    return Run(self.events, status)
                if os.WSTOPSIG(status) != _SYSCALL_STOP:
                    deliver = os.WSTOPSIG(status)
                    continue
                self._ask(_GET_SYSCALL_INFO, len(self._info), ctypes.addressof(self._info))
                if self._info.raw[0] == _ENTRY:
                    pending = self._enter(*struct.unpack_from("<7Q", self._info.raw, 24))
                    continue
                if pending is not None:
                    self._leave(*pending, struct.unpack_from("<q", self._info.raw, 24)[0])
                pending = None

    def _enter(self, number: int, *values: int) -> tuple[Call | Told, Action] | None:
        if number == 1 and values[0] == self._speaks:
            told = Told(self._read(values[1], values[2]).decode())
            self._hear(told.text)
            return told, Action()
        call = self._call(number, values)
        if call is None or call.path.endswith(FOR_THE_LIVING):
            return None
        action = self._act(self._count, call) or Action()
        self._count += 1
        if action.nbytes is not None:
            self._ask(_POKEUSER, _RDX, action.nbytes)
            call = call._replace(data=call.data[: action.nbytes])
        elif action.error or action.kill:
            self._ask(_POKEUSER, _ORIG_RAX, (1 << 64) - 1)
            if action.kill:
                os.kill(self._pid, signal.SIGKILL)
        return call, action

    def _leave(self, event: Call | Told, action: Action, result: int) -> None:
        if action.kill:
            os.kill(self._pid, signal.SIGKILL)
        if action.error:
            self._ask(_POKEUSER, _RAX, (1 << 64) - action.error)
        elif result >= 0:
            if isinstance(event, Call) and event.name in WRITES:
                assert result == len(event.data)
            self.events.append(event)

    def _call(self, number: int, values: tuple[int, ...]) -> Call | None:
        """Return a call that changes what is in the folder."""
        if number in _BY_DESCRIPTOR:
            return self._by_descriptor(_BY_DESCRIPTOR[number], values)
        if number in _BY_PATH:
            return self._by_path(*_BY_PATH[number], values)
        return None

    def _by_descriptor(self, name: str, values: tuple[int, ...]) -> Call | None:
        path = self._path_of(values[0])
        if path is None:
            return None
        if name in WRITES:
            return Call(name, path, values[3] if name == "pwrite64" else self._position(values[0]), self._read(*values[1:3]))
        assert name in SYNCS | {"ftruncate"}, f"{name}: what it changes is not known here"
        return Call(name, path, length=values[1] if name == "ftruncate" else 0)

    def _by_path(self, name: str, argument: int, values: tuple[int, ...]) -> Call | None:
        path = self._inside(self._text(values[argument]))
        if path is None or (name == "openat" and not values[2] & (_O_CREAT | _O_TRUNC)):
            return None
        assert name in ("openat", "unlink", "mkdir", "truncate"), f"{name}: what it changes is not known here"
        if name == "openat":
            if os.path.exists(self._folder + path):  # noqa: PTH110 - nothing is made
                assert not values[2] & _O_TRUNC
                return None
            name = "create"
        return Call(name, path, length=values[1] if name == "truncate" else 0)

    def _path_of(self, descriptor: int) -> str | None:
        try:
            return self._inside(str(Path(f"/proc/{self._pid}/fd/{descriptor}").readlink()))
        except OSError:
            return None

    def _inside(self, path: str) -> str | None:
        if path + "/" == self._folder:
            return ""
        return path.removeprefix(self._folder) if path.startswith(self._folder) else None

    def _position(self, descriptor: int) -> int:
        return int(Path(f"/proc/{self._pid}/fdinfo/{descriptor}").read_text().split()[1])

    def _read(self, address: int, nbytes: int) -> bytes:
        self._memory.seek(address)
        return self._memory.read(nbytes)

    def _text(self, address: int) -> str:
        found = b""
        while b"\0" not in found:
            found += self._read(address + len(found), 4096 - (address + len(found)) % 4096)
        return os.fsdecode(found.split(b"\0")[0])

    def _ask(self, request: int, address: int, data: int) -> None:
        if _libc.ptrace(request, self._pid, address, data) == -1:
            code = ctypes.get_errno()
            # One that was ended may be gone already.
            if code != 3:
                raise OSError(code, f"ptrace {request}")

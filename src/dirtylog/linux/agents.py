"""The way to a userfaultfd without ptrace: the program itself creates it, and hands it over a socket.

An agent listens at an abstract address that has its process id. Whoever connects, and is the same user or root, is sent a fresh
userfaultfd. The agent's thread only does that: it never handles a fault, for the interpreter's lock could be held by the thread
that has it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import threading
import time
import warnings

from dirtylog.errors import DirtyLogError
from dirtylog.linux.signals import block_signals
from dirtylog.linux.userfaultfd import Userfaultfd, new_userfaultfd

_GREETING = b"dirtylog-agent 1"
_SECONDS = 5.0
_NAP_SECONDS = 0.05
_CREDENTIALS = struct.Struct("3i")
_PR_SET_PTRACER = 0x59616D61
_libc = ctypes.CDLL(None, use_errno=True)


def address_of(pid: int) -> str:
    """Return where the agent of a process listens."""
    return f"\0dirtylog-agent-{pid}"


class Agent:
    """A thread that hands userfaultfds of this process to those who may have them. A forked child has an agent of its own."""

    def __init__(self) -> None:
        self.handed_over = 0
        self._listen()
        os.register_at_fork(after_in_child=self._listen)

    def _listen(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._socket.bind(address_of(os.getpid()))
            self._socket.listen()
        except OSError as error:
            # Anybody may take the address first, which must not keep the program from running.
            self._socket.close()
            warnings.warn(f"this process runs without dirtylog's agent: {error}", RuntimeWarning, stacklevel=2)
            return
        threading.Thread(target=self._serve, args=(self._socket,), name="dirtylog-agent", daemon=True).start()

    def _serve(self, listener: socket.socket) -> None:
        block_signals()
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                time.sleep(_NAP_SECONDS)  # this process is out of descriptors
                continue
            # He who asked goes away, or this process can have no userfaultfd: who asks next is answered.
            with connection, contextlib.suppress(OSError, DirtyLogError):
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        pid, uid, _ = _peer(connection)
        if uid not in (0, os.geteuid()):
            return
        # So that it may read the memory too, where only a parent may trace (Yama). Safe: integers only; EINVAL without Yama.
        _libc.prctl(_PR_SET_PTRACER, pid, 0, 0, 0)
        fd = new_userfaultfd()
        try:
            socket.send_fds(connection, [_GREETING], [fd])
            self.handed_over += 1
        finally:
            os.close(fd)


def ask_agent(pid: int) -> Userfaultfd | None:
    """Return a userfaultfd from the agent of a process, enabled; None if it has no agent, or one that does not answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(_SECONDS)
        try:
            connection.connect(address_of(pid))
            # Anybody may listen at any name: only the process itself can be its agent.
            if _peer(connection)[0] != pid:
                return None
            greeting, fds, _, _ = socket.recv_fds(connection, 64, 1)
        except OSError:
            return None
    if not fds:
        return None
    try:
        uffd = Userfaultfd(fds[0])
    except OSError:  # a directory
        os.close(fds[0])
        return None
    if greeting != _GREETING:
        uffd.close()
        return None
    try:
        uffd.enable()
    except BaseException:
        uffd.close()
        raise
    return uffd


def _peer(connection: socket.socket) -> tuple[int, int, int]:
    pid, uid, gid = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid, gid

"""Signals out of the way of a system call that must not end early.

Through the C library: Python's own pthread_sigmask turns each mask into a set of enums, which takes a hundred times as long.
"""

from __future__ import annotations

import ctypes
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_SIGSET_BYTES = 128
"""sizeof(sigset_t) in glibc and musl."""

# Safe: the masks are as long as the library's sigset_t, and alive during each call.
_libc = ctypes.CDLL(None)
_ALL = ctypes.create_string_buffer(_SIGSET_BYTES)
_libc.sigfillset(_ALL)


def block_signals() -> None:
    """Block every signal in this thread."""
    _libc.pthread_sigmask(int(signal.SIG_BLOCK), _ALL, None)


def without_signals(call: Callable[[], int]) -> int:
    """Call with every signal blocked in this thread."""
    before = ctypes.create_string_buffer(_SIGSET_BYTES)
    _libc.pthread_sigmask(int(signal.SIG_BLOCK), None, before)
    try:
        block_signals()
        result = call()
    finally:
        _libc.pthread_sigmask(int(signal.SIG_SETMASK), before, None)
    return result

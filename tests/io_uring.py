"""A ring of io_uring by its system calls: one read at a time, into any memory or into a registered buffer."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from typing import TYPE_CHECKING, Self

from dirtylog.linux.layout import U32, U64, Struct
from dirtylog.linux.layout import struct as declare

if TYPE_CHECKING:
    from address_space import Area

_SETUP, _ENTER, _REGISTER = 425, 426, 427
_READ, _READ_FIXED = 22, 4
_SQES = 0x1000_0000
_SQE = struct.Struct("=BBHiQQIIQHHi16x")
_CQE_BYTES = 16
_ENTRIES = 4

_libc = ctypes.CDLL(None, use_errno=True)


@declare(40)
class _Offsets(Struct):
    """io_sqring_offsets, and io_cqring_offsets: ``last`` is the array of the one, and ``cqes`` the entries of the other."""

    head: U32
    tail: U32
    ring_mask: U32
    ring_entries: U32
    fifth: U32
    cqes: U32
    last: U32
    reserved: U32
    user_address: U64


@declare(120)
class _Parameters(Struct):
    """io_uring_params."""

    sq_entries: U32
    cq_entries: U32
    flags: U32
    sq_thread_cpu: U32
    sq_thread_idle: U32
    features: U32
    wq_fd: U32
    reserved0: U32
    reserved1: U32
    reserved2: U32
    sq: _Offsets
    cq: _Offsets


@declare(16)
class _Vector(Struct):
    """iovec."""

    base: U64
    len: U64


class Ring:
    """One ring. :class:`OSError` where the kernel has none, or gives none."""

    def __init__(self) -> None:
        parameters = _Parameters()
        self._fd = _called(_SETUP, _ENTRIES, ctypes.byref(parameters))
        self._sq, self._cq = parameters.sq, parameters.cq
        nbytes = max(self._sq.last + 4 * parameters.sq_entries, self._cq.cqes + _CQE_BYTES * parameters.cq_entries)
        self._rings = mmap.mmap(self._fd, nbytes)
        self._sqes = mmap.mmap(self._fd, _ENTRIES * _SQE.size, offset=_SQES)

    def register(self, area: Area) -> None:
        """Make an area the ring's only registered buffer: its pages are pinned from now on."""
        address, nbytes = area.span()
        vector = _Vector(base=address, len=nbytes)
        _called(_REGISTER, self._fd, 0, ctypes.byref(vector), 1)

    def read(self, fd: int, address: int, nbytes: int, *, registered: bool = False) -> None:
        """Read from the beginning of a file, and wait for it."""
        tail = self._word(self._sq.tail)
        slot = tail & self._word(self._sq.ring_mask)
        opcode = _READ_FIXED if registered else _READ
        _SQE.pack_into(self._sqes, slot * _SQE.size, opcode, 0, 0, fd, 0, address, nbytes, 0, 0, 0, 0, 0)
        struct.pack_into("=I", self._rings, self._sq.last + 4 * slot, slot)
        struct.pack_into("=I", self._rings, self._sq.tail, tail + 1)
        _called(_ENTER, self._fd, 1, 1, 1, None, 0)
        head = self._word(self._cq.head)
        entry = self._cq.cqes + _CQE_BYTES * (head & self._word(self._cq.ring_mask))
        _, result, _ = struct.unpack_from("=QiI", self._rings, entry)
        struct.pack_into("=I", self._rings, self._cq.head, head + 1)
        if result != nbytes:
            raise OSError(-result, os.strerror(-result))

    def _word(self, offset: int) -> int:
        return int(struct.unpack_from("=I", self._rings, offset)[0])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._rings.close()
        self._sqes.close()
        os.close(self._fd)


def _called(*arguments: object) -> int:
    # Safe: every pointer is to a struct of the kernel's size, alive during the call.
    result = int(_libc.syscall(*arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

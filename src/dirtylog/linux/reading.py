"""The memory of another process, read and written in batches of runs (process_vm_readv, process_vm_writev)."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import TYPE_CHECKING, Self

import numpy as np

from dirtylog.errors import AccessDeniedError, DirtyLogError, TargetGoneError
from dirtylog.linux.mappings import Mapping, read_mappings
from dirtylog.linux.ptrace import ATTACH_REMEDY

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

_IOV_MAX = 1024
# Of one call: the kernel takes at most 2 GiB, and a call that is not too long can be interrupted.
_CALL_BYTES = 256 << 20
# Of what comes through /proc/PID/mem in one step.
_PIECE_BYTES = 1 << 20
_TOP = 1 << 64
_libc = ctypes.CDLL(None, use_errno=True)
for _call in (_libc.process_vm_readv, _libc.process_vm_writev):
    _call.restype = ctypes.c_ssize_t
    _call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]


def runs_of(pages: NDArray[np.int64], base: int, page_size: int) -> NDArray[np.uint64]:
    """Return uint64[m, 2] of (address, bytes): each stretch of pages that follow one another, in the order given.

    That is an array of struct iovec.
    """
    if not len(pages):
        return np.empty((0, 2), np.uint64)
    starts = np.flatnonzero(np.concatenate(([True], pages[1:] != pages[:-1] + 1)))
    runs = np.empty((len(starts), 2), np.uint64)
    runs[:, 0] = pages[starts] * page_size + base
    runs[:, 1] = np.diff(starts, append=len(pages)) * page_size
    return runs


def read_runs(pid: int, runs: NDArray[np.uint64], out: NDArray[np.uint8]) -> None:
    """Read runs of (address, bytes) into ``out``, flat and as long as all of them.

    What process_vm_readv may not read (PROT_NONE) comes through /proc/PID/mem; what is not mapped reads as zeros.
    """
    with _Memory(pid, os.O_RDONLY) as memory:
        _transfer(_libc.process_vm_readv, runs, out, memory, memory.read)


def write_runs(pid: int, runs: NDArray[np.uint64], data: NDArray[np.uint8]) -> None:
    """Write ``data`` to runs of (address, bytes); what process_vm_writev may not write comes through /proc/PID/mem."""
    with _Memory(pid, os.O_RDWR) as memory:
        _transfer(_libc.process_vm_writev, runs, data, memory, memory.write)


class _Memory:
    """/proc/PID/mem, opened when it is needed, and what is mapped, for runs that the batched calls may not touch."""

    def __init__(self, pid: int, mode: int) -> None:
        self.pid = pid
        self._mode = mode
        self._fd = -1
        self._mappings: list[Mapping] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def _open(self) -> int:
        if self._fd < 0:
            try:
                self._fd = os.open(f"/proc/{self.pid}/mem", self._mode | os.O_CLOEXEC)
            except OSError as error:
                raise _error(self.pid, error.errno or 0) from error
            self._mappings = read_mappings(self.pid)
        return self._fd

    def read(self, address: int, part: NDArray[np.uint8]) -> int:
        """Read what can be had in one step at an address, and return how many bytes that is."""
        memory = self._open()
        start, end = next(((one.start, one.end) for one in self._mappings if address < one.end), (_TOP, _TOP))
        if address < start:
            # Nothing was mapped there at the moment of the look.
            nbytes = min(len(part), start - address)
            part[:nbytes] = 0
            return nbytes
        for nbytes in {min(len(part), end - address, _PIECE_BYTES): 0, _to_the_next_page(address, len(part)): 0}:
            try:
                data = os.pread(memory, nbytes, address)
            except OSError:
                continue  # not mapped any more, or beyond the end of a file (EIO)
            if not data:
                raise _error(self.pid, errno.ESRCH)
            part[: len(data)] = np.frombuffer(data, np.uint8)
            return len(data)
        part[:nbytes] = 0
        return nbytes

    def write(self, address: int, part: NDArray[np.uint8]) -> int:
        """Write up to the end of a page, and return how many bytes that is."""
        nbytes = _to_the_next_page(address, len(part))
        try:
            done = os.pwrite(self._open(), part[:nbytes].tobytes(), address)
        except OSError as error:
            raise DirtyLogError(
                f"address {address:#x} of process {self.pid} cannot be written", pid=self.pid, reason=error.strerror
            ) from error
        if not done:
            raise _error(self.pid, errno.ESRCH)
        return done


def _to_the_next_page(address: int, nbytes: int) -> int:
    return min(mmap.PAGESIZE - address % mmap.PAGESIZE, nbytes)


def _transfer(
    call: Callable[..., int],
    runs: NDArray[np.uint64],
    flat: NDArray[np.uint8],
    memory: _Memory,
    otherwise: Callable[[int, NDArray[np.uint8]], int],
) -> None:
    remote = runs.copy()
    address = flat.ctypes.data
    local = np.zeros(2, np.uint64)
    index = done = 0
    while index < len(remote):
        batch = remote[index : index + _IOV_MAX]
        lengths = np.cumsum(batch[:, 1], dtype=np.int64)
        count = max(1, int(np.searchsorted(lengths, _CALL_BYTES, side="right")))
        # Safe: the local buffer has room for what the remote runs of this call are long, for flat has room for all.
        total = min(int(lengths[count - 1]), _CALL_BYTES)
        local[0], local[1] = address + done, total
        moved = call(memory.pid, local.ctypes.data, 1, batch.ctypes.data, count, 0)
        if moved < 0:
            code = ctypes.get_errno()
            if code != errno.EFAULT:
                raise _error(memory.pid, code)
            moved = 0
        if moved < total:
            where, nbytes = _stopped_at(batch, lengths, moved)
            moved += otherwise(where, flat[done + moved : done + moved + nbytes])
        done += moved
        index += _consume(batch, lengths, moved)


def _stopped_at(batch: NDArray[np.uint64], lengths: NDArray[np.int64], moved: int) -> tuple[int, int]:
    """Return the address at which a call stopped, and the bytes from there to the end of its run."""
    run = int(np.searchsorted(lengths, moved, side="right"))
    into = moved - (int(lengths[run - 1]) if run else 0)
    address = int(batch[run, 0]) + into
    return address, int(batch[run, 1]) - into


def _consume(batch: NDArray[np.uint64], lengths: NDArray[np.int64], moved: int) -> int:
    """Take what has been moved off a batch, and return how many runs are done."""
    run = int(np.searchsorted(lengths, moved, side="right"))
    if run < len(batch):
        into = moved - (int(lengths[run - 1]) if run else 0)
        batch[run, 0] += np.uint64(into)
        batch[run, 1] -= np.uint64(into)
    return run


def _error(pid: int, code: int) -> DirtyLogError:
    if code in (errno.ESRCH, errno.ENOENT):
        return TargetGoneError(f"process {pid} is gone", pid=pid)
    if code in (errno.EPERM, errno.EACCES):
        return AccessDeniedError(f"may not read the memory of process {pid}", errno=code, pid=pid, remedy=ATTACH_REMEDY)
    return DirtyLogError(f"cannot read the memory of process {pid}", errno=code, pid=pid, reason=os.strerror(code))

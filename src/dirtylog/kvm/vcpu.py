"""A virtual CPU: the vcpu descriptor, its run page, and the kick that gets it out of the guest.

Facts about KVM_RUN that this file relies on:

* It returns EINTR when a signal is pending that is not blocked. KVM_SET_SIGNAL_MASK gives the set that is blocked while it runs:
  so the kick's signal is blocked in the thread and let in during KVM_RUN only. It ends the run, stays pending, is taken with
  sigtimedwait, and no handler is ever called. One that comes before the run ends the run at once.
* ``immediate_exit`` in the run page, where it is set, makes it return EINTR before any guest code runs, but after it has completed
  the I/O that the run before left. (KVM_CAP_IMMEDIATE_EXIT, Linux 4.13.)
* An I/O or MMIO exit is completed by the next KVM_RUN: only then do registers show it.
"""

from __future__ import annotations

import fcntl
import mmap
import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from dirtylog.errors import DirtyLogError
from dirtylog.kvm import abi
from dirtylog.kvm.abi import RunHeader
from dirtylog.kvm.descriptor import KvmDescriptor
from dirtylog.kvm.exits import Exit, Interrupted, IoAccess, MmioAccess, answer_exit, decode_exit
from dirtylog.kvm.statistics import KvmStatistics
from dirtylog.linux.layout import Struct, offset_of

KICK_SIGNAL = signal.SIGRTMIN + 4
"""Sent to the one thread that runs the vCPU, and blocked there but in KVM_RUN. A real-time signal that nothing known here uses."""

if TYPE_CHECKING:
    from collections.abc import Iterator

# How often somebody who holds a vCPU kicks it, in seconds: its runner may be the first to get the lock again.
_KICK_INTERVAL = 0.0002

_S = TypeVar("_S", bound=Struct)

_EXIT_REASON = offset_of(RunHeader, "exit_reason")
_IMMEDIATE_EXIT = offset_of(RunHeader, "immediate_exit")


class KvmVcpu(KvmDescriptor):
    """The vcpu descriptor. One thread runs it at a time; :meth:`kick` may be called from any."""

    def __init__(self, fd: int, index: int, run_size: int) -> None:
        super().__init__(fd)
        self.index = index
        try:
            # Safe: the kernel said how long it is, and this object keeps it.
            self._run = mmap.mmap(fd, run_size)
        except BaseException:
            super().close()
            raise
        self._rings: list[mmap.mmap] = []
        self._statistics: list[KvmStatistics] = []
        # Reentrant, for a handler of a signal may kick the vCPU that its own thread runs.
        self._lock = threading.RLock()
        self._runner: _Runner | None = None
        self._kicked = False
        self._guest = threading.Lock()
        self._masked_for: tuple[_Runner, set[signal.Signals | int]] | None = None

    def run(self) -> Exit:
        """Run guest code until it needs somebody, and return why (KVM_RUN).

        :class:`Interrupted` also when :meth:`kick` was called since the last run. In the thread that calls it, and in processes
        that it starts, the kick's signal stays blocked afterwards.
        """
        runner = _this_thread()
        mine = False
        try:
            with self._lock:
                if self._runner is not None:
                    raise DirtyLogError(
                        f"vCPU {self.index} is being run by another thread", remedy="a vCPU has one runner at a time"
                    )
                self._runner, mine = runner, True
            fd = self.fileno()
            self._let_in(runner)
            with self._guest:
                fcntl.ioctl(fd, abi.KVM_RUN, 0)
        except InterruptedError:
            self._take_kick()
            return Interrupted()
        except OSError as error:
            raise KvmDescriptor.error(error, f"cannot run vCPU {self.index}") from error
        finally:
            if mine:
                with self._lock:
                    self._runner = None
        return decode_exit(self._run, int.from_bytes(self._run[_EXIT_REASON : _EXIT_REASON + 4], sys.byteorder))

    def kick(self) -> None:
        """Make the :meth:`run` that is under way, or else the next one, return :class:`Interrupted` at once.

        Where the run under way is just leaving by itself, it is the next one.
        """
        with self._lock:
            if self._kicked or self.closed:
                return
            self._kicked = True
            self._run[_IMMEDIATE_EXIT] = 1
            if self._runner is not None:
                # Safe: the runner is in run(), with the signal blocked, and cannot leave it without this lock.
                signal.pthread_kill(self._runner.thread, KICK_SIGNAL)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep it out of the guest: a run that is under way is kicked, one that comes waits."""
        while not self._guest.acquire(timeout=_KICK_INTERVAL):
            self.kick()
        try:
            yield
        finally:
            self._guest.release()

    def complete(self) -> None:
        """Complete the access that the last exit left, so that the registers show it. No guest code runs.

        An access that KVM splits goes on piece by piece: those that nobody has answered read as zeros, and writes go nowhere.
        """
        while True:
            self.kick()
            if self.run() == Interrupted():
                return

    def get(self, kind: type[_S]) -> _S:
        """Return registers of this kind, a struct of :mod:`dirtylog.kvm.arch`. It must not be running."""
        value = kind()
        self.ioctl(kind.get_request, value, f"cannot read {kind.__name__} of vCPU {self.index}")
        return value

    def put(self, value: Struct) -> None:
        """Set registers. It must not be running."""
        self.ioctl(value.put_request, value, f"cannot set {type(value).__name__} of vCPU {self.index}")

    def answer(self, access: IoAccess | MmioAccess, data: bytes) -> None:
        """Answer a read that an exit asked for; shorter data are filled up with zeros."""
        self.fileno()  # an error when it is closed
        answer_exit(self._run, access, data)

    def map_ring(self, offset_pages: int, nbytes: int) -> mmap.mmap:
        """Return the vCPU's dirty ring. It is gone when the vCPU is closed and nobody has a view of it."""
        try:
            # Safe: nbytes is the size that the kernel accepted; MAP_SHARED is the only way that it allows.
            ring = mmap.mmap(self.fileno(), nbytes, offset=offset_pages * mmap.PAGESIZE)
        except OSError as error:
            raise KvmDescriptor.error(error, f"cannot map the dirty ring of vCPU {self.index}") from error
        self._rings.append(ring)
        return ring

    def open_statistics(self) -> KvmStatistics:
        """Return what KVM counts of this vCPU; it is closed with it. The call waits while it runs, reading them later does not."""
        fd = self.ioctl(abi.KVM_GET_STATS_FD, 0, f"cannot have the statistics of vCPU {self.index}")
        self._statistics.append(KvmStatistics(fd))
        return self._statistics[-1]

    def close(self) -> None:
        """Unmap the run page and close the descriptor. It must not be running."""
        with self._lock:
            self._run.close()
            for statistics in self._statistics:
                statistics.close()
            # Not closed here: a view may be alive. The last of them unmaps it.
            self._rings.clear()
            super().close()

    def _take_kick(self) -> None:
        with self._lock:
            # The signal even when nobody kicked this vCPU: it may be left from a kick of another that this thread ran before, and
            # would end every run.
            while signal.sigtimedwait((KICK_SIGNAL,), 0) is not None:
                pass
            self._run[_IMMEDIATE_EXIT] = 0
            self._kicked = False  # last: a kick that comes before this is part of the one that is taken

    def _let_in(self, runner: _Runner) -> None:
        """Let in during KVM_RUN the kick's signal, and whatever else this thread lets in."""
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ()) - {KICK_SIGNAL}
        if self._masked_for == (runner, blocked):
            return
        bits = sum(1 << number - 1 for number in blocked)
        mask = abi.SignalMask(len=abi.SIGSET_BYTES)
        mask.sigset[:] = list(bits.to_bytes(abi.SIGSET_BYTES, sys.byteorder))
        self.ioctl(abi.KVM_SET_SIGNAL_MASK, mask, f"cannot set the signal mask of vCPU {self.index}")
        self._masked_for = runner, blocked


class _Runner(NamedTuple):
    """A thread that runs vCPUs, and blocks the kick's signal. One object for each: the system uses thread numbers again."""

    thread: int


_runners = threading.local()


def _this_thread() -> _Runner:
    runner: _Runner | None = getattr(_runners, "this", None)
    if runner is None:
        signal.pthread_sigmask(signal.SIG_BLOCK, (KICK_SIGNAL,))
        runner = _runners.this = _Runner(threading.get_ident())
    return runner

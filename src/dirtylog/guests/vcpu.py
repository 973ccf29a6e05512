"""A vCPU: a thread that runs a CPU, and answers requests between two runs, as KVM's vCPUs do."""

from __future__ import annotations

import enum
import threading
import time
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dirtylog.errors import CoverageLostError, DirtyLogError, InvalidArgumentError, UnsupportedError
from dirtylog.guests.cpu import CpuExit
from dirtylog.guests.state import SavedVcpu, StatefulCpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy as np
    from numpy.typing import NDArray

    from dirtylog.guests.cpu import Cpu, Service

# A kick that lands just outside the guest is lost, so it is repeated this often, in seconds, until it is answered.
_KICK_INTERVAL = 0.0005
_ANSWER_DEADLINE = 30.0


class VcpuState(enum.Enum):
    """What a vCPU is doing."""

    READY = "ready"
    """It runs when the machine does."""
    HALTED = "halted"
    FAULTED = "faulted"
    CLOSED = "closed"


class FlushTarget(Protocol):
    """What can be asked to leave the guest and flush: a vCPU."""

    def request_flush(self) -> int | None:
        """Ask it to flush its TLB; return a ticket to wait for, or None if it will do so before it enters the guest."""

    def wait_flushed(self, ticket: int) -> None:
        """Return when the flush of this ticket is done."""


def leave_guest(vcpus: Iterable[FlushTarget]) -> None:
    """Have every vCPU leave the guest and flush; return when each has done so, or is sure to before it runs guest code."""
    tickets = [(vcpu, vcpu.request_flush()) for vcpu in vcpus]
    for vcpu, ticket in tickets:
        if ticket is not None:
            vcpu.wait_flushed(ticket)


class VcpuSnapshot(NamedTuple):
    """The state of a vCPU, for the same vCPU."""

    cpu: StatefulCpu
    registers: object
    state: VcpuState
    error: BaseException | None


class Vcpu:
    """One vCPU. It starts paused.

    *Request, kick, acknowledge*: whoever needs a flush sets the request, stops the CPU, and waits until the vCPU's own thread
    has flushed between two runs. A vCPU that is not in the guest need not be waited for: before it enters it looks at the
    requests, under the same lock under which it is declared to be in the guest.
    """

    def __init__(self, index: int, make_cpu: Callable[[], Cpu], flushed: Callable[[int], None]) -> None:
        self.index = index
        self.state = VcpuState.READY
        self.error: BaseException | None = None
        self.in_guest = False
        """Whether guest code may be running. True from before the first instruction until after the last."""
        self.serving = False
        """Whether the guest waits for a service: it is out of the guest, but what it does is not over."""
        self.kicks = 0
        self._make_cpu = make_cpu
        self._cpu = make_cpu()
        self._flushed = flushed
        self._changed = threading.Condition(threading.Lock())
        self._flushes_asked = 0
        self._flushes_done = 0
        self._may_run = False
        self._thread: threading.Thread | None = None

    @property
    def cpu(self) -> Cpu:
        """The CPU; leave it alone while the vCPU runs."""
        return self._cpu

    def resume(self) -> None:
        """Let it run, if it is ready."""
        with self._changed:
            self._may_run = True
            if self._thread is None and self.state is VcpuState.READY:
                self._thread = threading.Thread(target=self._loop, name=f"vcpu-{self.index}", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def request_pause(self) -> None:
        """Ask it to leave the guest and stay out."""
        with self._changed:
            self._may_run = False
            if self.in_guest:
                self._cpu.stop()

    def wait_outside(self) -> None:
        """Return when it is out of the guest and nobody serves it any more. Ask for a pause first."""
        self._wait(lambda: not self.in_guest and not self.serving, "pause")

    def request_flush(self) -> int | None:
        """Ask for a TLB flush; return a ticket for :meth:`wait_flushed`, or None if it is sure to come before guest code runs."""
        with self._changed:
            self._flushes_asked += 1
            if not self.in_guest:
                return None
            self._cpu.stop()
            return self._flushes_asked

    def wait_flushed(self, ticket: int) -> None:
        """Return when the flush of this ticket is done, or sure to come before guest code runs again."""
        self._wait(lambda: self._flushes_done >= ticket or not self.in_guest, "flush its TLB")

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it has halted or faulted; return whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: self.state is not VcpuState.READY, timeout)

    def reset(self) -> None:
        """Set every register, the TLB and the state to what they were at first. It must be paused."""
        with self._changed:
            if self.in_guest or self._may_run:
                raise DirtyLogError(f"vCPU {self.index} is running", remedy="pause the machine before a reset")
            if self.state is VcpuState.CLOSED:
                raise DirtyLogError(f"vCPU {self.index} is closed")
            self._cpu = self._make_cpu()
            self.state, self.error = VcpuState.READY, None

    # --- state; it must be paused

    def save(self) -> SavedVcpu:
        """Return its registers, and whether it has halted or faulted."""
        with self._changed:
            self._check_standing()
            cpu = self._stateful()
            return SavedVcpu(cpu.kind, self.state.value, self.error, cpu.registers())

    def load(self, saved: SavedVcpu) -> None:
        """Set its registers, and have it halted or faulted where it was so."""
        with self._changed:
            self._check_standing()
            cpu = self._stateful()
            if saved.cpu != cpu.kind:
                raise InvalidArgumentError(f"the state of a {saved.cpu} vCPU, and vCPU {self.index} is a {cpu.kind} vCPU")
            cpu.load_registers(saved.registers)
            self._become(VcpuState(saved.state), saved.fault)

    def snapshot(self) -> VcpuSnapshot:
        """Return what :meth:`put_back` takes: it is good for this vCPU, and as fast as can be."""
        with self._changed:
            self._check_standing()
            cpu = self._stateful()
            return VcpuSnapshot(cpu, cpu.snapshot(), self.state, self.error)

    def put_back(self, snapshot: VcpuSnapshot, changed: Iterable[NDArray[np.int64]] = ()) -> None:
        """Set registers and state to those of a snapshot. ``changed`` are guest frames whose contents were put back."""
        with self._changed:
            self._check_standing()
            # A reset may have made another CPU since, and no flush has come to this one: so it flushes before it is in use again.
            if self._cpu is not snapshot.cpu:
                snapshot.cpu.flush_tlb()
                self._cpu = snapshot.cpu
            for gfns in changed:
                snapshot.cpu.forget_code(gfns)
            snapshot.cpu.put_back(snapshot.registers)
            self._become(snapshot.state, snapshot.error)

    def _become(self, state: VcpuState, error: BaseException | None) -> None:
        self.state, self.error = state, error
        # One that is ready waits to be resumed. Others are waited for.
        if state is not VcpuState.READY:
            self._changed.notify_all()

    def _check_standing(self) -> None:
        if self.in_guest or self.serving or self._may_run:
            raise InvalidArgumentError(f"vCPU {self.index} is running", remedy="pause the machine first")
        if self.state is VcpuState.CLOSED:
            raise DirtyLogError(f"vCPU {self.index} is closed")

    def _stateful(self) -> StatefulCpu:
        if not isinstance(self._cpu, StatefulCpu):
            raise UnsupportedError(f"the registers of vCPU {self.index} cannot be saved: {type(self._cpu).__name__} cannot do it")
        return self._cpu

    def close(self) -> None:
        """End the thread. A second call does nothing."""
        with self._changed:
            self._may_run = False
            self.state = VcpuState.CLOSED
            self._changed.notify_all()
        self.wait_outside()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _wait(self, answered: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _ANSWER_DEADLINE
        with self._changed:
            while not self._changed.wait_for(answered, _KICK_INTERVAL):
                self.kicks += 1
                self._cpu.stop()
                if time.monotonic() > deadline:
                    raise CoverageLostError(f"vCPU {self.index} did not {what} within {_ANSWER_DEADLINE:g} s")

    def _loop(self) -> None:
        while self._enter():
            outcome: VcpuState = VcpuState.READY
            service: Service | None = None
            error: BaseException | None = None
            try:
                reason = self._cpu.run()
                if reason is CpuExit.HALTED:
                    outcome = VcpuState.HALTED
                elif not isinstance(reason, CpuExit):
                    service = reason
            except BaseException as caught:  # noqa: BLE001 - kept for whoever asks: a thread has nobody to raise it to
                outcome, error = VcpuState.FAULTED, caught
            self._left(outcome, error, serving=service is not None)
            if service is not None:
                try:
                    service()
                except BaseException as caught:  # noqa: BLE001 - the same
                    outcome, error = VcpuState.FAULTED, caught
                self._left(outcome, error, serving=False)

    def _left(self, state: VcpuState, error: BaseException | None, *, serving: bool) -> None:
        with self._changed:
            self.in_guest, self.serving = False, serving
            if self.state is VcpuState.READY:
                self.state, self.error = state, error
            self._changed.notify_all()

    def _enter(self) -> bool:
        """Serve requests and wait until it may run; return False when it is closed."""
        with self._changed:
            while True:
                if self._flushes_done != self._flushes_asked:
                    self._cpu.flush_tlb()
                    self._flushed(self.index)
                    self._flushes_done = self._flushes_asked
                    self._changed.notify_all()
                if self.state is VcpuState.CLOSED:
                    return False
                if self._may_run and self.state is VcpuState.READY:
                    self.in_guest = True
                    return True
                self._changed.wait()

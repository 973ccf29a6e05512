"""All threads of another process stopped, and let go again, without a signal that it or its parent could see."""

from __future__ import annotations

import os
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dirtylog.errors import DirtyLogError, TargetGoneError, UnsupportedError
from dirtylog.linux.arch import host_architecture
from dirtylog.linux.call_window import enter_call, make_again
from dirtylog.linux.preflight import has_ended, read_status
from dirtylog.linux.ptrace import Tracee, let_go_if_ended, lives
from dirtylog.linux.ptrace_abi import Option
from dirtylog.linux.signals import block_signals

if TYPE_CHECKING:
    from dirtylog.linux.arch.architecture import Architecture


_LOOK_SECONDS = 0.05


class Leader(Protocol):
    """Who traces a process's first thread already, and must stop it for us."""

    def pause(self) -> None:
        """Return when the thread stands still."""

    def go(self) -> None:
        """Let it run on."""


class Freezer:
    """A process can be frozen for as long as it takes. Should we die meanwhile, the kernel lets it run on."""

    def __init__(self, pid: int, leader: Leader | None = None) -> None:
        self._pid = pid
        self._leader = leader
        self._architecture = _known_architecture()
        self._thread: threading.Thread | None = None
        self._thaw = threading.Event()
        self._ready = threading.Event()
        self._errors: list[BaseException] = []
        self._tracees: dict[int, Tracee] = {}

    @property
    def frozen(self) -> bool:
        """Whether it is frozen now."""
        return self._thread is not None

    def freeze(self) -> None:
        """Return when no thread of the process runs. A second call does nothing."""
        if self._thread is not None:
            return
        if self._leader is not None:
            self._leader.pause()
        self._thaw.clear()
        self._ready.clear()
        self._errors.clear()
        self._tracees.clear()
        self._thread = threading.Thread(target=self._run, name="dirtylog-ptrace", daemon=True)
        self._thread.start()
        while not self._ready.wait(_LOOK_SECONDS):
            for tid in list(self._tracees):
                let_go_if_ended(self._pid, tid)
        if self._errors:
            self.thaw()
            raise self._errors[0]

    def thaw(self) -> None:
        """Let it run on. A second call does nothing."""
        if self._thread is not None:
            self._thaw.set()
            self._thread.join()
            while lives(self._thread):
                os.sched_yield()
            self._thread = None
            if self._leader is not None:
                self._leader.go()

    def _run(self) -> None:
        block_signals()
        tracees = self._tracees
        try:
            self._stop_all(tracees)
        except BaseException as error:  # noqa: BLE001 - it is raised in the thread that waits
            self._errors.append(error)
        self._ready.set()
        self._thaw.wait()
        for tracee in tracees.values():
            self._let_go(tracee)

    def _stop_all(self, tracees: dict[int, Tracee]) -> None:
        """Stop threads until there is none that runs: one that runs may start another."""
        ended = {self._pid} if self._leader is not None else set[int]()
        while True:
            try:
                found = [int(entry.name) for entry in Path(f"/proc/{self._pid}/task").iterdir()]
            except FileNotFoundError as error:
                raise TargetGoneError(f"process {self._pid} is gone", pid=self._pid) from error
            for tid in [tid for tid in tracees if self._has_another_place(tid)]:
                del tracees[tid]
            new = [tid for tid in found if tid not in tracees and tid not in ended]
            # The list breaks off at a thread that ends while it is made.
            if not new and len(found) == read_status(self._pid).threads:
                break
            for tid in new:
                try:
                    tracee = Tracee(self._pid, tid, Option.TRACESYSGOOD)
                    tracee.stop()
                except DirtyLogError:
                    if has_ended(self._pid, tid):
                        let_go_if_ended(self._pid, tid)
                        ended.add(tid)
                        continue
                    raise
                tracees[tid] = tracee
        if not tracees and self._leader is None:
            raise TargetGoneError(f"process {self._pid} has ended", pid=self._pid)

    def _has_another_place(self, tid: int) -> bool:
        """Return whether a thread that was stopped is none of ours any more: another has executed a program, and has its number."""
        try:
            return not read_status(self._pid, tid).tracer
        except TargetGoneError:
            return True

    def _let_go(self, tracee: Tracee) -> None:
        try:
            if self._architecture is not None:
                registers = self._architecture.save(tracee)
                ended = make_again(tracee, self._architecture, registers)
                if ended is not None:
                    self._architecture.restore(tracee, registers)
                    enter_call(tracee, tracee.signal_mask(), partial(self._architecture.restore, tracee, ended))
            tracee.detach()
        except DirtyLogError:
            pass  # it has ended: nothing is there to be let go


def _known_architecture() -> Architecture[Any] | None:
    """Return this host's, if it is known how to have a system call made again that the stop has ended."""
    try:
        return host_architecture()
    except UnsupportedError:
        return None

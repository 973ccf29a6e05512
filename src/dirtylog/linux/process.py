"""The memory of another process: each of its mappings is a slot."""

from __future__ import annotations

import errno
import os
import select
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from dirtylog.bitmap import checked_pages
from dirtylog.compare import ComparePort
from dirtylog.errors import (
    AccessDeniedError,
    CoverageLostError,
    DirtyLogError,
    InvalidArgumentError,
    TargetGoneError,
    UnsupportedError,
)
from dirtylog.linux.attach import Attached, attach
from dirtylog.linux.fault_count import FaultCount
from dirtylog.linux.freezer import Freezer
from dirtylog.linux.mappings import Selection, read_mappings
from dirtylog.linux.pagemap import Pagemap
from dirtylog.linux.preflight import check_has_memory, read_status
from dirtylog.linux.process_port import ProcessPort
from dirtylog.linux.process_slots import ProcessSlots, Skipped
from dirtylog.linux.reading import read_runs, runs_of, write_runs
from dirtylog.linux.soft_dirty import SoftDirtyPort, missing_soft_dirty
from dirtylog.options import ProcessOptions, ProcessPorts

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from numpy.typing import ArrayLike, NDArray

    from dirtylog.linux.launch import Launched
    from dirtylog.linux.userfaultfd import Userfaultfd
    from dirtylog.memslot import MemorySlot
    from dirtylog.port import Exactness

DEFAULTS = ProcessOptions()
_EXECS_AT_ONCE = 500
_EXEC_SECONDS = 0.002


@dataclass(frozen=True, slots=True)
class ProcessStats:
    """Counters. ``programs`` is how many programs the process was seen to execute, ``skipped`` how many mappings are not logged."""

    mappings: int
    skipped: int
    programs: int


class ProcessMemory:
    """Another process, which runs on all the time; a :class:`~dirtylog.memory.Memory`, and a context manager.

    Where the port is "auto", ``fallback`` says why it is not one that would be better. ``launched`` is the program, if this process
    started it, whom it then belongs to. The slots follow the mappings at each
    :meth:`~dirtylog.dirty_log.DirtyLog.update`; ``skipped`` are those that cannot be logged.

    Raises :class:`TargetGoneError`, :class:`AccessDeniedError`, :class:`UnsupportedError`, :class:`InvalidArgumentError`.
    """

    def __init__(self, pid: int, options: ProcessOptions = DEFAULTS, *, launched: Launched | None = None) -> None:
        self.pid = pid
        self.fallback = ""
        self.attached = Attached.NOT
        self._follows = ProcessSlots(pid, Selection(options.maps))
        self.slots = self._follows.table
        self._programs = 1
        self._closed = False
        self._space: Pagemap | None = None
        self._launched = launched
        self._freezer = Freezer(pid, launched)
        with ExitStack() as resources:
            self._pidfd = _open_process(pid)
            resources.callback(os.close, self._pidfd)
            resources.callback(self._leave_space)
            check_has_memory(pid, read_status(pid))
            self._faults = FaultCount(pid)
            self._space = Pagemap(pid)
            self._port = self._choose(options.port)
            resources.callback(self._port.close)
            resources.callback(self._freezer.thaw)
            self.update_slots()
            if options.maps and launched is None and not len(self.slots):
                raise InvalidArgumentError(
                    f"no mapping of process {pid} is chosen by {', '.join(map(repr, options.maps))}",
                    pid=pid,
                    remedy=f"see /proc/{pid}/maps",
                )
            self._resources = resources.pop_all()

    # --- what a source gives

    @property
    def port(self) -> ProcessPort | SoftDirtyPort | ComparePort:
        """How it is logged."""
        return self._port

    @property
    def exactness(self) -> Exactness:
        """How what is reported relates to what was written."""
        return self._port.exactness

    @property
    def blind_spots(self) -> tuple[str, ...]:
        """The writes that this source cannot see."""
        return self._port.blind_spots

    @property
    def incomplete(self) -> tuple[str, ...]:
        """Why writes may have been missed, as far as the kernel shows it."""
        return tuple(self._follows.gaps(self._port))

    @property
    def held(self) -> int:
        """Bytes that hold something: what the process has in memory and in swap, or less if the slots are fewer; 0 at its end."""
        try:
            return min(sum(slot.nbytes for slot in self.slots), read_status(self.pid).held)
        except TargetGoneError:
            return 0

    @property
    def skipped(self) -> tuple[Skipped, ...]:
        """The mappings that are not logged, and why."""
        return self._follows.skipped

    @property
    def status(self) -> int | None:
        """The exit status of a program that was started here, negative for a signal; None while it runs, or of another process."""
        return None if self._launched is None else self._launched.status

    def end(self) -> None:
        """Let a program that was started here, and is ending, come to its end: ``status`` is known then."""
        if self._launched is not None:
            self._launched.end()

    @property
    def stats(self) -> ProcessStats:
        """What was counted so far."""
        return ProcessStats(len(self.slots), len(self.skipped), self._programs)

    @property
    def faults(self) -> int | None:
        """Page faults of all its threads, through every program that it executes; None once it has ended."""
        faults = self._faults.since()
        # Looked at afterwards: had it ended before, the number may be of another process.
        return None if self._closed or self._has_ended() else faults

    def update_slots(self) -> list[MemorySlot]:
        """Make slots of new mappings, drop those of mappings that are gone or are others now; return what is not logged yet."""
        failure: DirtyLogError | None = None
        with self.slots.lock:
            for _ in range(_EXECS_AT_ONCE):
                self.check_alive()
                try:
                    if self._space is None or not self._space.alive():
                        self._follow_exec()
                    self._follows.follow(self, self._port)
                    # Not only those that are new: an interrupt may have come before those of the time before were logged.
                    return [slot for slot in self.slots if slot.dirty_bitmap is None]
                except (TargetGoneError, CoverageLostError) as error:
                    # It is ending, or it executes another program just now, in the midst of which its first thread has left.
                    failure = error
                    time.sleep(_EXEC_SECONDS)
            if isinstance(failure, CoverageLostError):
                raise failure
            raise TargetGoneError(f"process {self.pid} executes one program after the other, or is ending", pid=self.pid)

    def read(self, slot: int, pages: ArrayLike, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Return the contents of ``pages`` as uint8[k, page_size], in ``out`` if it is given. What is not mapped reads as zeros.

        Of port compare, while it logs, what was compared at the last get.
        """
        memslot = self.slots[slot]
        offsets = checked_pages(pages, memslot.npages)
        shape = (len(offsets), memslot.page_size)
        if out is not None and (out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous):
            raise InvalidArgumentError(
                f"an array of shape {out.shape} for {len(offsets)} pages: it must be uint8{shape}, contiguous"
            )
        if isinstance(self._port, ComparePort) and (compared := self._port.compared(memslot)) is not None:
            return np.take(compared, offsets, axis=0, out=out, mode="clip")
        contents = np.empty(shape, np.uint8) if out is None else out
        # Where nothing was mapped at the last look, not what has been mapped since: the next get reports that, but not what comes
        # and goes until then.
        there = np.ones(len(offsets), np.bool_)
        for start, end in self._follows.holes(memslot):
            first, after = ((address - memslot.host_address) // memslot.page_size for address in (start, end))
            there &= (offsets < first) | (offsets >= after)
        if there.all():
            self._read(memslot, offsets, contents)
        else:
            contents[:] = 0
            part = np.empty((int(np.count_nonzero(there)), memslot.page_size), np.uint8)
            self._read(memslot, offsets[there], part)
            contents[there] = part
        return contents

    def _read(self, slot: MemorySlot, offsets: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        if len(offsets):
            read_runs(self.pid, runs_of(offsets, slot.host_address, slot.page_size), out.reshape(-1))

    def write(self, slot: int, pages: ArrayLike, data: ArrayLike) -> None:
        """Write uint8[k, page_size] to ``pages``; the kernel logs that as it logs the process's own writes."""
        memslot = self.slots[slot]
        offsets = checked_pages(pages, memslot.npages)
        contents = np.ascontiguousarray(data, np.uint8)
        if contents.shape != (len(offsets), memslot.page_size):
            raise InvalidArgumentError(
                f"data of shape {contents.shape} for {len(offsets)} pages: it must be ({len(offsets)}, {memslot.page_size})"
            )
        if len(offsets):
            write_runs(self.pid, runs_of(offsets, memslot.host_address, memslot.page_size), contents.reshape(-1))

    @property
    def paused(self) -> bool:
        """Whether its threads stand still."""
        return self._freezer.frozen or (self._launched is not None and not self._launched.started)

    def pause(self) -> None:
        """Return when none of its threads runs. Neither it nor its parent sees that; should we die, it runs on."""
        self._freezer.freeze()

    def resume(self) -> None:
        """Let it run on; a program that was started here stands still until the first call."""
        self._freezer.thaw()
        if self._launched is not None:
            self._launched.go()

    def ending(self, seconds: float) -> bool:
        """Wait so long, or less if a program that was started here ends; return whether it does, and stands still for a last get.

        :meth:`close` then lets it end.
        """
        if self._launched is None:
            time.sleep(seconds)
            return False
        return self._launched.ending.wait(seconds)

    def check_alive(self) -> None:
        """Raise :class:`TargetGoneError` if the process has ended."""
        if self._closed:
            raise DirtyLogError("this memory is closed")
        if self._has_ended():
            raise TargetGoneError(f"process {self.pid} has ended", pid=self.pid)

    def _has_ended(self) -> bool:
        return bool(select.select([self._pidfd], [], [], 0)[0])

    def close(self) -> None:
        """Let the process go: nothing of this is left in it. A second call does nothing."""
        if not self._closed:
            self._closed = True
            with self.slots.lock:
                for slot in self.slots:
                    slot.dirty_bitmap = None
                self._resources.close()
                if self._launched is not None:
                    self._launched.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- the port

    def _choose(self, wanted: ProcessPorts) -> ProcessPort | SoftDirtyPort | ComparePort:
        choices: dict[ProcessPorts, Callable[[], ProcessPort | SoftDirtyPort | ComparePort]] = {
            ProcessPorts.UFFD: self._uffd_port,
            ProcessPorts.SOFT_DIRTY: self._soft_dirty_port,
            ProcessPorts.COMPARE: self._compare_port,
        }
        if wanted is not ProcessPorts.AUTO:
            return choices[wanted]()
        reasons: list[str] = []
        for name, make in choices.items():
            try:
                port = make()
            except (UnsupportedError, AccessDeniedError) as error:
                if name is ProcessPorts.COMPARE:
                    raise
                reasons.append(f"{name.value}: {error}")
            else:
                self.fallback = "; ".join(reasons)
                return port
        raise AssertionError

    def _uffd_port(self) -> ProcessPort:
        port = ProcessPort(self._attach, self.check_alive)
        # The first attach, which says whether there can be any.
        port.open()
        return port

    def _soft_dirty_port(self) -> SoftDirtyPort:
        missing = missing_soft_dirty()
        if missing is not None:
            raise missing
        return SoftDirtyPort(self.pid, self._freezer)

    def _compare_port(self) -> ComparePort:
        for mapping in read_mappings(self.pid):
            if mapping.permissions[0] == "r" and not mapping.of_the_kernel:
                read_runs(self.pid, np.array([[mapping.start, 8]], np.uint64), np.empty(8, np.uint8))
                break
        return ComparePort(self._read_range)

    def _attach(self) -> tuple[Userfaultfd, Pagemap]:
        pagemap = Pagemap(self.pid)
        try:
            uffd = None if self._launched is None else self._launched.userfaultfd()
            self.attached = Attached.STARTED
            if uffd is None:
                uffd, self.attached = attach(self.pid)
        except BaseException:
            pagemap.close()
            raise
        return uffd, pagemap

    def _read_range(self, slot: MemorySlot, first: int, out: NDArray[np.uint8]) -> None:
        nbytes = out.nbytes
        start = slot.host_address + first * slot.page_size
        read_runs(self.pid, np.array([[start, nbytes]], np.uint64), out.reshape(-1))

    def _follow_exec(self) -> None:
        """Begin anew with the program that the process executes now: all that it has is new."""
        self._follows.forget(self)
        self._port.close()
        self._leave_space()
        self._space = Pagemap(self.pid)
        self._programs += 1

    def _leave_space(self) -> None:
        space, self._space = self._space, None
        if space is not None:
            space.close()


def _open_process(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OverflowError as error:
        raise InvalidArgumentError(f"{pid} is not a process id: it is too large") from error
    except OSError as error:
        if pid > 0:
            check_has_memory(pid, read_status(pid))
        if error.errno == errno.EINVAL:
            raise InvalidArgumentError(f"{pid} is not a process id", pid=pid) from error
        raise TargetGoneError(f"there is no process {pid}", pid=pid) from error

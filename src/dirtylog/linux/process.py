"""The memory of another process: each of its mappings is a slot."""

from __future__ import annotations

import errno
import os
import select
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from dirtylog.bitmap import DirtyBitmap, checked_pages
from dirtylog.compare import ComparePort
from dirtylog.errors import AccessDeniedError, DirtyLogError, InvalidArgumentError, TargetGoneError, UnsupportedError
from dirtylog.linux.attach import Attached, attach
from dirtylog.linux.freezer import Freezer
from dirtylog.linux.mappings import Mapping, PageSizes, Selection, read_mappings
from dirtylog.linux.pagemap import Pagemap
from dirtylog.linux.pins import NO_PINS, Pins, pins_of
from dirtylog.linux.placement import Kind, Piece, Placed, plan
from dirtylog.linux.process_port import ProcessPort
from dirtylog.linux.reading import read_runs, runs_of, write_runs
from dirtylog.linux.soft_dirty import SoftDirtyPort, missing_soft_dirty
from dirtylog.linux.uffd_port import UffdPort
from dirtylog.log import stop_logging
from dirtylog.memslot import MEM_MAX_NR_PAGES, MemorySlot, SlotTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType

    from numpy.typing import ArrayLike, NDArray

    from dirtylog.linux.userfaultfd import Userfaultfd
    from dirtylog.port import Exactness
    from dirtylog.words import DirtyWords

PORTS = ("auto", "uffd", "soft-dirty", "compare")
_SLOTS_PER_SPACE = 1 << 15
_ADDRESS_SPACES = 1 << 15


class Skipped(NamedTuple):
    """A mapping that is not logged, and why."""

    mapping: Mapping
    reason: str


@dataclass(frozen=True, slots=True)
class ProcessStats:
    """Counters. ``programs`` is how many programs the process was seen to execute, ``skipped`` how many mappings are not logged."""

    mappings: int
    skipped: int
    programs: int


class ProcessMemory:
    """Another process, which runs on all the time; a :class:`~dirtylog.memory.Memory`, and a context manager.

    ``port`` is "uffd", "soft-dirty", "compare", or "auto": the first of these that works, and ``fallback`` says why not one before.
    ``maps`` are words of a :class:`~dirtylog.linux.mappings.Selection`. The slots follow the mappings at each
    :meth:`~dirtylog.dirty_log.DirtyLog.update`; ``skipped`` are those that cannot be logged.

    Raises :class:`TargetGoneError`, :class:`AccessDeniedError`, :class:`UnsupportedError`, :class:`InvalidArgumentError`.
    """

    def __init__(self, pid: int, *, port: str = "auto", maps: Sequence[str] = ()) -> None:
        if port not in PORTS:
            raise InvalidArgumentError(f"unknown port {port!r}; for a process it is one of: {', '.join(PORTS)}")
        self.pid = pid
        self.skipped: tuple[Skipped, ...] = ()
        self.fallback = ""
        self.attached = Attached.NOT
        self.slots = SlotTable(address_spaces=_ADDRESS_SPACES, slots_per_space=_SLOTS_PER_SPACE)
        self._selection = Selection(tuple(maps))
        self._placed: list[Placed] = []
        self._numbers = 0
        self._programs = 1
        self._pins: Pins = NO_PINS
        self._closed = False
        self._pidfd = _open_process(pid)
        try:
            self._space = Pagemap(pid)
            self._freezer = Freezer(pid)
            self._port = self._choose(port)
            self.update_slots()
        except BaseException:
            self._give_up()
            raise

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
        return tuple(self._gaps())

    @property
    def stats(self) -> ProcessStats:
        """What was counted so far."""
        return ProcessStats(len(self._placed), len(self.skipped), self._programs)

    def update_slots(self) -> list[MemorySlot]:
        """Make slots of new mappings, and return them; drop those of mappings that are gone, or are others now."""
        self.check_alive()
        with self.slots.lock:
            if not self._space.alive():
                self._follow_exec()
            mappings = [one for one in read_mappings(self.pid) if not one.of_the_kernel and one in self._selection]
            self._pins = pins_of(self.pid)
            todo = plan(self._placed, mappings)
            for one in todo.remove:
                stop_logging(self, one.slot.id)
            added, skipped = self._make_slots(todo.pieces)
            self.slots.change((one.slot for one in todo.remove), (one.slot for one in added))
            self._placed = sorted((*todo.keep, *added), key=lambda one: one.start)
            self.skipped = tuple(skipped)
            self._mark_holes(todo.keep)
            self._mark_pins()
        return [one.slot for one in added]

    def read(self, slot: int, pages: ArrayLike, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Return the contents of ``pages`` as uint8[k, page_size], in ``out`` if it is given. What is not mapped reads as zeros."""
        memslot = self.slots[slot]
        offsets = checked_pages(pages, memslot.npages)
        shape = (len(offsets), memslot.page_size)
        if out is not None and (out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous):
            raise InvalidArgumentError(
                f"an array of shape {out.shape} for {len(offsets)} pages: it must be uint8{shape}, contiguous"
            )
        contents = np.empty(shape, np.uint8) if out is None else out
        if len(offsets):
            read_runs(self.pid, runs_of(offsets, memslot.host_address, memslot.page_size), contents.reshape(-1))
        return contents

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

    def pause(self) -> None:
        """Return when none of its threads runs. Neither it nor its parent sees that; should we die, it runs on."""
        self._freezer.freeze()

    def resume(self) -> None:
        """Let it run on."""
        self._freezer.thaw()

    def check(self) -> None:
        """Do nothing: what a process does wrong is its own affair."""

    def check_alive(self) -> None:
        """Raise :class:`TargetGoneError` if the process has ended."""
        if self._closed:
            raise DirtyLogError("this memory is closed")
        if select.select([self._pidfd], [], [], 0)[0]:
            raise TargetGoneError(f"process {self.pid} has ended", pid=self.pid)

    def close(self) -> None:
        """Let the process go: nothing of this is left in it. A second call does nothing."""
        if not self._closed:
            self._closed = True
            with self.slots.lock:
                for slot in self.slots:
                    slot.dirty_bitmap = None
                self._port.close()
                self._give_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    # --- the port

    def _choose(self, wanted: str) -> ProcessPort | SoftDirtyPort | ComparePort:
        choices: dict[str, Callable[[], ProcessPort | SoftDirtyPort | ComparePort]] = {
            "uffd": self._uffd_port,
            "soft-dirty": self._soft_dirty_port,
            "compare": self._compare_port,
        }
        if wanted != "auto":
            return choices[wanted]()
        reasons: list[str] = []
        for name, make in choices.items():
            try:
                port = make()
            except (UnsupportedError, AccessDeniedError) as error:
                if name == "compare":
                    raise
                reasons.append(f"{name}: {error}")
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
            uffd, self.attached = attach(self.pid)
        except BaseException:
            pagemap.close()
            raise
        return uffd, pagemap

    def _read_range(self, slot: MemorySlot, first: int, out: NDArray[np.uint8]) -> None:
        nbytes = out.nbytes
        start = slot.host_address + first * slot.page_size
        read_runs(self.pid, np.array([[start, nbytes]], np.uint64), out.reshape(-1))

    # --- slots

    def _follow_exec(self) -> None:
        """Begin anew with the program that the process executes now: all that it has is new."""
        for one in self._placed:
            stop_logging(self, one.slot.id)
        self.slots.change([one.slot for one in self._placed], ())
        self._placed = []
        self._port.close()
        self._space.close()
        self._space = Pagemap(self.pid)
        self._programs += 1

    def _make_slots(self, pieces: Iterable[Piece]) -> tuple[list[Placed], list[Skipped]]:
        added: list[Placed] = []
        skipped: list[Skipped] = []
        for mapping, span in pieces:
            error = self._port.refuses(span.start, span.end - span.start)
            if error is not None:
                skipped.append(Skipped(mapping, _reason(error)))
            else:
                added += self._slots_of(mapping, span.start, span.end)
        return added, skipped

    def _slots_of(self, mapping: Mapping, start: int, end: int) -> Iterator[Placed]:
        """Make the slots of a part of a mapping: one, unless it is larger than a slot can be."""
        page_size = PageSizes(self.pid).of(mapping)
        largest = MEM_MAX_NR_PAGES // 64 * 64 * page_size
        for first in range(start, end, largest):
            space, number = divmod(self._numbers, _SLOTS_PER_SPACE)
            self._numbers += 1
            slot = MemorySlot(
                space % _ADDRESS_SPACES << 16 | number,
                first // page_size,
                (min(end, first + largest) - first) // page_size,
                page_size,
                host_address=first,
                name=mapping.name,
                permissions=mapping.permissions,
                anonymous=mapping.anonymous,
            )
            yield Placed(slot, Kind.of(mapping))

    def _mark_holes(self, placed: Iterable[Placed]) -> None:
        """Count what has been unmapped in the middle of a slot as written: it reads as zeros now."""
        for one in placed:
            if one.new_holes:
                with self._port.mmu_lock:
                    if one.slot.dirty_bitmap is not None:
                        one.slot.dirty_bitmap.merge(_words(one.slot, one.holes))

    def _mark_pins(self) -> None:
        if not isinstance(self._port, UffdPort):
            return
        spans = sorted((address, address + nbytes) for address, nbytes in self._pins.ranges)
        self._port.always = {}
        for one in self._placed if spans else ():
            inside = [(max(start, one.start), min(end, one.end)) for start, end in spans if start < one.end and one.start < end]
            if inside:
                self._port.always[one.slot] = _words(one.slot, inside)

    def _gaps(self) -> Iterator[str]:
        for mapping, reason in self.skipped:
            if mapping.permissions[1] == "w":
                yield f"{mapping.start:#x}-{mapping.end:#x} {mapping.name} is not logged: {reason}"
        if not isinstance(self._port, ComparePort):
            if self._pins.unexplained:
                yield f"{self._pins.unexplained} bytes are pinned for a device (VmPin), whose writes are not seen"
            shared = [one.slot for one in self._placed if one.kind.shared and one.slot.permissions[1] == "w"]
            if shared:
                example = shared[0].name or hex(shared[0].host_address)
                yield f"{len(shared)} mappings are shared (as {example}): what others write there is not seen"

    def _give_up(self) -> None:
        self._freezer.thaw()
        self._space.close()
        os.close(self._pidfd)


def _words(slot: MemorySlot, spans: Iterable[tuple[int, int]]) -> DirtyWords:
    """Return the pages of a slot that spans of addresses touch, which lie within it, ascending; two may share a page."""
    pages = DirtyBitmap(slot.npages)
    for start, end in spans:
        first = (start - slot.host_address) // slot.page_size
        pages.set_range(first, -(-(end - slot.host_address) // slot.page_size) - first)
    return pages.nonzero_words()


def _open_process(pid: int) -> int:
    if pid == os.getpid():
        raise InvalidArgumentError(f"{pid} is this process", pid=pid, remedy="use dirtylog.track for memory of its own")
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno == errno.EINVAL and pid > 0:
            raise InvalidArgumentError(f"{pid} is a thread, not a process", pid=pid, remedy="name its process (Tgid)") from error
        if error.errno in (errno.EINVAL, errno.EOVERFLOW):
            raise InvalidArgumentError(f"{pid} is not a process id", pid=pid) from error
        raise TargetGoneError(f"there is no process {pid}", pid=pid) from error


def _reason(error: DirtyLogError) -> str:
    reasons = {
        errno.EBUSY: "the process watches it with a userfaultfd of its own",
        errno.EPERM: "it maps a file that may not be written",
        errno.EINVAL: "the kernel does not watch that kind of memory",
    }
    return reasons.get(error.errno or 0, str(error))

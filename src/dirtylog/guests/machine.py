"""What every guest's memory shares, emulated or KVM's: contents, and vCPUs that run together."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, Self, TypeVar

import numpy as np

from dirtylog.bitmap import checked_pages
from dirtylog.errors import InvalidArgumentError
from dirtylog.guests.state import SavedVcpu
from dirtylog.guests.vcpu import Vcpu
from dirtylog.port import Port
from dirtylog.words import words_of_pages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from numpy.typing import ArrayLike, NDArray

    from dirtylog.guests.baseline import Baseline
    from dirtylog.guests.cpu import Cpu
    from dirtylog.guests.image import Segment
    from dirtylog.memslot import MemorySlot, SlotTable
    from dirtylog.port import Exactness

MAX_VCPUS = 8
RAM_SLOT = 0
"""Where a guest's memory begins, at guest-physical address 0."""
ROM_SLOT = 1
"""A built-in guest's program, which it cannot write."""

P_co = TypeVar("P_co", bound=Port, covariant=True)


class Machine(ABC, Generic[P_co]):
    """Slots, their contents, vCPUs and a port: a :class:`~dirtylog.memory.Memory`, and a context manager.

    It starts paused.
    """

    def __init__(self, slots: SlotTable, page_size: int) -> None:
        self.slots = slots
        self.page_size = page_size
        self.vcpus: list[Vcpu] = []
        self._running = False
        self._closed = False

    @property
    @abstractmethod
    def port(self) -> P_co:
        """How this memory logs."""

    @abstractmethod
    def contents(self, slot: MemorySlot) -> NDArray[np.uint8]:
        """Return the live memory of a slot, uint8[npages, page_size]. What is written to it goes past the log: for reading."""

    @property
    @abstractmethod
    def faults(self) -> int | None:
        """Page faults that the guest has taken, as far as is known; None where nobody counts."""

    @property
    def exactness(self) -> Exactness:
        """How what is reported relates to what was written."""
        return self.port.exactness

    @property
    def blind_spots(self) -> tuple[str, ...]:
        """The writes that this source cannot see."""
        return self.port.blind_spots

    @property
    def incomplete(self) -> tuple[str, ...]:
        """Why writes may have been missed: nothing is known."""
        return ()

    @property
    def held(self) -> int:
        """Bytes that hold something: all of the guest's memory."""
        return sum(slot.nbytes for slot in self.slots)

    def update_slots(self) -> list[MemorySlot]:
        """Return no new slots: those of a guest come with ``add_slot``."""
        return []

    def read(self, slot: int, pages: ArrayLike, out: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        """Return the contents of ``pages`` (offsets in the slot) as uint8[k, page_size], in ``out`` if it is given."""
        memslot = self.slots[slot]
        offsets = checked_pages(pages, memslot.npages)
        return np.take(self.contents(memslot), offsets, axis=0, out=out, mode="clip")

    def write(self, slot: int, pages: ArrayLike, data: ArrayLike) -> None:
        """Write uint8[k, page_size] to ``pages``, and log them.

        Both under mmu_lock, so that no get comes between, and the bits first, so that an interrupt loses none.
        """
        memslot = self.slots[slot]
        offsets = checked_pages(pages, memslot.npages)
        pages_of_data = np.asarray(data, np.uint8)
        if pages_of_data.shape != (len(offsets), self.page_size):
            raise InvalidArgumentError(
                f"data of shape {pages_of_data.shape} for {len(offsets)} pages: it must be ({len(offsets)}, {self.page_size})"
            )
        with self.port.mmu_lock:
            if memslot.dirty_bitmap is not None:
                memslot.dirty_bitmap.merge(words_of_pages(offsets))
            self.contents(memslot)[offsets] = pages_of_data

    def load(self, address: int, data: bytes, nbytes: int | None = None) -> None:
        """Copy a program to a guest-physical address, and zeros after it up to ``nbytes``; unlogged, before the guest runs."""
        nbytes = len(data) if nbytes is None else nbytes
        slot, offset = self.locate(address, nbytes, _no_room(nbytes, address))
        flat = self.contents(slot).reshape(-1)
        flat[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
        flat[offset + len(data) : offset + nbytes] = 0

    def load_segments(self, segments: tuple[Segment, ...]) -> None:
        """Load an image."""
        for segment in segments:
            slot, _ = self.locate(segment.address, segment.nbytes, _no_room(segment.nbytes, segment.address))
            if slot.readonly:
                raise InvalidArgumentError(f"{_no_room(segment.nbytes, segment.address)}: the guest's own tables lie there")
            self.load(*segment)

    def locate(self, address: int, nbytes: int, refusal: str) -> tuple[MemorySlot, int]:
        """Return the slot that holds ``nbytes`` at a guest-physical address, and their byte offset in it."""
        slot = self.slots.find(address // self.page_size)
        offset = 0 if slot is None else address - slot.base_gfn * self.page_size
        if slot is None or nbytes > slot.nbytes - offset:
            raise InvalidArgumentError(f"{refusal}: no slot holds all of it")
        return slot, offset

    # --- vCPUs

    def _add_vcpu(self, make_cpu: Callable[[int], Cpu], flushed: Callable[[int], None]) -> Vcpu:
        if self._running:
            raise InvalidArgumentError("cannot add a vCPU while the machine runs", remedy="pause it first")
        index = len(self.vcpus)
        if index >= MAX_VCPUS:
            raise InvalidArgumentError(f"vCPU number {index + 1}: a machine has at most {MAX_VCPUS}")
        vcpu = Vcpu(index, lambda: make_cpu(index), flushed)
        self.vcpus.append(vcpu)
        return vcpu

    @property
    def paused(self) -> bool:
        """Whether no vCPU may run."""
        return not self._running

    def pause(self) -> None:
        """Return when no vCPU is in the guest."""
        self._running = False
        for vcpu in self.vcpus:
            vcpu.request_pause()
        for vcpu in self.vcpus:
            vcpu.wait_outside()

    def resume(self) -> None:
        """Let every vCPU that has not halted or faulted run."""
        self._running = True
        for vcpu in self.vcpus:
            vcpu.resume()

    def ending(self, seconds: float) -> bool:
        """Wait so long, and return False: a guest has no end of its own."""
        time.sleep(seconds)
        return False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until every vCPU has halted; return whether all have. Raises the error of one that faulted."""
        waited = [vcpu.wait(timeout) for vcpu in self.vcpus]
        self.check()
        return all(waited)

    def check(self) -> None:
        """Raise the error of the first vCPU that faulted, if any."""
        for vcpu in self.vcpus:
            if vcpu.error is not None:
                raise vcpu.error

    def reset(self) -> None:
        """Pause, and set every vCPU's registers to what they were at first. Memory stays as it is."""
        self.pause()
        for vcpu in self.vcpus:
            vcpu.reset()

    # --- state

    def vcpu_states(self) -> list[bytes]:
        """Return the state of each vCPU, for :meth:`load_vcpu_states` of a machine of the same kind, here or in another process.

        Registers, and whether it has halted or faulted; what memory holds is not in it. The machine must be paused.
        """
        self.check_paused()
        return [vcpu.save().to_bytes() for vcpu in self.vcpus]

    def load_vcpu_states(self, states: Sequence[bytes]) -> None:
        """Set every vCPU to a state from :meth:`vcpu_states`, after the contents of memory that go with them. All or none are set.

        The machine must be paused. :class:`CorruptDataError` for bytes that do not verify, :class:`InvalidArgumentError` for the
        states of another kind of machine, or of another number of vCPUs.
        """
        self.check_paused()
        vcpus = self.vcpus
        if len(states) != len(vcpus):
            raise InvalidArgumentError(f"{len(states)} states for {len(vcpus)} vCPUs")
        saved = [SavedVcpu.from_bytes(state) for state in states]
        before = [vcpu.snapshot() for vcpu in vcpus]
        try:
            for vcpu, state in zip(vcpus, saved, strict=True):
                vcpu.load(state)
        except BaseException:
            for vcpu, snapshot in zip(vcpus, before, strict=True):
                vcpu.put_back(snapshot)
            raise

    def reset_to(self, baseline: Baseline) -> int:
        """Put back what was written since the baseline was taken, and every vCPU's registers; return how many pages that were.

        The machine must be paused, and logged by the baseline's log. :meth:`Baseline.reset` says what else holds.
        """
        if baseline.memory is not self:
            raise InvalidArgumentError("a baseline of another memory")
        return baseline.reset()

    def check_paused(self) -> None:
        """Raise :class:`InvalidArgumentError` if the vCPUs may run."""
        if self._running:
            raise InvalidArgumentError("the machine is running", remedy="pause it first")

    def close(self) -> None:
        """End the vCPU threads. A second call does nothing."""
        if not self._closed:
            self._closed = True
            for vcpu in self.vcpus:
                vcpu.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _no_room(nbytes: int, address: int) -> str:
    return f"a program of {nbytes} bytes does not fit at address {address:#x}"

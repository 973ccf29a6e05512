"""What a soak logs: memories whose writers never stop, but to be compared."""

from __future__ import annotations

import ctypes
import os
from abc import ABC, abstractmethod
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self

import numpy as np

import dirtylog
from churners import Churner, standing_still
from dirtylog.buffers.memory import BUFFER_SLOT, BufferMemory
from dirtylog.emulated.arch import PORTS
from dirtylog.emulated.isa import ISAS
from dirtylog.guests.machine import RAM_SLOT
from dirtylog.guests.programs import Pattern
from dirtylog.linux.process import ProcessMemory
from scribblers import KINDS, THREADS, _Area, _library
from shadows import Shadow
from sources import open_source

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from numpy.typing import NDArray

    from dirtylog import Memory, MemorySlot
    from dirtylog.emulated.machine import EmulatedMemory
    from dirtylog.kvm.memory import KvmMemory

SOURCE_BYTES = 1 << 20
_PAUSE_US = 300


class Subject(ABC):
    """A memory and its writers, which stand still at first; a context manager."""

    memory: Memory
    follows = False
    """Whether its slots come and go by themselves."""

    def __init__(self) -> None:
        self._resources = ExitStack()

    @contextmanager
    @abstractmethod
    def still(self) -> Iterator[None]:
        """Stop the writers meanwhile; then they run, if they did before or not."""

    @abstractmethod
    def contents(self, slot: MemorySlot) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield the contents of a slot in pieces, each with its first page, past what is tested. The writers stand still."""

    @abstractmethod
    def writes(self) -> int:
        """Return how many writes there were so far. The writers stood still a moment ago, at the least."""

    @abstractmethod
    def check(self) -> None:
        """Raise what has gone wrong with the writers, if anything."""

    def scribble(self, rng: Random) -> None:
        """Write some pages through the memory itself, if that does no harm."""
        slot = self.memory.slots[RAM_SLOT]
        pages = np.unique([rng.randrange(slot.npages) for _ in range(rng.randint(1, 8))])
        contents = self.memory.read(slot.id, pages)
        # The first word is the guest's, and counts its stores.
        contents[:, 8:] ^= np.uint8(rng.randint(1, 255))
        self.memory.write(slot.id, pages, contents)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()


class Guest(Subject):
    """A guest, emulated or KVM's, whose vCPUs store for ever to windows that overlap.

    Each vCPU's values begin with its own number, and count up: so the largest one that is left of each says how many it has stored.
    """

    memory: EmulatedMemory | KvmMemory

    def __init__(self, source: str, rng: Random) -> None:
        super().__init__()
        isa = None if source.startswith("kvm-") else ISAS.get(PORTS[source].isa)
        self._word = np.dtype(f"{'>' if isa and isa.byte_order == 'big' else '<'}u{isa.word_bytes if isa else 8}")
        self._shift = 60 if self._word.itemsize == 8 else 27
        vcpus, window = rng.choice((1, 2, 2, 3)), 1 << rng.randint(5, 11)
        npages = 2 * window + rng.randint(1, 200)
        self._loops = [
            Pattern(
                base=rng.randint(0, npages - window) << 12,
                page=rng.randrange(window),
                mul=rng.choice((1, 5, 1664525)),
                add=rng.randrange(1, window, 2),
                mask=window - 1,
                value=index << self._shift,
            )
            for index in range(vcpus)
        ]
        self.memory = self._resources.enter_context(  # type: ignore[assignment]  # a guest's name makes a guest
            open_source(source, npages << 12, vcpus=vcpus, loops=self._loops)
        )

    @contextmanager
    def still(self) -> Iterator[None]:
        self.memory.pause()
        yield
        self.memory.resume()

    def contents(self, slot: MemorySlot) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        yield 0, self.memory.contents(slot)

    def writes(self) -> int:
        pages = self.memory.contents(self.memory.slots[RAM_SLOT])
        words = pages[:, : self._word.itemsize].copy().view(self._word).ravel().astype(np.uint64)
        words = words[words != 0]
        owner, number = words >> np.uint64(self._shift), words & np.uint64((1 << self._shift) - 1)
        return sum(int(number[owner == index].max(initial=0)) + 1 for index in range(len(self._loops)))

    def check(self) -> None:
        self.memory.check()


class _Crew(ctypes.Structure):
    """The head of struct crew in scribblers.c."""

    _fields_ = (
        ("areas", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("nareas", "nthreads", "pause_us")),
        *((name, ctypes.c_int) for name in ("source", "holding", "held", "over")),
        *((name, ctypes.c_long) for name in ("next", "windows", "discards")),
    )


class Buffer(Subject):
    """A buffer of this process that C threads scribble over; ``writes`` counts the windows, of up to 48 pages each."""

    def __init__(self, port: str, rng: Random) -> None:
        super().__init__()
        kind = KINDS[rng.choice(("plain", "thp", "shared"))](self._resources)
        self._octets = kind.area.octets
        self.memory = self._resources.enter_context(BufferMemory(self._octets, port=port))
        source = os.memfd_create("source")
        self._resources.callback(os.close, source)
        os.write(source, rng.randbytes(SOURCE_BYTES))
        self._library: Any = _library()
        areas = (_Area * 1)(kind.stored)
        self._crew: int = self._library.scribble_start(areas, 1, THREADS, source, _PAUSE_US, rng.getrandbits(32))
        self._resources.callback(self._library.scribble_stop, self._crew)

    @contextmanager
    def still(self) -> Iterator[None]:
        self._library.scribble_hold(self._crew)
        yield
        self._library.scribble_go(self._crew)

    def contents(self, slot: MemorySlot) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        assert slot.id == BUFFER_SLOT
        yield 0, self._octets.reshape(slot.npages, slot.page_size)

    def writes(self) -> int:
        # Safe: the crew lives until scribble_stop, and a long is read in one access.
        return int(_Crew.from_address(self._crew).windows)

    def check(self) -> None:
        """Nothing can go wrong with them but that they crash."""


class Contents(Shadow):
    """The contents of another process, read past the library."""

    def __init__(self, memory: ProcessMemory) -> None:
        self._memory = memory

    def pieces(self, slot: MemorySlot) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yield them, each with its first page."""
        fd = os.open(f"/proc/{self._memory.pid}/mem", os.O_RDONLY)
        try:
            yield from self._contents(fd, slot)
        finally:
            os.close(fd)


class Process(Subject):
    """Another process, whose mappings churn too. ``writes`` counts the stores to pages one by one."""

    follows = True
    memory: ProcessMemory

    def __init__(self, port: str, rng: Random) -> None:
        super().__init__()
        self.churner = self._resources.enter_context(Churner(rng.randrange(1, 1 << 30)))
        self._how = rng.choice(("pause", "hold"))
        memory = dirtylog.open(f"pid:{self.churner.pid}", port=port)
        assert isinstance(memory, ProcessMemory)
        self.memory = self._resources.enter_context(memory)
        self._contents = Contents(memory)

    @contextmanager
    def still(self) -> Iterator[None]:
        with standing_still(self.churner, self.memory, self._how):
            # Threads that rest by their own doing are scheduled still, and then the kernel stores the processor's number (rseq).
            self.memory.pause()
            yield
            self.memory.resume()

    def contents(self, slot: MemorySlot) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        yield from self._contents.pieces(slot)

    def writes(self) -> int:
        return self.churner.counts().stores

    def check(self) -> None:
        missing = [reason for reason in self.memory.incomplete if "is not logged" in reason]
        assert not missing, missing

    def scribble(self, rng: Random) -> None:
        """Write nothing: the churner needs its memory."""

"""puppet.c: a process whose memory the test changes by one store and one system call at a time; and what a log says of it."""

from __future__ import annotations

import os
import select
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

import pytest

import dirtylog
from address_space import ANONYMOUS, FIXED, PAGE, PRIVATE, READ, WRITE
from built import built
from dirtylog.linux import process_slots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from dirtylog import DirtyBitmap, DirtyLog, MemorySlot
    from dirtylog.linux.process import ProcessMemory

_MMAP, _MPROTECT, _MUNMAP, _BRK, _MREMAP, _MADVISE = 9, 10, 11, 12, 25, 28
_READ, _OPEN, _CLOSE, _FTRUNCATE, _PREAD64, _MEMFD_CREATE = 0, 2, 3, 77, 17, 319
_REPLY_SECONDS = 30.0


class Puppet:
    """A running puppet.c; a context manager. Addresses are its own."""

    def __init__(self, *, user: int | None = None) -> None:
        self._process = subprocess.Popen(
            (built("puppet.c"),), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, user=user
        )
        self.pid = self._process.pid
        self._said = b""
        self.scratch = 0
        self.wait_until_ready()

    # --- orders

    def orders(self, *texts: str) -> list[str]:
        """Give orders, all at once, and return the answers."""
        assert self._process.stdin is not None
        self._process.stdin.write("".join(f"{text}\n" for text in texts).encode())
        return [self.line() for _ in texts]

    def order(self, text: str) -> int:
        """Give an order whose answer is a number; :class:`OSError` for one that says so."""
        answer = int(self.orders(text)[0])
        if -4096 < answer < 0:
            raise OSError(-answer, os.strerror(-answer))
        return answer

    def say(self, text: str) -> None:
        """Give an order to which there is no answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n".encode())

    def call(self, number: int, *arguments: int) -> int:
        """Make a system call."""
        return self.order(" ".join(map(str, ("call", number, *(one & (1 << 64) - 1 for one in arguments)))))

    def line(self) -> str:
        """Return the next line that it says."""
        assert self._process.stdout is not None
        while b"\n" not in self._said:
            ready, _, _ = select.select([self._process.stdout], [], [], _REPLY_SECONDS)
            said = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
            assert said, f"the puppet says nothing: {self._process.poll()}"
            self._said += said
        line, _, self._said = self._said.partition(b"\n")
        return line.decode()

    def wait_until_ready(self) -> None:
        """Read how it introduces itself: after its start, and after it has executed itself."""
        word, pid, scratch = self.line().split()
        assert (word, int(pid)) == ("ready", self.pid)
        self.scratch = int(scratch)

    # --- memory

    def map(
        self,
        npages: int,
        flags: int = PRIVATE | ANONYMOUS,
        *,
        at: int = 0,
        protection: int = READ | WRITE,
        fd: int = -1,
        offset: int = 0,
        page_size: int = PAGE,
    ) -> int:
        """Map pages, in the place of what is ``at`` an address if it is given; return the address."""
        flags |= FIXED if at else 0
        return self.call(_MMAP, at, npages * page_size, protection, flags, fd, offset)

    def unmap(self, address: int, npages: int) -> None:
        self.call(_MUNMAP, address, npages * PAGE)

    def protect(self, address: int, npages: int, protection: int) -> None:
        self.call(_MPROTECT, address, npages * PAGE, protection)

    def advise(self, address: int, npages: int, advice: int) -> None:
        self.call(_MADVISE, address, npages * PAGE, advice)

    def remap(self, address: int, npages: int, new_npages: int, flags: int, target: int = 0) -> int:
        return self.call(_MREMAP, address, npages * PAGE, new_npages * PAGE, flags, target)

    def brk(self, address: int = 0) -> int:
        """Move the end of the heap, or ask for it."""
        return self.call(_BRK, address)

    def store(self, address: int, pages: Iterable[int], value: int = 1, *, page_size: int = PAGE) -> None:
        """Store a byte to each page."""
        self.orders(*(f"fill {address + page * page_size} 1 1 {value}" for page in pages))

    def fill(self, address: int, npages: int, value: int = 1) -> None:
        """Store a byte to each of the pages that follow one another."""
        self.order(f"fill {address} {PAGE} {npages} {value}")

    def touch(self, address: int, npages: int) -> None:
        """Load a byte of each page."""
        self.order(f"touch {address} {PAGE} {npages}")

    def peek(self, address: int, count: int = 8) -> bytes:
        return bytes.fromhex(self.orders(f"peek {address} {count}")[0])

    # --- files

    def poke(self, address: int, data: bytes) -> None:
        self.order(f"poke {address} {data.hex()}")

    def memory_file(self, npages: int, flags: int = 0, *, page_size: int = PAGE) -> int:
        """Return a memfd."""
        self.poke(self.scratch, b"puppet\0")
        fd = self.call(_MEMFD_CREATE, self.scratch, flags)
        self.call(_FTRUNCATE, fd, npages * page_size)
        return fd

    def open(self, path: str, flags: int = os.O_RDWR) -> int:
        """Open a file."""
        self.poke(self.scratch, path.encode() + b"\0")
        return self.call(_OPEN, self.scratch, flags)

    def read_into(self, fd: int, address: int, nbytes: int, offset: int = 0) -> None:
        """Have the kernel write to its memory."""
        assert self.call(_PREAD64, fd, address, nbytes, offset) == nbytes

    def close_file(self, fd: int) -> None:
        self.call(_CLOSE, fd)

    # --- its end

    def wait(self) -> int:
        """Return its exit status once it has ended."""
        return self._process.wait(_REPLY_SECONDS)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Reports:
    """What the gets of one round reported."""

    def __init__(self, dirty: dict[MemorySlot, DirtyBitmap]) -> None:
        self.dirty = dirty

    def at(self, address: int, npages: int, page_size: int = PAGE) -> set[int]:
        """Return the pages reported between an address and another, as offsets from there."""
        found: set[int] = set()
        for slot, dirty in self.dirty.items():
            if address < slot.host_address + slot.nbytes and slot.host_address < address + npages * page_size:
                assert slot.page_size == page_size
                pages = dirty.pages() + (slot.host_address - address) // page_size
                found.update(pages[(pages >= 0) & (pages < npages)].tolist())
        return found

    def count(self) -> int:
        """Return how many pages were reported."""
        return sum(dirty.count() for dirty in self.dirty.values())


def follow(log: DirtyLog) -> Reports:
    """Bring the slots up to date, and get of each."""
    log.update()
    return gets(log)


def gets(log: DirtyLog) -> Reports:
    """Get of each slot that there is."""
    return Reports({slot: log.get(slot.id) for slot in log.memory.slots})


@contextmanager
def logged(puppet: Puppet, *, maps: Sequence[str] | None = None, port: str = "uffd") -> Iterator[tuple[ProcessMemory, DirtyLog]]:
    """Log a puppet."""
    memory = dirtylog.open(f"pid:{puppet.pid}", port=port, maps=maps)
    with memory, dirtylog.DirtyLog(memory) as log:
        yield memory, log  # type: ignore[misc]  # a stand-in


def slot_at(memory: ProcessMemory, address: int) -> MemorySlot:
    """Return the slot that has an address."""
    return next(slot for slot in memory.slots if slot.host_address <= address < slot.host_address + slot.nbytes)


MOMENTS = ("after the mappings were read", "after the slots were made")


@contextmanager
def in_the_middle(memory: ProcessMemory, moment: str, act: Callable[[], None]) -> Iterator[None]:
    """Have something happen once, in an update."""
    read, update = process_slots.read_mappings, memory.update_slots  # type: ignore[attr-defined]  # the name that the module looks up
    left = [act]

    def read_and_act(pid: int) -> object:
        mappings = read(pid)
        if left:
            left.pop()()
        return mappings

    def update_and_act() -> object:
        slots = update()
        if left:
            left.pop()()
        return slots

    with pytest.MonkeyPatch.context() as patch:
        if moment == MOMENTS[0]:
            patch.setattr(process_slots, "read_mappings", read_and_act)
        else:
            patch.setattr(memory, "update_slots", update_and_act)
        yield
    assert not left

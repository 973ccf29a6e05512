"""A KVM guest that dirties as much of a slot as it is asked to, on a thread of its own: the measuring thread runs no guest."""

from __future__ import annotations

import mmap
import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from dirtylog.guests.cpu import CpuExit
from dirtylog.guests.programs import PAGE_SIZE, random, store_loop
from dirtylog.kvm import KvmMemory, add_rom, host_architecture, probe_kvm
from dirtylog.kvm.arch import x86_64_registers as x86

if TYPE_CHECKING:
    from types import TracebackType

    from dirtylog.options import Log

RAM = 0
"""The slot that is filled."""
TINY = 5
"""A slot of one bitmap word, which the guest never writes."""
BASE = 4 << 30
"""Guest address of the slot that is filled: behind x86's hole, so that it may be as long as one likes."""

UNROLLED = 64
_TINY_PAGES = 64
_RFLAGS = 0x2


@dataclass(frozen=True, slots=True)
class Fill:
    """One way of dirtying ``pages`` pages, each once: a program, and the registers that it begins with."""

    program: bytes
    registers: dict[str, int]
    pages: int


def why_no_kvm(log: Log) -> str | None:
    """Return why there can be no such KVM guests with this log here, or None if there can."""
    (facts,) = (facts for facts in probe_kvm().logs if facts.log == log.value)
    if not facts.available:
        return f"skipped: {facts.reason}"
    return None if host_architecture().isa == "x86" else "skipped: these guests are for x86_64"


def touched_memory(npages: int) -> mmap.mmap:
    """Return memory for guests in which every page is there: to fault them in from a guest takes several times as long."""
    memory = mmap.mmap(-1, npages * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    np.frombuffer(memory, np.uint8)[::PAGE_SIZE] = 1
    return memory


def in_a_row(pages: int) -> Fill:
    """Return how to store to the first ``pages`` pages, a multiple of 64, with little more than one instruction a page."""
    assert pages % UNROLLED == 0
    # mov [rdi + k * 4096], rax for k from 0 to 63
    code = b"".join(b"\x48\x89\x87" + (page * PAGE_SIZE).to_bytes(4, "little") for page in range(UNROLLED))
    # add rdi, 64 * 4096; dec rcx
    code += b"\x48\x81\xc7" + (UNROLLED * PAGE_SIZE).to_bytes(4, "little") + b"\x48\xff\xc9"
    # jnz to the beginning; hlt
    code += b"\x0f\x85" + (-len(code) - 6).to_bytes(4, "little", signed=True) + b"\xf4"
    return Fill(code, {"rdi": BASE, "rcx": pages // UNROLLED}, pages)


def at_random(pages: int, npages: int) -> Fill:
    """Return how to store to ``pages`` of ``npages`` pages (a power of two) in a pseudo-random order."""
    walk = random(BASE // PAGE_SIZE, npages, 0, 1)
    names = ("rsi", "r8", "r9", "rdx", "rdi", "rax", "rbx")
    registers = dict(zip(names, walk.registers(), strict=False)) | {"rcx": pages, "r10": 1}
    return Fill(store_loop("x86"), registers, pages)


class FillingGuest:
    """A virtual machine around ``ram``, touched memory; a context manager. It has written every page once."""

    def __init__(self, log: Log, ram: mmap.mmap) -> None:
        self.memory = KvmMemory(log)
        npages = len(ram) // PAGE_SIZE
        everything = in_a_row(npages)
        self._asked: queue.SimpleQueue[Fill | None] = queue.SimpleQueue()
        self._answered: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="filler", daemon=True)
        try:
            self.memory.add_slot(RAM, BASE // PAGE_SIZE, npages, buffer=ram)
            self.memory.add_slot(TINY, 0, _TINY_PAGES)
            # Two programs, each in pages of its own.
            loop = at_random(0, npages).program.ljust(PAGE_SIZE, b"\0")
            self._rom = add_rom(self.memory, BASE + len(ram), loop + everything.program)
            self._unrolled = everything.program
            self.memory.add_vcpu(self._rom, self._rom.program)
        except BaseException:
            self.memory.close()
            raise
        self._thread.start()
        self.fill(everything)

    def fill(self, fill: Fill) -> None:
        """Have the guest do it, and return when it has."""
        self._asked.put(fill)
        error = self._answered.get()
        if error is not None:
            raise error

    def _serve(self) -> None:
        cpu = self.memory.cpus[0]
        while (fill := self._asked.get()) is not None:
            entry = self._rom.program + (PAGE_SIZE if fill.program == self._unrolled else 0)
            try:
                cpu.vcpu.put(x86.Regs(rip=entry, rflags=_RFLAGS, **fill.registers))
                while not isinstance(reason := cpu.run(), CpuExit):
                    reason()
                assert reason is CpuExit.HALTED
            except BaseException as error:  # noqa: BLE001 - raised where it was asked for
                self._answered.put(error)
            else:
                self._answered.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._asked.put(None)
        self._thread.join()
        self.memory.close()

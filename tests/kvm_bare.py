"""KVM guests of a few instructions, whose vCPUs tests drive by hand; and what such guests hold of this process."""

from __future__ import annotations

import gc
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dirtylog.guests.machine import RAM_SLOT
from dirtylog.kvm.guest import add_rom
from dirtylog.kvm.memory import KvmMemory
from dirtylog.kvm.vcpu import KICK_SIGNAL
from dirtylog.options import Backing, Log

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dirtylog.kvm.vcpu import KvmVcpu

PAGE = 4096
RAM_PAGES = 64
NOWHERE = 0xD000_0000
"""A guest-physical address in the architecture's hole, where no slot can lie."""
ENDLESS = "eb fe"
"""jmp $"""
HLT = "f4"


@contextmanager
def bare_guest(code: str, *registers: dict[str, int], log: Log = Log.BITMAP) -> Iterator[KvmMemory]:
    """Give a paused guest whose vCPUs, one for each dictionary of registers (or one), begin at ``code``, in hexadecimal.

    The code lies in the read-only slot, behind the tables. The RAM is a memfd, so that :func:`held` sees it.
    """
    memory = KvmMemory(log)
    try:
        memory.add_slot(RAM_SLOT, 0, RAM_PAGES, backing=Backing.MEMFD)
        rom = add_rom(memory, RAM_PAGES * PAGE, bytes.fromhex(code))
        for values in registers or ({},):
            memory.add_vcpu(rom, rom.program, values)
        yield memory
    finally:
        memory.close()


@contextmanager
def bare_vcpu(code: str, **registers: int) -> Iterator[KvmVcpu]:
    """Give the only vCPU of such a guest."""
    with bare_guest(code, registers) as memory:
        yield memory.cpus[0].vcpu


@contextmanager
def runners(count: int = 1) -> Iterator[ThreadPoolExecutor]:
    """Give threads to run vCPUs in. Those that are still in the guest at the end are signalled, so that a test that fails ends."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False)
        for thread in pool._threads:
            thread.join(0.5)
            while thread.is_alive() and thread.ident is not None:
                signal.pthread_kill(thread.ident, KICK_SIGNAL)
                thread.join(0.001)


def read_ram(memory: KvmMemory, address: int, nbytes: int) -> bytes:
    """Return bytes of the RAM."""
    return memory.contents(memory.slots[RAM_SLOT]).reshape(-1)[address : address + nbytes].tobytes()


def write_ram(memory: KvmMemory, address: int, data: bytes) -> None:
    """Set bytes of the RAM, before the guest runs."""
    memory.load(address, data)


class Held(NamedTuple):
    """What guests hold of this process."""

    descriptors: int
    mappings: int
    """Of KVM's descriptors, and of guest memory in a memfd."""
    threads: int


def held() -> Held:
    """Count it."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text(encoding="ascii").splitlines()
    return Held(
        len(list(Path("/proc/self/fd").iterdir())),
        sum("kvm" in line or "memfd:dirtylog" in line for line in maps),
        sum(thread.name.startswith(("vcpu-", "kvm-")) for thread in threading.enumerate()),
    )


@contextmanager
def nothing_is_left() -> Iterator[None]:
    """Show that what happens inside holds nothing afterwards."""
    before = held()
    yield
    assert held() == before

"""Guests that run one store loop again and again, lap after lap, on the same CPU: a logged one and its bare anchors.

``make_guest`` makes a fresh CPU at each reset, and a fresh Unicorn translates its code and grows its tables in the first lap.
Here the CPU stays, so that a lap is nothing but stores. Laps run in the thread that measures them, so its CPU time is what they
cost, and what else runs on the machine is in the figures only through the caches.
"""

from __future__ import annotations

import importlib
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from dirtylog.emulated.arch import PORTS
from dirtylog.emulated.cpu_trace import TraceCpu, trace_of
from dirtylog.emulated.cpu_unicorn import UnicornCpu
from dirtylog.emulated.isa import ISAS
from dirtylog.emulated.machine import EmulatedMemory
from dirtylog.emulated.port import PAGE_SIZE
from dirtylog.emulated.ram import Ram
from dirtylog.guests.cpu import CpuExit
from dirtylog.guests.machine import RAM_SLOT, ROM_SLOT
from dirtylog.guests.programs import store_loop
from dirtylog.memslot import SlotFlags

if TYPE_CHECKING:
    from dirtylog.emulated.isa import Isa
    from dirtylog.guests.programs import Pattern


# Through importlib for its type checks: the package re-exports its names in a way that strict mypy does not follow.
unicorn: Any = importlib.import_module("unicorn")
UnicornError: type[Exception] = unicorn.UcError


def set_registers(uc: Any, isa: Isa, pattern: Pattern) -> None:  # noqa: ANN401 - see above
    """Write the store loop's registers."""
    constants = importlib.import_module(f"unicorn.{isa.constants}_const")
    for name, value in zip(isa.registers, pattern.registers(), strict=True):
        uc.reg_write(getattr(constants, f"UC_{isa.arch}_REG_{name}"), value)


class _UnicornAgain(UnicornCpu):
    def rewind(self, pattern: Pattern, entry: int) -> None:
        set_registers(self._uc, self._isa, pattern)
        self._pc = entry


class _TraceAgain(TraceCpu):
    def rewind(self, pattern: Pattern, entry: int) -> None:  # noqa: ARG002 - a trace has no entry
        self._trace = trace_of(pattern)


class LoggedLoop:
    """An emulated guest of ``npages`` pages with one vCPU that is driven from here, without its thread."""

    def __init__(self, arch: str, npages: int, pattern: Pattern) -> None:
        self.memory = EmulatedMemory(PORTS[arch])
        self.memory.add_slot(RAM_SLOT, 0, npages)
        self._pattern = pattern
        self._entry = npages * PAGE_SIZE
        isa = ISAS.get(self.memory.port.isa)
        if isa is not None:
            self.memory.add_slot(ROM_SLOT, npages, 1, SlotFlags.READONLY)
            self.memory.load(self._entry, store_loop(isa.name))
        self._cpu: _UnicornAgain | _TraceAgain
        self.memory.add_vcpu(partial(self._make_cpu, arch, isa))

    def _make_cpu(self, arch: str, isa: Isa | None, index: int) -> _UnicornAgain | _TraceAgain:
        memory, translate = self.memory, self.memory.port.translate
        if isa is None:
            self._cpu = _TraceAgain(index, arch, (), translate, memory.host_memory)
        else:
            self._cpu = _UnicornAgain(
                index,
                isa,
                memory.host_ranges(),
                translate,
                entry=self._entry,
                halt=self._entry + isa.halt,
                registers=self._pattern.registers(),
            )
        return self._cpu

    def contents(self) -> bytes:
        """Return the guest's memory."""
        return self.memory.read(RAM_SLOT, range(self.memory.slots[RAM_SLOT].npages)).tobytes()

    def flush(self) -> None:
        """Do what the vCPU's thread does when it is asked to flush."""
        self._cpu.flush_tlb()
        self.memory.port.tlb_flushed(0)

    def lap(self) -> float:
        """Run the loop from its start to its end; return the seconds."""
        self._cpu.rewind(self._pattern, self._entry)
        begin = time.thread_time()
        how = self._cpu.run()
        seconds = time.thread_time() - begin
        assert how is CpuExit.HALTED
        return seconds


class BareLoop:
    """The same program in a plain ``unicorn.Uc``, on the same kind of host memory, with nothing that logs.

    Without ``virtual_tlb`` it has no hook at all, and the TLB mode that Unicorn starts with. With it, the TLB-fill hook is the
    least that Python can do: every address is its own translation, and every access is permitted.
    """

    def __init__(self, isa: Isa, npages: int, pattern: Pattern, *, virtual_tlb: bool = False) -> None:
        mode = 0
        for name in isa.modes:
            mode |= getattr(unicorn, f"UC_MODE_{name}")
        uc: Any = unicorn.Uc(getattr(unicorn, f"UC_ARCH_{isa.arch}"), mode)
        if isa.arch in ("ARM", "ARM64"):
            uc.ctl_set_page_size(PAGE_SIZE)
        if virtual_tlb:
            uc.ctl_set_tlb_mode(unicorn.UC_TLB_VIRTUAL)
            uc.hook_add(unicorn.UC_HOOK_TLB_FILL, _identity)
        self.virtual_tlb = virtual_tlb
        self._ram = Ram(0, npages)
        self._rom = Ram(npages * PAGE_SIZE, 1)
        program = store_loop(isa.name)
        self._rom.view[: len(program)] = program
        for ram in (self._ram, self._rom):
            # Safe: this object holds both mappings for as long as it holds the Uc, and this is their whole length.
            uc.mem_map_ptr(ram.address, ram.nbytes, unicorn.UC_PROT_ALL, ram.host)
        constants = importlib.import_module(f"unicorn.{isa.constants}_const")
        for name, value in isa.setup:
            uc.reg_write(getattr(constants, f"UC_{isa.arch}_REG_{name}"), value)
        self._uc = uc
        self._isa = isa
        self._pattern = pattern

    def contents(self) -> bytes:
        """Return the guest's memory."""
        return self._ram.pages.tobytes()

    def flush(self) -> None:
        """Flush the TLB."""
        self._uc.ctl(unicorn.UC_CTL_TLB_FLUSH, unicorn.UC_CTL_IO_WRITE)

    def lap(self) -> float:
        """Run the loop from its start to its end; return the seconds."""
        set_registers(self._uc, self._isa, self._pattern)
        entry = self._rom.address
        begin = time.thread_time()
        self._uc.emu_start(entry, entry + self._isa.halt)
        return time.thread_time() - begin


def _identity(uc: object, address: int, access: int, entry: Any, data: object) -> bool:  # noqa: ANN401, ARG001 - Unicorn's signature
    entry.paddr = address
    entry.perms = unicorn.UC_PROT_ALL
    return True

"""Guest CPUs from Unicorn, in its virtual-TLB mode.

Facts about Unicorn 2.1 that this file relies on:

* In virtual-TLB mode each TLB miss calls the TLB-fill hook, which answers with a physical address and permissions; the entry
  stays until the TLB is flushed. A page filled without write permission calls again when it is written.
* ``ctl_flush_tb`` does not flush the TLB; ``ctl(UC_CTL_TLB_FLUSH)`` does. It may only be called outside ``emu_start``.
* The page size of arm and arm64 is 1 KiB until it is set, which must be done before anything else.
* ``emu_start`` lets the GIL go and hooks take it. ``emu_stop`` from another thread ends it at the next translation block or memory
  access; one that comes outside ``emu_start`` is lost.
* When it ends it after a memory access, that access is done, but the pc still points to its instruction, which is executed
  again when the guest goes on. For a load or a store that changes nothing but a second report of its page; *an instruction
  that reads and writes memory in one, such as x86's inc, then counts twice*. Nothing in the interface tells the ends apart.
* Code that it has translated is translated again when the guest writes it through an entry that permits to execute: a store through
  such an entry looks for code, which takes seven times as long. What this process writes to the memory it does not see.
* Its own copy of a CPU's state (``context_save``) holds all of it, and pointers of this process: it is good for this CPU only.
* An exception that leaves a TLB-fill hook ends as UC_ERR_EXCEPTION and is lost, so the hook catches everything itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dirtylog.emulated.cpu_registers import UnicornRegisters
from dirtylog.emulated.port import PAGE_SHIFT, PAGE_SIZE
from dirtylog.errors import DirtyLogError, GuestFaultError, UnsupportedError
from dirtylog.guests.cpu import CpuExit
from dirtylog.guests.state import check_names, number

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from dirtylog.emulated.isa import Isa
    from dirtylog.emulated.port import Translate

_PC = "pc"
_UNICORN_REMEDY = "install it: pip install 'dirtylog[emu]'"


def unicorn_version() -> str | None:
    """Return Unicorn's version, or None where it cannot be imported."""
    try:
        unicorn = importlib.import_module("unicorn")
    except ImportError:
        return None
    return str(unicorn.__version__)


class UnicornCpu:
    """One CPU of an instruction set. ``ram`` lists (host-physical address, host address, nbytes) of the memory it can reach."""

    def __init__(
        self,
        vcpu: int,
        isa: Isa,
        ram: Iterable[tuple[int, int, int]],
        translate: Translate,
        *,
        entry: int,
        halt: int | None,
        registers: Sequence[int],
    ) -> None:
        try:
            unicorn = importlib.import_module("unicorn")
        except ImportError as error:
            raise UnsupportedError(f"{isa.name} guests run on Unicorn, which is not installed", remedy=_UNICORN_REMEDY) from error
        self._vcpu = vcpu
        self._isa = isa
        self._translate = translate
        self._uc_error: type[Exception] = unicorn.UcError
        self._write_access, self._fetch_access = unicorn.UC_MEM_WRITE, unicorn.UC_MEM_FETCH
        self._flush = (unicorn.UC_CTL_TLB_FLUSH, unicorn.UC_CTL_IO_WRITE)
        constants = importlib.import_module(f"unicorn.{isa.constants}_const")
        self._pc_register = getattr(constants, f"UC_{isa.arch}_REG_{isa.pc}")

        mode = 0
        for name in isa.modes:
            mode |= getattr(unicorn, f"UC_MODE_{name}")
        uc: Any = unicorn.Uc(getattr(unicorn, f"UC_ARCH_{isa.arch}"), mode)
        if isa.arch in ("ARM", "ARM64"):
            uc.ctl_set_page_size(PAGE_SIZE)
        if uc.ctl_get_page_size() != PAGE_SIZE:
            raise UnsupportedError(
                f"this Unicorn has pages of {uc.ctl_get_page_size()} bytes for {isa.name}; {PAGE_SIZE} are needed"
            )
        uc.ctl_set_tlb_mode(unicorn.UC_TLB_VIRTUAL)
        for address, host, nbytes in ram:
            # Safe: the machine keeps the mapping until its CPUs are gone, and this is its whole length.
            uc.mem_map_ptr(address, nbytes, unicorn.UC_PROT_ALL, host)
        uc.hook_add(unicorn.UC_HOOK_TLB_FILL, self._fill)
        for name, value in isa.setup:
            uc.reg_write(getattr(constants, f"UC_{isa.arch}_REG_{name}"), value)
        for name, value in zip(isa.registers, registers, strict=False):
            uc.reg_write(getattr(constants, f"UC_{isa.arch}_REG_{name}"), value)
        self._uc = uc
        self._registers = UnicornRegisters(uc, isa, self._flush)
        self._readable, self._writable = unicorn.UC_PROT_READ, unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE
        self._executable, self._all = unicorn.UC_PROT_READ | unicorn.UC_PROT_EXEC, unicorn.UC_PROT_ALL
        # The frames that code was fetched from.
        self._code: set[int] = set()
        self._pc = entry
        # An address that no guest reaches, for an image that never halts.
        self._halt = isa.max_address - 4 if halt is None else halt
        self._end_page = self._halt >> PAGE_SHIFT << PAGE_SHIFT if halt is None else None
        self._stop_asked = False
        self._refused: int | None = None
        self._raised: BaseException | None = None

    @property
    def pc(self) -> int:
        """Address of the next instruction."""
        return self._pc

    def run(self) -> CpuExit:
        """Run from where the last run ended."""
        if self._pc == self._halt:
            return CpuExit.HALTED
        error = self._emulate()
        self._pc = self._uc.reg_read(self._pc_register)
        if self._raised is not None:
            raise self._raised
        # After x86's hlt Unicorn goes to its end address, where no slot is: that is a halt too.
        if error is not None and (self._refused is None or self._refused != self._end_page):
            raise self._fault(error) from error
        # Without a call of stop it was the guest that ended it: at the halt address, or with an instruction such as x86's hlt.
        if self._pc == self._halt or not self._stop_asked:
            return CpuExit.HALTED
        return CpuExit.STOPPED

    def _emulate(self) -> Exception | None:
        self._stop_asked = False
        self._refused = self._raised = None
        try:
            self._uc.emu_start(self._pc, self._halt)
        except self._uc_error as error:
            return error
        return None

    def stop(self) -> None:
        """Make :meth:`run` return at the end of the current translation block."""
        self._stop_asked = True
        self._uc.emu_stop()

    def flush_tlb(self) -> None:
        """Drop every cached translation."""
        self._uc.ctl(*self._flush)

    # --- state

    @property
    def kind(self) -> str:
        """Whose registers these are."""
        return f"Unicorn {self._isa.name}"

    def registers(self) -> dict[str, str]:
        """Return every register that Unicorn names, and the program counter."""
        return {_PC: f"{self._pc:x}", **self._registers.read()}

    def load_registers(self, registers: Mapping[str, str]) -> None:
        """Set every register. The code is translated anew, for a load comes with other contents of memory."""
        check_names(self.kind, registers, {_PC: None, **self._registers.names})
        pc = number(self.kind, _PC, registers[_PC], 8 * self._isa.word_bytes)
        try:
            self._registers.write(self.kind, {name: text for name, text in registers.items() if name != _PC})
        except self._uc_error as error:
            raise DirtyLogError(f"vCPU {self._vcpu} refuses the state", reason=f"Unicorn says: {error}") from error
        self._pc = pc
        self._uc.ctl_flush_tb()

    def snapshot(self) -> object:
        """Return Unicorn's own copy of the state, and the program counter."""
        return self._uc.context_save(), self._pc

    def put_back(self, snapshot: Any) -> None:  # noqa: ANN401 - what snapshot returned
        """Set the state to that of a snapshot of this CPU."""
        context, self._pc = snapshot
        self._uc.context_restore(context)

    def forget_code(self, gfns: NDArray[np.int64]) -> None:
        """Drop all translated code, if any was fetched from one of these frames."""
        if not self._code.isdisjoint(gfns.tolist()):
            self._uc.ctl_flush_tb()

    def _fill(self, uc: object, address: int, access: int, entry: Any, data: object) -> bool:  # noqa: ANN401, ARG002 - Unicorn's signature
        frame, write = address >> PAGE_SHIFT, access == self._write_access
        try:
            found = self._translate(self._vcpu, frame, write)
        except BaseException as error:  # noqa: BLE001 - raised again when emu_start has returned
            self._raised = error
            return False
        if found is None:
            if self._registers.moving:
                entry.paddr, entry.perms = self._registers.moves_address, self._executable
                return True
            if self._refused is None:  # after a refusal Unicorn asks for its end address too
                self._refused = address
            return False
        entry.paddr, writable = found
        if frame not in self._code:
            if write or access != self._fetch_access:
                # Without the permission to execute: the first fetch asks, and till then a store has no code to look for.
                entry.perms = self._writable if writable else self._readable
                return True
            self._code.add(frame)
        entry.perms = self._all if writable else self._executable
        return True

    def _fault(self, error: Exception) -> GuestFaultError:
        if self._refused is None:
            what = f"the {self._isa.name} guest faults at pc {self._pc:#x}: {error}"
        else:
            what = f"the {self._isa.name} guest's access to {self._refused:#x} at pc {self._pc:#x} hits no slot that permits it"
        return GuestFaultError(what, pc=self._pc, address=self._refused, architecture=self._isa.name)

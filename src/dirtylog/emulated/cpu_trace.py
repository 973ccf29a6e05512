"""The trace CPU: a list of loads and stores, run through a TLB and the same miss path as any guest.

It stands in where Unicorn has no CPU (ia64, loongarch), needs nothing but Python, and lets a test take one step at a time.
"""

from __future__ import annotations

import struct
import time
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from dirtylog.emulated.port import PAGE_SHIFT
from dirtylog.errors import GuestFaultError, UnsupportedError
from dirtylog.guests.cpu import CpuExit
from dirtylog.guests.programs import Pattern
from dirtylog.guests.state import check_names, number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from dirtylog.emulated.port import Translate

_WORD = struct.Struct("<Q")
_WORD_MASK = 0xFFFF_FFFF_FFFF_FFFF
_REGISTERS = ("page", "mul", "add", "mask", "base", "value", "step", "count", "tick", "accesses")
# A thread of pure Python keeps the GIL from others for 5 ms at a time; this one lets it go after so many accesses.
_TURN = 256
_OFFSET_MASK = (1 << PAGE_SHIFT) - 1


class Access(NamedTuple):
    """One step of a trace: a 64-bit little-endian store of ``value`` at a guest-physical address, or with None a load."""

    address: int
    value: int | None = None


def trace_of(pattern: Pattern) -> Iterator[tuple[int, int | None]]:
    """Return the trace of the store loop with this pattern's registers."""
    page, value, left = pattern.page, pattern.value, pattern.count
    while left is None or left > 0:
        yield pattern.base + (page << PAGE_SHIFT), value & _WORD_MASK
        value += pattern.step
        page = page * pattern.mul + pattern.add & pattern.mask
        if left is not None:
            left -= 1


def pattern_of(registers: Sequence[int]) -> Pattern:
    """Return the pattern with these registers, in the order of :meth:`Pattern.registers`."""
    page, mul, add, mask, base, value, step, count, tick = registers
    return Pattern(base, page, mul, add, mask, value, step, count if tick else None)


def pattern_after(pattern: Pattern, steps: int) -> Pattern:
    """Return what the registers are after so many stores."""
    page, left = pattern.page, steps
    if pattern.mask & (pattern.mask + 1) == 0:
        # A power of two: reductions can wait to the end, so that the way of 2n steps is the way of n steps, twice.
        mul, add = pattern.mul, pattern.add
        while left:
            if left & 1:
                page = page * mul + add & pattern.mask
            mul, add, left = mul * mul & pattern.mask, (mul * add + add) & pattern.mask, left >> 1
    for _ in range(left):
        page = page * pattern.mul + pattern.add & pattern.mask
    return replace(
        pattern,
        page=page,
        value=pattern.value + steps * pattern.step & _WORD_MASK,
        count=None if pattern.count is None else pattern.count - steps,
    )


class TraceCpu:
    """A CPU that runs a trace of (address, value) pairs, such as :class:`Access`.

    ``host(address)`` gives the memory that holds a host-physical address, and where in it the address lies. Where the trace is a
    :class:`Pattern`, it is that of the store loop, and has registers.
    """

    def __init__(
        self,
        vcpu: int,
        architecture: str,
        trace: Iterable[tuple[int, int | None]] | Pattern,
        translate: Translate,
        host: Callable[[int], tuple[memoryview, int]],
    ) -> None:
        self._vcpu = vcpu
        self._architecture = architecture
        self._pattern = trace if isinstance(trace, Pattern) else None
        self._trace = iter(trace_of(trace) if isinstance(trace, Pattern) else trace)
        self._translate = translate
        self._host = host
        self._stop = False
        self._steps = 0
        # What _steps was when the trace began with the pattern.
        self._begun = 0
        # The TLB: frame -> (host memory, offset of the page in it, may it be written).
        self._tlb: dict[int, tuple[memoryview, int, bool]] = {}

    @property
    def pc(self) -> int:
        """The number of accesses made so far."""
        return self._steps

    def run(self) -> CpuExit:
        """Make accesses until the trace ends or :meth:`stop` is called."""
        self._stop = False
        tlb, store = self._tlb, _WORD.pack_into
        for address, value in self._trace:
            entry = tlb.get(address >> PAGE_SHIFT)
            if entry is None or (value is not None and not entry[2]):
                entry = self._fill(address, value is not None)
            if value is not None:
                store(entry[0], entry[1] + (address & _OFFSET_MASK), value)
            self._steps += 1
            if self._stop:
                return CpuExit.STOPPED
            if not self._steps % _TURN:
                time.sleep(1e-6)
        return CpuExit.HALTED

    def access(self, access: Access) -> int:
        """Make one access now and return the 64-bit word that is there after it."""
        write = access.value is not None
        entry = self._tlb.get(access.address >> PAGE_SHIFT)
        if entry is None or (write and not entry[2]):
            entry = self._fill(access.address, write)
        offset = entry[1] + (access.address & _OFFSET_MASK)
        if access.value is not None:
            _WORD.pack_into(entry[0], offset, access.value)
        word: int = _WORD.unpack_from(entry[0], offset)[0]
        return word

    def stop(self) -> None:
        """Make :meth:`run` return after the current access."""
        self._stop = True

    def flush_tlb(self) -> None:
        """Drop every cached translation."""
        self._tlb.clear()

    # --- state

    @property
    def kind(self) -> str:
        """Whose registers these are."""
        return f"trace {self._architecture}"

    def registers(self) -> dict[str, str]:
        """Return the store loop's registers as they are now, and the number of accesses made."""
        pattern, steps = self.snapshot()
        values = (*pattern.registers(), steps)
        return {name: f"{value & _WORD_MASK:x}" for name, value in zip(_REGISTERS, values, strict=True)}

    def load_registers(self, registers: Mapping[str, str]) -> None:
        """Go on where the store loop with these registers is."""
        check_names(self.kind, registers, dict.fromkeys(_REGISTERS))
        *values, steps = (number(self.kind, name, registers[name], 64) for name in _REGISTERS)
        self.put_back((pattern_of(values), steps))

    def snapshot(self) -> tuple[Pattern, int]:
        """Return the store loop as it is now, and the number of accesses made."""
        if self._pattern is None:
            raise UnsupportedError("a trace of one's own has no registers that could be saved", remedy="give the CPU a Pattern")
        return pattern_after(self._pattern, self._steps - self._begun), self._steps

    def put_back(self, snapshot: object) -> None:
        """Go on where the snapshot was made."""
        assert isinstance(snapshot, tuple)  # noqa: S101 - what snapshot returned
        self._pattern, self._steps = snapshot
        self._begun = self._steps
        self._trace = trace_of(snapshot[0])

    def forget_code(self, gfns: NDArray[np.int64]) -> None:
        """Do nothing: the trace is no code in memory."""

    def _fill(self, address: int, write: bool) -> tuple[memoryview, int, bool]:  # noqa: FBT001 - private, two callers
        found = self._translate(self._vcpu, address >> PAGE_SHIFT, write)
        if found is None:
            raise GuestFaultError(
                f"the {self._architecture} guest's {'store to' if write else 'load from'} {address:#x} "
                f"(access {self._steps} of its trace) hits no slot that permits it",
                pc=self._steps,
                address=address,
                architecture=self._architecture,
            )
        entry = self._tlb[address >> PAGE_SHIFT] = (*self._host(found[0]), found[1])
        return entry

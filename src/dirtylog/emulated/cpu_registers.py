"""A Unicorn CPU's registers, had and set by their names."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dirtylog.emulated.port import PAGE_SIZE
from dirtylog.emulated.registers import REGISTER_FILES
from dirtylog.errors import InvalidArgumentError
from dirtylog.guests.state import check_names, number

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dirtylog.emulated.isa import Isa
    from dirtylog.emulated.registers import Register

_FIELDS = {"number": 1, "msr": 1, "moved": 1, "float80": 2, "table": 4}
_INSTRUCTION_BYTES = 4
_SEPARATOR = ":"


class UnicornRegisters:
    """The registers of one Unicorn CPU but for its program counter. Only while it does not run."""

    def __init__(self, uc: Any, isa: Isa, flush: tuple[int, int]) -> None:  # noqa: ANN401 - Unicorn has no types that strict mypy follows
        self._uc = uc
        self._isa = isa
        self._flush = flush
        self.moving = False
        """Whether the instructions of the register file run just now, at :attr:`moves_address`, and not the guest."""
        self.moves_address = isa.max_address - 2 * PAGE_SIZE
        self._constants = importlib.import_module(f"unicorn.{isa.constants}_const")
        self._file = REGISTER_FILES[isa.constants]
        self.names = {register.name: register for register in self._file.registers}
        if self._file.moves:
            uc.mem_map(self.moves_address, PAGE_SIZE)
            uc.mem_write(self.moves_address, self._file.moves)

    def read(self) -> dict[str, str]:
        """Return every register, in hexadecimal; a register of several fields has them one after the other."""
        context = self._uc.context_save()
        try:
            found = self._unlock()
            for name, register in self.names.items():
                found.setdefault(name, self._get(register))
        finally:
            self._uc.context_restore(context)
        return {name: _SEPARATOR.join(f"{field:x}" for field in found[name]) for name in self.names}

    def write(self, kind: str, registers: Mapping[str, str]) -> None:
        """Set every register. A value that is there is not written again: to set some has effects, even to what they are."""
        check_names(kind, registers, self.names)
        wanted = {name: _parse(kind, register, registers[name]) for name, register in self.names.items()}
        self._unlock()
        for name, register in self.names.items():
            if self._get(register) != wanted[name]:
                self._set(register, wanted[name])

    def _unlock(self) -> dict[str, tuple[int, ...]]:
        """Make every register accessible; return what those held that say which are."""
        before = {}
        for name, bits in self._file.unlock:
            register = self.names[name]
            before[name] = self._get(register)
            self._set(register, (before[name][0] | bits,))
        return before

    def _get(self, register: Register) -> tuple[int, ...]:
        if register.shape == "msr":
            return (self._uc.reg_read(self._id("MSR"), register.msr),)
        if register.shape == "moved":
            context = self._uc.context_save()
            self._move(0)
            value = self._uc.reg_read(self._id("0"))
            self._uc.context_restore(context)
            return (value,)
        value = self._uc.reg_read(self._id(register.name))
        return (value,) if register.shape == "number" else value

    def _set(self, register: Register, fields: tuple[int, ...]) -> None:
        if register.shape == "msr":
            self._uc.reg_write(self._id("MSR"), (register.msr, *fields))
        elif register.shape == "moved":
            self._uc.reg_write(self._id("0"), fields[0])
            self._move(1)
        else:
            self._uc.reg_write(self._id(register.name), fields[0] if register.shape == "number" else fields)

    def _move(self, number_of: int) -> None:
        start = self.moves_address + number_of * _INSTRUCTION_BYTES
        self.moving = True
        try:
            self._uc.emu_start(start, start + _INSTRUCTION_BYTES)
        finally:
            self.moving = False
            # The guest has no such page.
            self._uc.ctl(*self._flush)

    def _id(self, name: str) -> int:
        number_of: int = getattr(self._constants, f"UC_{self._isa.arch}_REG_{name}")
        return number_of


def _parse(kind: str, register: Register, text: str) -> tuple[int, ...]:
    fields = text.split(_SEPARATOR)
    if len(fields) != _FIELDS[register.shape]:
        raise InvalidArgumentError(f"the state of a {kind} vCPU has {len(fields)} fields for {register.name}")
    return tuple(number(kind, register.name, field, register.bits) for field in fields)

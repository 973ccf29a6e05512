"""The instruction sets of emulated guests: how Unicorn names them, and where the store loop keeps its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Isa:
    """One instruction set. Names are Unicorn's, without their prefixes, so that this module needs no Unicorn.

    ``registers`` hold the store loop's page, mul, add, mask, base, value, step, count and tick, in this order; ``halt`` is the
    offset of the instruction where it ends (dirtylog/guests has the source).
    """

    name: str
    arch: str
    modes: tuple[str, ...]
    constants: str
    registers: tuple[str, ...]
    pc: str
    word_bytes: Literal[4, 8]
    byte_order: Literal["little", "big"]
    halt: int
    setup: tuple[tuple[str, int], ...] = ()
    """Registers that are not 0 at reset."""

    @property
    def max_address(self) -> int:
        """No guest or host-physical address of this instruction set's guests reaches this."""
        return 1 << (32 if self.word_bytes == 32 // 8 else 40)


ISAS: dict[str, Isa] = {
    isa.name: isa
    for isa in (
        Isa(
            "x86",
            "X86",
            ("64",),
            "x86",
            ("RSI", "R8", "R9", "RDX", "RDI", "RAX", "RBX", "RCX", "R10"),
            "RIP",
            8,
            "little",
            0x22,
        ),
        Isa("arm", "ARM", ("ARM",), "arm", tuple(f"R{i}" for i in range(9)), "PC", 4, "little", 0x28),
        Isa("arm64", "ARM64", ("ARM",), "arm64", tuple(f"X{i}" for i in range(9)), "PC", 8, "little", 0x20),
        Isa("mips", "MIPS", ("MIPS32", "BIG_ENDIAN"), "mips", tuple(map(str, range(4, 13))), "PC", 4, "big", 0x30),
        Isa("ppc32", "PPC", ("PPC32", "BIG_ENDIAN"), "ppc", tuple(map(str, range(3, 12))), "PC", 4, "big", 0x28),
        Isa("ppc64", "PPC", ("PPC64", "BIG_ENDIAN"), "ppc", tuple(map(str, range(3, 12))), "PC", 8, "big", 0x28),
        Isa("riscv64", "RISCV", ("RISCV64",), "riscv", (*(f"A{i}" for i in range(8)), "T0"), "PC", 8, "little", 0x28),
        Isa(
            "s390x",
            "S390X",
            ("BIG_ENDIAN",),
            "s390x",
            tuple(f"R{i}" for i in range(2, 11)),
            "PC",
            8,
            "big",
            0x2C,
            # 64-bit addressing (PSW bits 31 and 32): the reset state is 24-bit, and wraps at 16 MiB.
            setup=(("PSWM", 0x1_8000_0000),),
        ),
    )
}

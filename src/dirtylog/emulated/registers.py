"""The registers that make up the state of a Unicorn CPU, by Unicorn's names.

They are written in this order, after those of ``unlock``. All that guest code can change and Unicorn gives a name is here, but
for the program counter, which the CPU keeps itself. What has no name is not saved: the banked registers of ARM's other modes,
coprocessor 0 of MIPS but for three registers, the SPRs and vector registers of PowerPC, the physical memory protection of RISC-V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Shape = Literal["number", "float80", "table", "msr", "moved"]
"""How Unicorn gives a register: a number, (mantissa, exponent), (selector, base, limit, flags), or by a number of its own. One
that is moved it does not give right: instructions move it to and from register 0."""


@dataclass(frozen=True, slots=True)
class Register:
    """One register. ``msr`` is its number where it is a model-specific one."""

    name: str
    bits: int = 64
    shape: Shape = "number"
    msr: int = 0


@dataclass(frozen=True, slots=True)
class RegisterFile:
    """The registers of one instruction set. ``unlock`` are bits that must be set in registers before others can be had."""

    registers: tuple[Register, ...]
    unlock: tuple[tuple[str, int], ...] = ()
    moves: bytes = b""
    """The instruction that moves a moved register to register 0, and the one that moves it back."""


def _numbers(names: str, bits: int = 64) -> tuple[Register, ...]:
    return tuple(Register(name, bits) for name in names.split())


def _row(prefix: str, count: int, bits: int = 64, suffix: str = "") -> tuple[Register, ...]:
    return tuple(Register(f"{prefix}{index}{suffix}", bits) for index in range(count))


_X86_MSRS = {
    "SYSENTER_CS": 0x174,
    "SYSENTER_ESP": 0x175,
    "SYSENTER_EIP": 0x176,
    "PAT": 0x277,
    "EFER": 0xC000_0080,
    "STAR": 0xC000_0081,
    "LSTAR": 0xC000_0082,
    "CSTAR": 0xC000_0083,
    "SFMASK": 0xC000_0084,
    "KERNEL_GS_BASE": 0xC000_0102,
    "TSC_AUX": 0xC000_0103,
}

REGISTER_FILES: dict[str, RegisterFile] = {
    "x86": RegisterFile(
        (
            *_numbers("CR0 CR2 CR3 CR4 DR0 DR1 DR2 DR3 DR6 DR7"),
            *(Register(name, 64, "msr", number) for name, number in _X86_MSRS.items()),
            *(Register(name, 64, "table") for name in ("GDTR", "IDTR")),
            # After the tables, for to set a segment register loads its descriptor from the guest's memory.
            *_numbers("CS DS ES SS FS GS", 16),
            *(Register(name, 64, "table") for name in ("LDTR", "TR")),
            *_numbers("FS_BASE GS_BASE RAX RBX RCX RDX RSI RDI RBP RSP R8 R9 R10 R11 R12 R13 R14 R15 RFLAGS"),
            *_numbers("FPCW FPSW FPTAG FOP FCS FDS", 16),
            *_numbers("FIP FDP"),
            *(Register(f"FP{index}", 64, "float80") for index in range(8)),
            *_row("XMM", 16, 128),
            Register("MXCSR", 32),
        )
    ),
    "arm": RegisterFile(
        # The CPSR first: it says which mode's registers the others are.
        (
            *_numbers("CPSR SPSR", 32),
            *_row("R", 13, 32),
            *_numbers("SP LR C1_C0_2 C13_C0_3 FPEXC FPSCR", 32),
            *_row("D", 32),
        )
    ),
    "arm64": RegisterFile(
        (
            Register("PSTATE", 32),
            *_row("X", 29),
            *_numbers("X29 X30 SP SP_EL0 SP_EL1 ELR_EL1 ESR_EL1 FAR_EL1 PAR_EL1 VBAR_EL1 TTBR0_EL1 TTBR1_EL1 MAIR_EL1"),
            *_numbers("TPIDR_EL0 TPIDRRO_EL0 TPIDR_EL1"),
            *_numbers("CPACR_EL1 FPCR FPSR", 32),
            *_row("V", 32, 128),
        )
    ),
    "mips": RegisterFile(
        (*_numbers("CP0_STATUS CP0_CONFIG3 CP0_USERLOCAL", 32), *_row("", 32, 32)[1:], *_numbers("HI LO FCSR", 32), *_row("F", 32))
    ),
    "ppc": RegisterFile(
        (
            Register("MSR"),
            # Unicorn's own has no carry and no overflow in it. Before the others, for it is moved through one of them.
            Register("XER", 32, "moved"),
            *_row("", 32),
            *_numbers("LR CTR"),
            *_numbers("CR FPSCR", 32),
            *_row("FPR", 32),
        ),
        moves=bytes.fromhex("7c0102a6 7c0103a6"),  # mfxer 0; mtxer 0
    ),
    "riscv": RegisterFile(
        (
            *_numbers(" ".join(f"X{index}" for index in range(1, 32))),
            *_row("F", 32),
            Register("FCSR"),
            *_numbers("MTVEC MEPC MCAUSE MTVAL MSCRATCH MIE MIP MEDELEG MIDELEG MCOUNTEREN"),
            *_numbers("STVEC SEPC SCAUSE STVAL SSCRATCH SATP SCOUNTEREN MSTATUS"),
            # Last: what the others are refused without.
            Register("PRIV", 2),
        ),
        # Machine mode, and the floating-point unit on.
        unlock=(("PRIV", 3), ("MSTATUS", 0x6000)),
    ),
    "s390x": RegisterFile(
        (
            Register("PSWM"),
            *_row("CR", 16),
            *_row("R", 16),
            *_row("A", 16, 32),
            *_row("F", 32),
            *_row("F", 32, suffix="_HI"),
            Register("FPC", 32),
        )
    ),
}
"""By the name of the module that has Unicorn's constants."""

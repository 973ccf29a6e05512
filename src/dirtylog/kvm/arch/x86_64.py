"""x86_64: a guest that starts in 64-bit long mode, with flat segments and every address mapped to itself.

Tables, in memory that the guest cannot write (the processor sets accessed and dirty bits, so these are set beforehand):

===========================  =====================================================================================
global descriptor table      null, 64-bit code (selector 0x08), data (0x10), task state (0x18)
page map, level 4            one entry for 512 GiB
page directory pointers      one entry for 1 GiB
page directories             2 MiB pages: present, writable, accessed, dirty, large (0xe3)
===========================  =====================================================================================

There is no interrupt table: a fault in the guest is a triple fault, which KVM reports as a shutdown. There is no interrupt
controller: hlt leaves the guest.

Sources: Intel SDM volume 3, chapters 3.4, 4.5 and 9.8; Linux Documentation/virt/kvm/api.rst.
"""

from __future__ import annotations

import struct as packing
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from dirtylog.errors import InvalidArgumentError
from dirtylog.kvm.arch import x86_64_registers as x86
from dirtylog.kvm.arch.architecture import Rom
from dirtylog.kvm.arch.x86_64_state import ReadyState, registers_of, state_of
from dirtylog.linux.layout import Direction, ioctl_number

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dirtylog.kvm.system import KvmSystem
    from dirtylog.kvm.vcpu import KvmVcpu

_PAGE = 4096
_GIB = 1 << 30
_ENTRIES = 512
# Room for slots that are added behind the memory, and for MMIO in the hole.
_LEAST_REACH = 16 * _GIB

_TABLE = 0x23  # present, writable, accessed
_LARGE_PAGE = 0xE3  # present, writable, accessed, dirty, 2 MiB
_LARGE_SHIFT = 21

# Flat, present, accessed: code (64-bit, executable, readable) and data (writable). The task state is never used.
_GDT = packing.pack("<5Q", 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x0000_8B00_0000_0067, 0)

CR0 = 0x8005_0033  # paging, alignment mask, write protect, numeric error, extension type, monitor coprocessor, protection
CR4 = 0x620  # SSE's exceptions and registers, physical address extension
EFER = 0x500  # long mode, active
_RFLAGS = 0x2

KVM_GET_SUPPORTED_CPUID = ioctl_number(Direction.BOTH, 0x05, 8)
KVM_SET_CPUID2 = ioctl_number(Direction.WRITE, 0x90, 8)
_CPUID_ENTRY = packing.Struct("=10I")  # function, index, flags, eax, ebx, ecx, edx, three of padding
_CPUID_HEADER_BYTES = 8
_MAX_CPUID = 256
_APIC_ID_LEAVES = (0xB, 0x1F)


class X86_64:  # noqa: N801 - the architecture's name
    """The hooks of x86_64."""

    isa: ClassVar[str] = "x86"
    ring_offset_pages: ClassVar[int] = 64
    ring_alone_loses_pages: ClassVar[bool] = False
    # The interrupt controllers' registers lie at 0xfec00000 and 0xfee00000, there or not; PCs leave the fourth GiB out.
    hole: ClassVar[tuple[int, int]] = (3 * _GIB, 4 * _GIB)
    loop_registers: ClassVar[tuple[str, ...]] = ("rsi", "r8", "r9", "rdx", "rdi", "rax", "rbx", "rcx", "r10")
    stack_register: ClassVar[str] = "rsp"

    def make_rom(self, address: int, reach: int, program: bytes) -> Rom:
        """Return descriptor and page tables, and the program behind them."""
        directories = -(-max(reach, _LEAST_REACH) // _GIB)
        pointers = -(-directories // _ENTRIES)
        if pointers > _ENTRIES:
            raise InvalidArgumentError(f"guest-physical addresses up to {reach:#x}: four levels of tables reach 256 TiB")
        gdt = np.frombuffer(_GDT.ljust(_PAGE, b"\0"), np.uint64)
        first_pointers, first_directory = address + 2 * _PAGE, address + (2 + pointers) * _PAGE
        level4 = np.zeros(_ENTRIES, np.uint64)
        level4[:pointers] = first_pointers + np.arange(pointers, dtype=np.uint64) * np.uint64(_PAGE) | np.uint64(_TABLE)
        level3 = np.zeros(pointers * _ENTRIES, np.uint64)
        level3[:directories] = first_directory + np.arange(directories, dtype=np.uint64) * np.uint64(_PAGE) | np.uint64(_TABLE)
        level2 = np.arange(directories * _ENTRIES, dtype=np.uint64) << np.uint64(_LARGE_SHIFT) | np.uint64(_LARGE_PAGE)
        tables = np.concatenate((gdt, level4, level3, level2)).astype("<u8").tobytes()
        data = tables + program
        return Rom(address, data.ljust(-(-len(data) // _PAGE) * _PAGE, b"\0"), address + len(tables))

    def start(self, system: KvmSystem, vcpu: KvmVcpu, rom: Rom, entry: int, registers: dict[str, int]) -> None:
        """Put a vCPU into long mode at privilege level 0, under the tables of ``rom``."""
        _set_cpuid(system, vcpu)
        sregs = vcpu.get(x86.Sregs)
        sregs.cs = x86.Segment(limit=0xFFFF_FFFF, selector=0x08, type=0xB, present=1, s=1, l=1, g=1)
        data = x86.Segment(limit=0xFFFF_FFFF, selector=0x10, type=0x3, present=1, s=1, db=1, g=1)
        sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
        sregs.tr = x86.Segment(limit=0x67, selector=0x18, type=0xB, present=1)
        sregs.gdt = x86.DescriptorTable(base=rom.address, limit=len(_GDT) - 1)
        sregs.idt = x86.DescriptorTable()
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = CR0, rom.address + _PAGE, CR4, EFER
        vcpu.put(sregs)
        vcpu.put(x86.Regs(rip=entry, rflags=_RFLAGS, **registers))

    def save(self, system: KvmSystem, vcpu: KvmVcpu) -> x86.X86State:
        """Return the whole state of a vCPU that does not run."""
        return x86.save(system, vcpu)

    def restore(self, vcpu: KvmVcpu, state: object) -> None:
        """Set the whole state of a vCPU that does not run."""
        x86.restore(vcpu, _checked(state))

    def registers_of(self, state: object) -> dict[str, str]:
        """Return a saved state as registers by name."""
        return registers_of(_checked(state))

    def state_of(self, kind: str, registers: Mapping[str, str]) -> x86.X86State:
        """Return the state of these registers."""
        return state_of(kind, registers)

    def make_ready(self, vcpu: KvmVcpu, state: object) -> ReadyState:
        """Return the state made ready to be restored often."""
        return ReadyState(vcpu, _checked(state))

    def pc(self, vcpu: KvmVcpu) -> int:
        """Return rip."""
        return vcpu.get(x86.Regs).rip


def _checked(state: object) -> x86.X86State:
    if not isinstance(state, x86.X86State):
        raise InvalidArgumentError(f"a vCPU of x86_64 has no state of type {type(state).__name__}")
    return state


def _set_cpuid(system: KvmSystem, vcpu: KvmVcpu) -> None:
    """Give the vCPU every feature that this host's KVM can give, and its own number as its APIC id."""
    argument = bytearray(packing.pack("=II", _MAX_CPUID, 0) + bytes(_CPUID_ENTRY.size * _MAX_CPUID))
    system.ioctl(KVM_GET_SUPPORTED_CPUID, argument, "cannot learn which processor features KVM supports")
    (count,) = packing.unpack_from("=I", argument)
    for entry in range(count):
        offset = _CPUID_HEADER_BYTES + entry * _CPUID_ENTRY.size
        leaf = list(_CPUID_ENTRY.unpack_from(argument, offset))
        if leaf[0] == 1:
            leaf[4] = leaf[4] & 0x00FF_FFFF | vcpu.index << 24
        elif leaf[0] in _APIC_ID_LEAVES:
            leaf[6] = vcpu.index
        _CPUID_ENTRY.pack_into(argument, offset, *leaf)
    del argument[_CPUID_HEADER_BYTES + count * _CPUID_ENTRY.size :]
    vcpu.ioctl(KVM_SET_CPUID2, argument, f"cannot set the processor features of vCPU {vcpu.index}")

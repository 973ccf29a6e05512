"""The registers of an x86_64 vCPU: the kernel's structs, and the whole state saved and restored.

Source: Linux arch/x86/include/uapi/asm/kvm.h and include/uapi/linux/kvm.h.
"""

from __future__ import annotations

import ctypes
import struct as packing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from dirtylog.errors import DirtyLogError, InvalidArgumentError
from dirtylog.kvm.abi import Cap
from dirtylog.linux.layout import U8, U16, U32, U64, Direction, Struct, ioctl_number, registers, struct

if TYPE_CHECKING:
    from dirtylog.kvm.system import KvmSystem
    from dirtylog.kvm.vcpu import KvmVcpu


@registers(get=0x81, put=0x82)
@struct(144)
class Regs(Struct):
    """kvm_regs: the general registers."""

    rax: U64
    rbx: U64
    rcx: U64
    rdx: U64
    rsi: U64
    rdi: U64
    rsp: U64
    rbp: U64
    r8: U64
    r9: U64
    r10: U64
    r11: U64
    r12: U64
    r13: U64
    r14: U64
    r15: U64
    rip: U64
    rflags: U64


@struct(24)
class Segment(Struct):
    """kvm_segment."""

    base: U64
    limit: U32
    selector: U16
    type: U8
    present: U8
    dpl: U8
    db: U8
    s: U8
    l: U8  # noqa: E741 - the kernel's name
    g: U8
    avl: U8
    unusable: U8
    padding: U8


@struct(16)
class DescriptorTable(Struct):
    """kvm_dtable."""

    base: U64
    limit: U16
    padding: Annotated[ctypes.Array[ctypes.c_uint16], ctypes.c_uint16 * 3]


@registers(get=0x83, put=0x84)
@struct(312)
class Sregs(Struct):
    """kvm_sregs: segments, descriptor tables, control registers."""

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: DescriptorTable
    idt: DescriptorTable
    cr0: U64
    cr2: U64
    cr3: U64
    cr4: U64
    cr8: U64
    efer: U64
    apic_base: U64
    interrupt_bitmap: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 4]


@registers(get=0x8C, put=0x8D)
@struct(416)
class Fpu(Struct):
    """kvm_fpu: x87 and SSE registers; some kernels leave mxcsr out. The XSAVE area has all of it."""

    fpr: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 128]
    fcw: U16
    fsw: U16
    ftwx: U8
    pad1: U8
    last_opcode: U16
    last_ip: U64
    last_dp: U64
    xmm: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 256]
    mxcsr: U32
    pad2: U32


@registers(get=0xA6, put=0xA7)
@struct(392)
class Xcrs(Struct):
    """kvm_xcrs; each of the 16 entries is (u32 xcr, u32 reserved, u64 value)."""

    nr_xcrs: U32
    flags: U32
    xcrs: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 32]
    padding: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 16]


@registers(get=0x9F, put=0xA0)
@struct(64)
class VcpuEvents(Struct):
    """kvm_vcpu_events: what is pending, injected and masked."""

    exception_injected: U8
    exception_nr: U8
    exception_has_error_code: U8
    exception_pending: U8
    exception_error_code: U32
    interrupt_injected: U8
    interrupt_nr: U8
    interrupt_soft: U8
    interrupt_shadow: U8
    nmi_injected: U8
    nmi_pending: U8
    nmi_masked: U8
    nmi_pad: U8
    sipi_vector: U32
    flags: U32
    smi_smm: U8
    smi_pending: U8
    smi_smm_inside_nmi: U8
    smi_latched_init: U8
    triple_fault_pending: U8
    reserved: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 26]
    exception_has_payload: U8
    exception_payload: U64


@registers(get=0xA1, put=0xA2)
@struct(128)
class Debugregs(Struct):
    """kvm_debugregs."""

    db: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 4]
    dr6: U64
    dr7: U64
    flags: U64
    reserved: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 9]


@registers(get=0x98, put=0x99)
@struct(4)
class MpState(Struct):
    """kvm_mp_state: 0 is runnable."""

    mp_state: U32


XSAVE_BYTES = 4096
"""sizeof(struct kvm_xsave). KVM_CAP_XSAVE2 tells how much more there is with features that were asked for."""
MOST_XSAVE_BYTES = 64 << 10
KVM_GET_XSAVE = ioctl_number(Direction.READ, 0xA4, XSAVE_BYTES)
KVM_SET_XSAVE = ioctl_number(Direction.WRITE, 0xA5, XSAVE_BYTES)
KVM_GET_XSAVE2 = ioctl_number(Direction.READ, 0xCF, XSAVE_BYTES)
KVM_GET_MSR_INDEX_LIST = ioctl_number(Direction.BOTH, 0x02, 4)
KVM_GET_MSRS = ioctl_number(Direction.BOTH, 0x88, 8)
KVM_SET_MSRS = ioctl_number(Direction.WRITE, 0x89, 8)
_MSR_ENTRY = packing.Struct("=IIQ")
_MSR_HEADER_BYTES = 8
_MAX_MSRS = 4096


@dataclass(frozen=True, slots=True)
class X86State:
    """The whole state of a vCPU, as the kernel's bytes; picklable. ``msrs`` maps numbers to values."""

    regs: bytes
    sregs: bytes
    xsave: bytes
    xcrs: bytes
    msrs: dict[int, int]
    events: bytes
    debugregs: bytes
    mp_state: bytes


def save(system: KvmSystem, vcpu: KvmVcpu) -> X86State:
    """Return the state of a vCPU that does not run."""
    vcpu.complete()
    return X86State(
        regs=bytes(vcpu.get(Regs)),
        sregs=bytes(vcpu.get(Sregs)),
        xsave=get_xsave(system, vcpu),
        xcrs=bytes(vcpu.get(Xcrs)),
        msrs=get_msrs(vcpu, msr_numbers(system)),
        events=bytes(vcpu.get(VcpuEvents)),
        debugregs=bytes(vcpu.get(Debugregs)),
        mp_state=bytes(vcpu.get(MpState)),
    )


def restore(vcpu: KvmVcpu, state: X86State) -> None:
    """Set the state of a vCPU that does not run.

    The order: control registers and XCR0 before what depends on them, pending events last, for to set registers drops them.
    """
    vcpu.complete()
    vcpu.put(Sregs.from_buffer_copy(state.sregs))
    vcpu.put(Regs.from_buffer_copy(state.regs))
    vcpu.put(Xcrs.from_buffer_copy(state.xcrs))
    set_xsave(vcpu, state.xsave)
    put_msrs(vcpu, state.msrs)
    vcpu.put(Debugregs.from_buffer_copy(state.debugregs))
    vcpu.put(MpState.from_buffer_copy(state.mp_state))
    vcpu.put(VcpuEvents.from_buffer_copy(state.events))


def get_xsave(system: KvmSystem, vcpu: KvmVcpu) -> bytes:
    """Return the XSAVE area: x87, SSE, AVX and whatever else the guest may use."""
    nbytes = max(system.check_extension(Cap.XSAVE2), XSAVE_BYTES)
    area = bytearray(nbytes)
    vcpu.ioctl(KVM_GET_XSAVE2 if nbytes > XSAVE_BYTES else KVM_GET_XSAVE, area, f"cannot read the FPU of vCPU {vcpu.index}")
    return bytes(area)


def set_xsave(vcpu: KvmVcpu, area: bytes) -> None:
    """Set the XSAVE area."""
    if len(area) < XSAVE_BYTES:
        raise InvalidArgumentError(f"an XSAVE area of {len(area)} bytes: it has at least {XSAVE_BYTES}")
    # Padded, for the kernel reads as many bytes as KVM_CAP_XSAVE2 says on this host.
    vcpu.ioctl(KVM_SET_XSAVE, bytearray(area.ljust(MOST_XSAVE_BYTES, b"\0")), f"cannot set the FPU of vCPU {vcpu.index}")


def msr_numbers(system: KvmSystem) -> list[int]:
    """Return the numbers of the MSRs that the kernel wants saved."""
    argument = bytearray(packing.pack("=I", _MAX_MSRS) + bytes(4 * _MAX_MSRS))
    system.ioctl(KVM_GET_MSR_INDEX_LIST, argument, "cannot list the MSRs")
    (count,) = packing.unpack_from("=I", argument)
    return list(packing.unpack_from(f"={count}I", argument, 4))


def get_msrs(vcpu: KvmVcpu, numbers: list[int]) -> dict[int, int]:
    """Return the values of those MSRs that this vCPU has.

    KVM_GET_MSRS stops at the first that cannot be read, and returns how many it read.
    """
    values: dict[int, int] = {}
    start = 0
    while start < len(numbers):
        argument = msr_argument([(number, 0) for number in numbers[start:]])
        done = vcpu.ioctl(KVM_GET_MSRS, argument, f"cannot read the MSRs of vCPU {vcpu.index}")
        for entry in range(done):
            number, _, value = _MSR_ENTRY.unpack_from(argument, _MSR_HEADER_BYTES + entry * _MSR_ENTRY.size)
            values[number] = value
        start += done + 1
    return values


def put_msrs(vcpu: KvmVcpu, values: dict[int, int]) -> dict[int, int]:
    """Set MSRs; return those that were set. One that cannot be set is an error, unless it has that value already."""
    taken = dict(values)
    rest = list(values.items())
    while rest:
        done = vcpu.ioctl(KVM_SET_MSRS, msr_argument(rest), f"cannot set the MSRs of vCPU {vcpu.index}")
        if done == len(rest):
            break
        number, value = rest[done]
        if get_msrs(vcpu, [number]).get(number) != value:
            raise DirtyLogError(f"vCPU {vcpu.index} refuses {value:#x} for MSR {number:#x}")
        del taken[number]
        rest = rest[done + 1 :]
    return taken


def msr_argument(entries: list[tuple[int, int]]) -> bytearray:
    """Return the kvm_msrs of these numbers and values."""
    argument = bytearray(packing.pack("=II", len(entries), 0))
    for number, value in entries:
        argument += _MSR_ENTRY.pack(number, 0, value)
    return argument

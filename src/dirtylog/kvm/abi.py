"""The part of KVM's interface that all architectures share: its structs, ioctl numbers and constants.

Source: Linux include/uapi/linux/kvm.h. A test holds sizes, offsets and numbers against that header where it is installed.
"""

from __future__ import annotations

import ctypes
import enum
from typing import Annotated

import numpy as np

from dirtylog.linux.layout import U8, U16, U32, U64, Direction, Struct, ioctl_number, struct

API_VERSION = 12
"""KVM_GET_API_VERSION since Linux 2.6.22. Its page says: refuse to run on any other."""


@struct(32)
class UserMemoryRegion(Struct):
    """kvm_userspace_memory_region: ``memory_size`` 0 deletes the slot."""

    slot: U32
    flags: U32
    guest_phys_addr: U64
    memory_size: U64
    userspace_addr: U64


@struct(16)
class DirtyLogArgument(Struct):
    """kvm_dirty_log. The kernel writes ``8 * ceil(npages / 64)`` bytes to ``dirty_bitmap``."""

    slot: U32
    padding: U32
    dirty_bitmap: U64


@struct(24)
class ClearDirtyLogArgument(Struct):
    """kvm_clear_dirty_log. Bit 0 of ``dirty_bitmap`` is ``first_page``."""

    slot: U32
    num_pages: U32
    first_page: U64
    dirty_bitmap: U64


@struct(104)
class EnableCap(Struct):
    """kvm_enable_cap."""

    cap: U32
    flags: U32
    args: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 4]
    padding: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 64]


@struct(12)
class SignalMask(Struct):
    """kvm_signal_mask with the kernel's 64 signals in it; the header's struct has an open end, and 4 bytes."""

    len: U32
    sigset: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 8]


@struct(32)
class RunHeader(Struct):
    """What kvm_run begins with; the struct of the exit follows it."""

    request_interrupt_window: U8
    immediate_exit: U8
    padding1: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 6]
    exit_reason: U32
    ready_for_interrupt_injection: U8
    if_flag: U8
    flags: U16
    cr8: U64
    apic_base: U64


@struct(16)
class RunIo(Struct):
    """kvm_run.io: ``count`` items of ``size`` bytes lie at ``data_offset`` of the run page."""

    direction: U8
    size: U8
    port: U16
    count: U32
    data_offset: U64


@struct(24)
class RunMmio(Struct):
    """kvm_run.mmio."""

    phys_addr: U64
    data: Annotated[ctypes.Array[ctypes.c_uint8], ctypes.c_uint8 * 8]
    len: U32
    is_write: U8


@struct(16)
class RunFailEntry(Struct):
    """kvm_run.fail_entry."""

    hardware_entry_failure_reason: U64
    cpu: U32


@struct(136)
class RunInternalError(Struct):
    """kvm_run.internal, and kvm_run.system_event, which has the same layout (type, ndata, data)."""

    suberror: U32
    ndata: U32
    data: Annotated[ctypes.Array[ctypes.c_uint64], ctypes.c_uint64 * 16]


@struct(24)
class StatsHeader(Struct):
    """kvm_stats_header: what a statistics descriptor begins with. Offsets are in its file."""

    flags: U32
    name_size: U32
    num_desc: U32
    id_offset: U32
    desc_offset: U32
    data_offset: U32


@struct(16)
class StatsDescription(Struct):
    """kvm_stats_desc: ``size`` numbers of 64 bits lie at ``offset`` of the data. ``name_size`` bytes with the name follow it."""

    flags: U32
    exponent: Annotated[int, ctypes.c_int16]
    size: U16
    offset: U32
    bucket_size: U32


DIRTY_GFN = np.dtype([("flags", np.uint32), ("slot", np.uint32), ("offset", np.uint64)])
"""kvm_dirty_gfn, the entry of a dirty ring."""
GFN_DIRTY = 1
GFN_RESET = 2

DIRTY_LOG_MANUAL_PROTECT_ENABLE = 1
DIRTY_LOG_INITIALLY_SET = 2

SIGSET_BYTES = 8

_NONE, _READ, _WRITE, _BOTH = Direction.NONE, Direction.READ, Direction.WRITE, Direction.BOTH

KVM_GET_API_VERSION = ioctl_number(_NONE, 0x00)
KVM_CREATE_VM = ioctl_number(_NONE, 0x01)
KVM_CHECK_EXTENSION = ioctl_number(_NONE, 0x03)
KVM_GET_VCPU_MMAP_SIZE = ioctl_number(_NONE, 0x04)
KVM_CREATE_VCPU = ioctl_number(_NONE, 0x41)
KVM_GET_DIRTY_LOG = ioctl_number(_WRITE, 0x42, ctypes.sizeof(DirtyLogArgument))
KVM_SET_USER_MEMORY_REGION = ioctl_number(_WRITE, 0x46, ctypes.sizeof(UserMemoryRegion))
KVM_RUN = ioctl_number(_NONE, 0x80)
KVM_SET_SIGNAL_MASK = ioctl_number(_WRITE, 0x8B, 4)
KVM_ENABLE_CAP = ioctl_number(_WRITE, 0xA3, ctypes.sizeof(EnableCap))
KVM_CLEAR_DIRTY_LOG = ioctl_number(_BOTH, 0xC0, ctypes.sizeof(ClearDirtyLogArgument))
KVM_RESET_DIRTY_RINGS = ioctl_number(_NONE, 0xC7)
KVM_GET_STATS_FD = ioctl_number(_NONE, 0xCE)


class Cap(enum.IntEnum):
    """The capabilities that dirtylog asks for."""

    USER_MEMORY = 3
    NR_MEMSLOTS = 10
    VCPU_EVENTS = 41
    DEBUGREGS = 50
    XSAVE = 55
    XCRS = 56
    MAX_VCPUS = 66
    READONLY_MEM = 81
    MULTI_ADDRESS_SPACE = 118
    IMMEDIATE_EXIT = 136
    MANUAL_DIRTY_LOG_PROTECT2 = 168
    DIRTY_LOG_RING = 192
    BINARY_STATS_FD = 203
    XSAVE2 = 208
    DIRTY_LOG_RING_ACQ_REL = 223
    DIRTY_LOG_RING_WITH_BITMAP = 225


class ExitReason(enum.IntEnum):
    """kvm_run.exit_reason, as far as dirtylog gives it a type of its own."""

    UNKNOWN = 0
    IO = 2
    HLT = 5
    MMIO = 6
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    DIRTY_RING_FULL = 31

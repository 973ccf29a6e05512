"""KVM from Python: one type per kind of descriptor, typed exits, and the kernel's dirty logs as ports of the generic one.

:class:`KvmSystem`, :class:`KvmVm` and :class:`KvmVcpu` are thin: the kernel's calls with typed errors. :class:`KvmMemory` is a
machine made of them, a :class:`~dirtylog.memory.Memory`; :func:`make_kvm_guest` puts a guest into one. docs/kvm.md has the rest.
"""

from dirtylog.kvm.arch import host_architecture
from dirtylog.kvm.bus import Bus, BusAccess, Doorbell
from dirtylog.kvm.cpu import KvmCpu
from dirtylog.kvm.exits import (
    DirtyRingFull,
    Exit,
    FailEntry,
    Halted,
    InternalError,
    Interrupted,
    IoAccess,
    MmioAccess,
    OtherExit,
    Shutdown,
    SystemEvent,
)
from dirtylog.kvm.guest import add_rom, loop_registers, make_kvm_guest
from dirtylog.kvm.memory import KvmMemory
from dirtylog.kvm.probe import probe_kvm
from dirtylog.kvm.system import KvmSystem
from dirtylog.kvm.vcpu import KvmVcpu
from dirtylog.kvm.vm import KvmVm
from dirtylog.options import Backing, KvmOptions, Log

__all__ = [
    "Backing",
    "Bus",
    "BusAccess",
    "DirtyRingFull",
    "Doorbell",
    "Exit",
    "FailEntry",
    "Halted",
    "InternalError",
    "Interrupted",
    "IoAccess",
    "KvmCpu",
    "KvmMemory",
    "KvmOptions",
    "KvmSystem",
    "KvmVcpu",
    "KvmVm",
    "Log",
    "MmioAccess",
    "OtherExit",
    "Shutdown",
    "SystemEvent",
    "add_rom",
    "host_architecture",
    "loop_registers",
    "make_kvm_guest",
    "probe_kvm",
]

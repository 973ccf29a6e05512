"""What this host's KVM can do, asked without making a guest run: for ``dirtylog check``."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from dirtylog.errors import DirtyLogError, UnsupportedError
from dirtylog.kvm import abi
from dirtylog.kvm.abi import Cap
from dirtylog.kvm.arch import host_architecture
from dirtylog.kvm.memory import PORTS
from dirtylog.kvm.ring_port import choose_ring
from dirtylog.kvm.system import DEVICE, KvmSystem
from dirtylog.options import Log

_PURPOSES: dict[Cap, tuple[str, str]] = {
    Cap.USER_MEMORY: ("guest memory that this process gives", "without it there are no guests: use a newer kernel"),
    Cap.READONLY_MEM: ("read-only slots", "built-in guests need them: use Linux 3.7 or later"),
    Cap.IMMEDIATE_EXIT: ("a kick that is never late", "vCPUs cannot be stopped: use Linux 4.13 or later"),
    Cap.NR_MEMSLOTS: ("memory slots of an address space", ""),
    Cap.MULTI_ADDRESS_SPACE: (
        "address spaces (on x86 a second one for SMM)",
        "slots have address space 0 only",
    ),
    Cap.MAX_VCPUS: ("vCPUs of a guest", ""),
    Cap.MANUAL_DIRTY_LOG_PROTECT2: ("manual protect: 1, and 3 with all pages dirty at first", "use Linux 5.2, or 5.7 for 3"),
    Cap.DIRTY_LOG_RING: ("bytes of the largest dirty ring, on x86", "use Linux 5.11 or later"),
    Cap.DIRTY_LOG_RING_ACQ_REL: ("the same, on any architecture", "use Linux 6.1 or later"),
    Cap.DIRTY_LOG_RING_WITH_BITMAP: (
        "a bitmap beside the rings",
        "arm64 has and needs it, since Linux 6.2",
    ),
    Cap.XSAVE: ("the FPU's state", "a guest's state cannot be saved whole"),
    Cap.XSAVE2: ("bytes of the FPU's state", ""),
    Cap.XCRS: ("extended control registers", "a guest's state cannot be saved whole"),
    Cap.VCPU_EVENTS: ("pending events", "a guest's state cannot be saved whole"),
    Cap.DEBUGREGS: ("debug registers", "a guest's state cannot be saved whole"),
}
_REQUIRED = (Cap.USER_MEMORY, Cap.READONLY_MEM, Cap.IMMEDIATE_EXIT)


@dataclass(frozen=True, slots=True)
class Capability:
    """One capability: what the kernel answers (0 is no), what it is for, and where it is missing what that means."""

    name: str
    value: int
    purpose: str
    remedy: str | None


@dataclass(frozen=True, slots=True)
class LogFacts:
    """One of the kernel's logs: whether it can be used here, or why not and what would help."""

    log: str
    port: str
    how: str
    available: bool
    reason: str | None
    remedy: str | None


@dataclass(frozen=True, slots=True)
class KvmFacts:
    """What is known of this host's KVM. ``available`` is whether guests can be made."""

    device: str
    machine: str
    available: bool
    api_version: int | None
    reason: str | None
    remedy: str | None
    capabilities: tuple[Capability, ...]
    logs: tuple[LogFacts, ...]


def probe_kvm(device: str = DEVICE) -> KvmFacts:
    """Ask this host's KVM. It makes a virtual machine without memory and closes it."""
    machine = platform.machine()
    try:
        with KvmSystem(device) as system, system.create_vm() as vm:
            answers = {cap: vm.check_extension(cap) for cap in Cap if cap in _PURPOSES}
            version = system.api_version
        architecture = host_architecture()
    except DirtyLogError as error:
        logs = tuple(_log(log, error) for log in Log)
        return KvmFacts(device, machine, False, None, error.reason or error.message, error.remedy, (), logs)  # noqa: FBT003 - a field
    missing = [cap for cap in _REQUIRED if not answers[cap]]
    ring_error = manual_error = bitmap_error = None
    if missing:
        bitmap_error = UnsupportedError(f"KVM lacks {missing[0].name}", remedy=_PURPOSES[missing[0]][1])
    if not answers[Cap.MANUAL_DIRTY_LOG_PROTECT2] & abi.DIRTY_LOG_MANUAL_PROTECT_ENABLE:
        cap = Cap.MANUAL_DIRTY_LOG_PROTECT2
        manual_error = UnsupportedError(f"KVM lacks {cap.name}", remedy=_PURPOSES[cap][1])
    try:
        choose_ring(answers.__getitem__, architecture)
    except UnsupportedError as error:
        ring_error = error
    errors = {Log.BITMAP: bitmap_error, Log.MANUAL: bitmap_error or manual_error, Log.RING: bitmap_error or ring_error}
    reason, remedy = (bitmap_error.message, bitmap_error.remedy) if bitmap_error else (None, None)
    capabilities = tuple(
        Capability(cap.name, value, _PURPOSES[cap][0], None if value else _PURPOSES[cap][1] or None)
        for cap, value in answers.items()
    )
    return KvmFacts(
        device, machine, not missing, version, reason, remedy, capabilities, tuple(_log(log, errors[log]) for log in Log)
    )


def _log(log: Log, error: DirtyLogError | None) -> LogFacts:
    port = PORTS[log]
    if error is None:
        return LogFacts(log.value, port.name, port.how, True, None, None)  # noqa: FBT003 - a field
    return LogFacts(log.value, port.name, port.how, False, error.reason or error.message, error.remedy)  # noqa: FBT003 - a field

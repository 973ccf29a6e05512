"""Every source of writes that this machine can exercise, under one signature: what the contract tests run over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from dirtylog.compare import ComparePort
from dirtylog.emulated.arch import PORTS
from dirtylog.emulated.guest import make_guest
from dirtylog.kvm.guest import make_kvm_guest
from dirtylog.kvm.memory import PORTS as KVM_PORTS
from dirtylog.linux.uffd_port import UffdPort
from dirtylog.options import KvmOptions, Log
from dirtylog.port import ProtectPort
from kvm_here import needs_kvm
from store_guests import make_store_guest, needs_store_guests

if TYPE_CHECKING:
    from collections.abc import Callable

    from _pytest.mark import ParameterSet

    from dirtylog.emulated.machine import EmulatedMemory
    from dirtylog.kvm.memory import KvmMemory
    from dirtylog.port import Port
    from store_guests import BufferGuest, ProcessGuest

_OF_PROCESSES: dict[str, type[Port]] = {
    "buffer-uffd": UffdPort,
    "buffer-compare": ComparePort,
    "process-uffd": UffdPort,
    "process-compare": ComparePort,
}
_TYPES: dict[str, type[Port]] = {**PORTS, **{f"kvm-{log.value}": port for log, port in KVM_PORTS.items()}, **_OF_PROCESSES}


def open_source(name: str, nbytes: int, **options: Any) -> EmulatedMemory | KvmMemory | BufferGuest | ProcessGuest:
    """Return a paused guest of a source; the options are those of make_guest."""
    if name in PORTS:
        return make_guest(name, nbytes, **options)
    if name in _OF_PROCESSES:
        return make_store_guest(name, nbytes, **options)
    return make_kvm_guest(nbytes, options=KvmOptions(log=Log(name.removeprefix("kvm-"))), **options)


def sources(wanted: Callable[[type[Port]], bool] = lambda _: True) -> list[ParameterSet]:
    """Return the sources whose port is wanted, for parametrize; those that need what is missing here skip."""
    return [pytest.param(name, marks=_marks(name)) for name, port in _TYPES.items() if wanted(port)]


def _marks(name: str) -> pytest.MarkDecorator | tuple[()]:
    if name in _OF_PROCESSES:
        return needs_store_guests(name)
    return needs_kvm if name.startswith("kvm-") else ()


def has_manual_protect(port: type[Port]) -> bool:
    """Return whether a port goes with manual protect."""
    return issubclass(port, ProtectPort)

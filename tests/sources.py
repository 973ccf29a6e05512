"""Every source of writes that this machine can exercise, under one signature: what the contract tests run over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from dirtylog.emulated.arch import PORTS
from dirtylog.emulated.guest import make_guest
from dirtylog.kvm.guest import make_kvm_guest
from dirtylog.kvm.memory import PORTS as KVM_PORTS
from dirtylog.options import KvmOptions, Log
from dirtylog.port import ProtectPort
from kvm_here import needs_kvm

if TYPE_CHECKING:
    from collections.abc import Callable

    from _pytest.mark import ParameterSet

    from dirtylog.emulated.machine import EmulatedMemory
    from dirtylog.kvm.memory import KvmMemory
    from dirtylog.port import Port

_TYPES: dict[str, type[Port]] = {**PORTS, **{f"kvm-{log.value}": port for log, port in KVM_PORTS.items()}}


def open_source(name: str, nbytes: int, **options: Any) -> EmulatedMemory | KvmMemory:
    """Return a paused guest of a source; the options are those of make_guest."""
    if name in PORTS:
        return make_guest(name, nbytes, **options)
    return make_kvm_guest(nbytes, options=KvmOptions(log=Log(name.removeprefix("kvm-"))), **options)


def sources(wanted: Callable[[type[Port]], bool] = lambda _: True) -> list[ParameterSet]:
    """Return the sources whose port is wanted, for parametrize; those that need KVM skip where there is none."""
    return [pytest.param(name, marks=needs_kvm if name.startswith("kvm-") else ()) for name, port in _TYPES.items() if wanted(port)]


def has_manual_protect(port: type[Port]) -> bool:
    """Return whether a port goes with manual protect."""
    return issubclass(port, ProtectPort)

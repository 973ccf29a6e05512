"""What this host can log of processes, and what not, why, and how to get it: for ``dirtylog check``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dirtylog.compare import ComparePort
from dirtylog.errors import DirtyLogError
from dirtylog.linux.arch import host_architecture
from dirtylog.linux.preflight import status_lines
from dirtylog.linux.probe import sees_discarded_tables
from dirtylog.linux.soft_dirty import SoftDirtyPort, missing_soft_dirty
from dirtylog.linux.uffd_port import UffdPort
from dirtylog.linux.userfaultfd import missing_uffd

_CAP_SYS_PTRACE = 1 << 19
_CAP_SYS_ADMIN = 1 << 21


@dataclass(frozen=True, slots=True)
class PortFacts:
    """One way to log the memory of processes. ``needs`` says what it takes on a host that has it."""

    port: str
    how: str
    targets: str
    exactness: str
    needs: str
    blind_spots: tuple[str, ...]
    available: bool
    reason: str | None
    remedy: str | None


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing about this host that matters for processes. ``remedy`` is empty where nothing is amiss."""

    name: str
    value: str
    purpose: str
    remedy: str


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """All of it."""

    ports: tuple[PortFacts, ...]
    facts: tuple[Fact, ...]


def probe_processes() -> ProcessFacts:
    """Try what there is. Nothing of it needs a privilege, and no process but this one is touched."""
    missing = missing_uffd()
    ports = (
        _port(UffdPort, "own buffers, other processes", "Linux 6.7; ptrace once, or an agent, for other processes", missing),
        _port(
            SoftDirtyPort, "other processes", "CONFIG_MEM_SOFT_DIRTY, ptrace; the process stops at each get", missing_soft_dirty()
        ),
        _port(ComparePort, "own buffers, other processes", "as much memory again, and the time to read it", None),
    )
    facts = [*_ptrace_facts()]
    if missing is None:
        facts.append(_discard_fact())
    return ProcessFacts(ports, tuple(facts))


def _port(port: type[UffdPort | SoftDirtyPort | ComparePort], targets: str, needs: str, missing: DirtyLogError | None) -> PortFacts:
    return PortFacts(
        port=port.name,
        how=port.how,
        targets=targets,
        exactness=port.exactness.value,
        needs=needs,
        blind_spots=port.blind_spots,
        available=missing is None,
        reason=None if missing is None else "; ".join(filter(None, (missing.message, missing.reason))),
        remedy=None if missing is None else missing.remedy,
    )


def _ptrace_facts() -> list[Fact]:
    capabilities = _capabilities()
    may = bool(capabilities & _CAP_SYS_PTRACE)
    scope = _scope()
    try:
        host_architecture()
        known = ""
    except DirtyLogError as error:
        known = str(error.remedy)
    return [
        Fact("injection", "unknown" if known else "known", "a userfaultfd made in a process that runs no agent", known),
        Fact(
            "CAP_SYS_PTRACE",
            "yes" if may else "no",
            "attach to processes of other users",
            ""
            if may
            else "run as root; in a container add --cap-add SYS_PTRACE; else only this user's own processes can be logged",
        ),
        Fact(
            "yama.ptrace_scope",
            "absent" if scope is None else str(scope),
            "attach to processes of this user",
            "" if may or not scope else "sysctl kernel.yama.ptrace_scope=0, or let the program run dirtylog.agent",
        ),
        Fact(
            "CAP_SYS_ADMIN",
            "yes" if capabilities & _CAP_SYS_ADMIN else "no",
            "attach to processes that filter their system calls (seccomp)",
            "" if capabilities & _CAP_SYS_ADMIN else "run as root, or let such a program run dirtylog.agent",
        ),
    ]


def _discard_fact() -> Fact:
    seen = sees_discarded_tables()
    return Fact(
        "discarded tables",
        "seen" if seen else "not seen",
        "pages that go with their page table (madvise)",
        "" if seen else "a second scan finds them: each get takes longer; kernels since July 2026 need none",
    )


def _capabilities() -> int:
    for line in status_lines(Path("/proc/self/status")):
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _scope() -> int | None:
    try:
        return int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None

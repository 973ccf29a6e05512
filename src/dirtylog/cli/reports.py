"""What ``dirtylog run`` prints: lines for people, a JSON document, or a JSON object a round."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from dirtylog.buffers.program import WrittenBuffer
from dirtylog.cli.exits import ExitCode
from dirtylog.size import format_size

if TYPE_CHECKING:
    from dirtylog.linux.process import ProcessMemory
    from dirtylog.memslot import MemorySlot
    from dirtylog.observe.rounds import Round
    from dirtylog.target import AnyMemory

SCHEMA = "dirtylog/run/1"
_MB = 1e6
_MOST_WRITTEN = 8


class Report(Protocol):
    """How a run is told."""

    def add(self, found: Round) -> None:
        """Tell of a round."""

    def end(self, status: ExitCode) -> None:
        """Tell of the end."""


class Text:
    """A line a round, for people."""

    def __init__(self, target: str, memory: AnyMemory) -> None:
        self._memory = memory
        self._pages = self._bytes = 0
        self._seconds = self._get_seconds = 0.0
        self._by_mapping: Counter[tuple[str, str]] = Counter()
        facts = facts_of(target, memory)
        about = f"port {facts['port']} ({facts['exactness']}), page size {facts['page_size']}, {_extent(memory)}"
        print(f"{' '.join(target.split())}: {about}")
        if facts.get("fallback"):
            print(f"not the best port: {facts['fallback']}")
        print(f"{'round':>6} {'seconds':>9} {'dirty pages':>12} {'MB/s':>9} {'runs':>7} {'get ms':>8}", flush=True)

    def add(self, found: Round) -> None:
        """Print a line."""
        self._pages, self._bytes = self._pages + found.dirty_pages, self._bytes + found.dirty_bytes
        self._seconds, self._get_seconds = self._seconds + found.seconds, self._get_seconds + found.get_seconds
        for slot, dirty in found.dirty.items():
            if slot.permissions:
                self._by_mapping[slot.name or "anonymous", slot.permissions] += dirty.count()
        rate = found.dirty_bytes / _MB / found.seconds
        print(
            f"{found.number:>6} {found.seconds:>9.3f} {found.dirty_pages:>12} {rate:>9.1f} {len(found.runs()):>7} "
            f"{found.get_seconds * 1e3:>8.3f}",
            flush=True,
        )

    def end(self, status: ExitCode) -> None:
        """Print the total, and what there is to know about it."""
        rate = self._bytes / _MB / self._seconds if self._seconds else 0.0
        early = status not in (ExitCode.DONE, ExitCode.INCOMPLETE)
        print(
            f"{'total':>6} {self._seconds:>9.3f} {self._pages:>12} {rate:>9.1f} {'':>7} {self._get_seconds * 1e3:>8.3f}"
            f"{f'   (ended early, exit {int(status)})' if early else ''}"
        )
        for (name, permissions), count in self._by_mapping.most_common(_MOST_WRITTEN):
            if count:
                print(f"{count:>29} of {name} {permissions}")
        print(", ".join(f"{name.replace('_', ' ')} {count}" for name, count in asdict(self._memory.stats).items()))
        if getattr(self._memory, "status", None) is not None:
            print(f"the command has ended, exit status {getattr(self._memory, 'status', None)}")
        print_coverage(self._memory)


class Lines:
    """A JSON object a round."""

    def __init__(self, target: str, memory: AnyMemory) -> None:
        self._target, self._memory = target, memory

    def add(self, found: Round) -> None:
        """Print it at once."""
        print(json.dumps(facts_of(self._target, self._memory) | _round(found)), flush=True)

    def end(self, status: ExitCode) -> None:
        """Print nothing."""


class Document:
    """One JSON document at the end."""

    def __init__(self, target: str, memory: AnyMemory) -> None:
        self._target, self._memory = target, memory
        self._rounds: list[dict[str, Any]] = []
        self._slots: dict[MemorySlot, None] = {}

    def add(self, found: Round) -> None:
        """Keep it."""
        self._rounds.append(_round(found))
        self._slots |= dict.fromkeys(found.dirty)

    def end(self, status: ExitCode) -> None:
        """Print it all."""
        total = ("seconds", "get_seconds", "dirty_pages", "dirty_bytes")
        document = {
            "slots": [_slot(slot) for slot in self._slots or self._memory.slots],
            "complete": status is ExitCode.DONE,
            "rounds": self._rounds,
            "total": {name: sum(found[name] for found in self._rounds) for name in total},
        }
        print(json.dumps(facts_of(self._target, self._memory) | document | asdict(self._memory.stats)))


def print_coverage(memory: AnyMemory) -> None:
    """Print which writes are not seen: those that the source cannot see, and those that were missed here and now."""
    for blind in memory.blind_spots:
        print(f"blind spot: {blind}")
    for gap in memory.incomplete:
        print(f"incomplete: {gap}")


def facts_of(target: str, memory: AnyMemory) -> dict[str, Any]:
    """Return what every result names."""
    facts = {
        "schema": SCHEMA,
        "target": target,
        "port": memory.port.name,
        "exactness": memory.exactness.value,
        "page_size": min((slot.page_size for slot in memory.slots), default=0),
        "blind_spots": list(memory.blind_spots),
        "incomplete": list(memory.incomplete),
    }
    if isinstance(memory, WrittenBuffer):
        return facts
    vcpus = getattr(memory, "vcpus", None)
    if vcpus is not None:
        return facts | {"vcpus": len(vcpus)}
    process: ProcessMemory = memory  # type: ignore[assignment]  # what has no vCPUs; its class is Linux's, and not imported here
    return facts | {
        "pid": process.pid,
        "attached": process.attached.value,
        "fallback": process.fallback,
        "status": process.status,
        "skipped_mappings": [
            {"address": mapping.start, "nbytes": mapping.end - mapping.start, "name": mapping.name, "reason": reason}
            for mapping, reason in process.skipped
        ],
    }


def _extent(memory: AnyMemory) -> str:
    size = format_size(sum(slot.nbytes for slot in memory.slots if not slot.readonly))
    if isinstance(memory, WrittenBuffer):
        return f"{size} of this process"
    vcpus = getattr(memory, "vcpus", None)
    if vcpus is not None:
        return f"{size}, {len(vcpus)} vCPU{'s' * (len(vcpus) > 1)}"
    return f"{len(memory.slots)} mappings of {size} in process {getattr(memory, 'pid', 0)}"


def _slot(slot: MemorySlot) -> dict[str, Any]:
    facts = {"id": slot.id, "base_gfn": slot.base_gfn, "npages": slot.npages, "readonly": slot.readonly}
    if not slot.permissions:
        return facts
    return facts | {
        "address": slot.host_address,
        "page_size": slot.page_size,
        "name": slot.name,
        "permissions": slot.permissions,
    }


def _round(found: Round) -> dict[str, Any]:
    return {
        "round": found.number,
        "seconds": found.seconds,
        "get_seconds": found.get_seconds,
        "dirty_pages": found.dirty_pages,
        "dirty_bytes": found.dirty_bytes,
        "dirty_by_slot": {str(slot.id): dirty.count() for slot, dirty in found.dirty.items() if dirty},
        "runs": found.runs().tolist(),
    }

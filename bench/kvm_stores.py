"""What logging costs a KVM guest that runs: its stores a second while gets come and go."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from dirtylog.dirty_log import DirtyLog
from dirtylog.guests.machine import RAM_SLOT
from dirtylog.kvm import KvmOptions, make_kvm_guest
from dirtylog.kvm.arch import x86_64_registers as x86
from dirtylog.options import Log
from kvm_filler import why_no_kvm
from report import Section, Spread, alternate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dirtylog.kvm import KvmMemory

_NBYTES = 64 << 20
_OFF = "off"
_INTERVALS = {_OFF: 0.0, "10 ms": 0.01, "100 ms": 0.1}
_WARM_UP = 0.5  # the first run touches memory


def kvm_stores(*, quick: bool) -> Section:
    """Measure a guest of one vCPU that writes as fast as it can."""
    rounds, seconds = (2, 0.2) if quick else (3, 1.0)
    section = Section(
        "9. The stores of a KVM guest that is logged while it runs",
        f"A guest of {_NBYTES >> 20} MiB with one vCPU sweeps its memory, or writes a hot set of a 32nd of it, for {seconds:g} "
        "s, and counts its stores itself; meanwhile this process gets its log every 10 or 100 ms (manual: gets and clears). The "
        f"anchor is the same guest without logging, in turn with the others. {rounds} rounds. No target: the cost is the "
        "kernel's, of faults and exits.",
    )
    missing = {log: why_no_kvm(log) for log in Log}
    if missing[Log.BITMAP] is not None:
        section.rows.append({"program": missing[Log.BITMAP]})
        return section
    for program in ("sweep", "hotset"):
        for log in Log:
            if missing[log] is None:
                section.rows += _rows(program, log, rounds, seconds)
    return section


def _rows(program: str, log: Log, rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    rates: dict[str, list[float]] = {way: [] for way in _INTERVALS}
    gets: dict[str, list[float]] = {way: [] for way in _INTERVALS}
    with make_kvm_guest(_NBYTES, program=program, options=KvmOptions(log=log)) as guest:
        _run(guest, None, 0.0, _WARM_UP)
        for _, way in alternate(tuple(_INTERVALS), rounds):
            interval = _INTERVALS[way]
            with ExitStack() as stack:
                dirty_log = stack.enter_context(DirtyLog(guest)) if interval else None
                rate, count = _run(guest, dirty_log, interval, seconds)
            rates[way].append(rate / 1e6)
            gets[way].append(count)
    for way in _INTERVALS:
        yield {
            "program": program,
            "log": log.value,
            "gets every": way,
            "stores, millions/s": Spread.of(rates[way]),
            "ratio to off": Spread.of(one / off for one, off in zip(rates[way], rates[_OFF], strict=True)),
            "gets": f"{statistics.median(gets[way]):.0f}",
        }


def _run(guest: KvmMemory, log: DirtyLog | None, interval: float, seconds: float) -> tuple[float, int]:
    """Let the guest run, and get its log every ``interval`` seconds; return its stores a second, and the gets."""
    before = _stores(guest)
    gets = 0
    begin = time.perf_counter()
    guest.resume()
    while (left := begin + seconds - time.perf_counter()) > 0:
        if log is None:
            time.sleep(left)
        else:
            time.sleep(min(interval, left))
            log.get(RAM_SLOT)
            gets += 1
    guest.pause()
    elapsed = time.perf_counter() - begin
    guest.check()
    return (_stores(guest) - before) / elapsed, gets


def _stores(guest: KvmMemory) -> int:
    """Return how often a guest has stored: the value that it stores grows by one each time. It must be paused."""
    return guest.cpus[0].vcpu.get(x86.Regs).rax

"""What a get of a KVM guest costs, against the bare ioctl on the same slot."""

from __future__ import annotations

import fcntl
import mmap
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from dirtylog.dirty_log import DirtyLog
from dirtylog.guests.host import host_memory
from dirtylog.guests.programs import PAGE_SIZE
from dirtylog.kvm import abi
from dirtylog.options import Log
from dirtylog.size import format_size
from kvm_filler import RAM, TINY, FillingGuest, at_random, in_a_row, touched_memory, why_no_kvm
from report import Section, Spread, Target, alternate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvm_filler import Fill

_SMALL = 1 << 14
_QUICK_LARGE = 1 << 18
_LARGE = 1 << 20
_OVER_US = 20
_OVER_RATIO = 1.1


def kvm_gets(*, quick: bool) -> Section:
    """Measure gets of slots that a guest has dirtied; it stands still then."""
    section = Section(
        "7. A get of a KVM guest",
        "The guest stores to 0, 1 (at random) or 100 % of the slot's pages, on a thread of its own; then it stands still, and "
        "the slot is asked for, in turn by DirtyLog.get and by the bare ioctl (fcntl.ioctl, its argument made beforehand, into "
        "whole pages). The counts are checked. Elapsed time. Two gets of another slot, of one bitmap word, come right before, "
        "on either side: what the guest's run evicts from the caches is not the call's own cost. Cold: without them. manual: a "
        "get with manual_protect, which reads and changes nothing, so that pages are dirtied once for all its rounds. ring: a "
        "get of any slot harvests for all, so there is only the cold one, and it has no anchor; what goes beyond a quarter of "
        "the ring the collector has harvested while the guest ran.",
    )
    reason = why_no_kvm(Log.BITMAP)
    if reason is not None:
        section.rows.append({"get": reason})
        return section
    large = _QUICK_LARGE if quick or (host_memory() or 0) < 8 << 30 else _LARGE
    for npages, rounds in ((_SMALL, (60, 15, 10) if quick else (400, 60, 60)), (large, (60, 5, 2) if quick else (400, 60, 5))):
        ram = touched_memory(npages)
        for log in Log:
            if why_no_kvm(log) is None:
                section.rows += _rows(log, ram, npages, rounds)
    section.targets = [
        _target(section, _SMALL, f"a get at most {_OVER_US} us above the bare ioctl", 1),
        _target(section, large, f"a get at most {_OVER_US} us above {_OVER_RATIO} times the bare ioctl", _OVER_RATIO),
    ]
    return section


def _target(section: Section, npages: int, text: str, ratio: float) -> Target:
    slot = format_size(npages * PAGE_SIZE)
    over = {
        f"{row['dirty']} dirty": row["get, us"].median - ratio * row["bare ioctl, us"].median
        for row in section.rows
        if row["log"] == Log.BITMAP.value and row["slot"] == slot
    }
    return Target(f"{slot}: {text}", _OVER_US, "us", over)


def _rows(log: Log, ram: mmap.mmap, npages: int, rounds: tuple[int, int, int]) -> Iterator[dict[str, Any]]:
    fills = ("0 %", None), ("1 %", at_random(npages // 100, npages)), ("100 %", in_a_row(npages))
    with FillingGuest(log, ram) as guest, DirtyLog(guest.memory, manual_protect=log is Log.MANUAL) as dirty_log:
        sides = _Sides(guest, dirty_log, npages)
        for (name, fill), count in zip(fills, rounds, strict=True):
            us = sides.measure(fill, count)
            get, bare = us.get("get"), us.get("bare")
            yield {
                "log": log.value,
                "slot": format_size(npages * PAGE_SIZE),
                "dirty": name,
                "get, us": get or "-",
                "bare ioctl, us": bare or "-",
                "difference of medians, us": f"{get.median - bare.median:.1f}" if get and bare else "-",
                "cold get, us": us["cold get"],
                "cold bare, us": us.get("cold bare", "-"),
                "rounds, cold": f"{count}, {_cold(count)}",
            }


def _cold(rounds: int) -> int:
    return max(2, rounds // 4)


class _Sides:
    """The two ways to ask for one slot of one guest."""

    def __init__(self, guest: FillingGuest, log: DirtyLog, npages: int) -> None:
        self._guest = guest
        self._log = log
        self._fd = guest.memory.vm.fileno()
        self._words = np.frombuffer(mmap.mmap(-1, npages // 8), np.uint64)
        # Safe: as long as the slot's bitmap, and this object outlives the calls.
        self._argument = abi.DirtyLogArgument(slot=RAM, dirty_bitmap=self._words.ctypes.data)

    def measure(self, fill: Fill | None, rounds: int) -> dict[str, Spread]:
        """Return the microseconds of each way, after so much has been dirtied."""
        name = self._guest.memory.port.name
        # Not in turn with one another: each would leave the other's code in the caches, or not.
        order = [("cold get", "cold bare"), ("get", "bare")] if name != "kvm-ring" else [("cold get",)]
        us: dict[str, list[float]] = {way: [] for ways in order for way in ways}
        filled = fill is None
        for _, way in (turn for ways in order for turn in alternate(ways, rounds if "get" in ways else _cold(rounds))):
            if fill is not None and not filled:
                self._guest.fill(fill)
                filled = name == "kvm-manual"
            if not way.startswith("cold"):
                self._log.get(TINY)
                self._log.get(TINY)
            seconds, count = self._get() if way.endswith("get") else self._bare()
            assert count == (fill.pages if fill is not None else 0)
            us[way].append(seconds * 1e6)
        return {way: Spread.of(values) for way, values in us.items()}

    def _get(self) -> tuple[float, int]:
        begin = time.perf_counter()
        dirty = self._log.get(RAM)
        seconds = time.perf_counter() - begin
        return seconds, dirty.count()

    def _bare(self) -> tuple[float, int]:
        begin = time.perf_counter()
        fcntl.ioctl(self._fd, abi.KVM_GET_DIRTY_LOG, self._argument)
        seconds = time.perf_counter() - begin
        return seconds, int(np.bitwise_count(self._words).sum())

"""What it costs to harvest and reset a full dirty ring, against a C program that does the same."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.kvm.ring_port import KvmRingPort
from dirtylog.log import start_logging
from dirtylog.options import MAX_ENTRIES, Log
from kvm_filler import BASE, RAM, UNROLLED, FillingGuest, at_random, in_a_row, touched_memory, why_no_kvm
from report import Section, Spread, Target

if TYPE_CHECKING:
    from kvm_filler import Fill

_SOURCE = Path(__file__).with_name("ring.c")
_PAGES = 1 << 16
# The kernel makes a vCPU leave the guest 64 entries before its ring is full, and hardware that logs into a buffer of its own 512
# more. Some hosts notice late and write over entries, so neither limit is ever reached here.
_RESERVES = (64, 64 + 512)
_TIMES = 3


def kvm_ring(*, quick: bool) -> Section:
    """Measure KvmRingPort.collect on a ring that a guest has filled."""
    groups, rounds = (2, 2) if quick else (4, 5)
    section = Section(
        "8. Harvest and reset of a full dirty ring",
        f"A guest stores to as many of {_PAGES} pages as its ring of {MAX_ENTRIES} entries holds, in a row or at random; then it "
        "stands still, and KvmRingPort.collect harvests, marks and resets, without the collector. The anchor is a C program, "
        "ring.c, with the same guest and the bare loop: for each entry read its flag, slot and offset, set a bit, set its flag; "
        f"then KVM_RESET_DIRTY_RINGS. The counts are checked. Elapsed time. {groups} fresh guests of either side, in turn, of "
        f"{rounds} rounds each.",
    )
    reason = why_no_kvm(Log.RING)
    if reason is not None:
        section.rows.append({"order": reason})
        return section
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        anchor = _Anchor(Path(folder))
        pages = _capacity()
        for order, fill in (("in a row", in_a_row(pages)), ("at random", at_random(pages, _PAGES))):
            ours: list[tuple[float, float]] = []
            bare: list[tuple[float, float]] = []
            for _ in range(groups):
                bare += anchor.collect(fill, rounds)
                ours += _collect(fill, rounds)
            whole, reset = (Spread.of(values) for values in zip(*ours, strict=True))
            row = {"order": order, "entries": f"{pages}", "collect, ms": whole, "its reset, ms": reset}
            if bare:
                bare_whole, bare_reset = (Spread.of(values) for values in zip(*bare, strict=True))
                ratios[order] = whole.median / bare_whole.median
                row |= {"C, ms": bare_whole, "C's reset, ms": bare_reset, "ratio of medians": f"{ratios[order]:.2f}"}
            else:
                row |= {"C, ms": anchor.why_not, "C's reset, ms": "-", "ratio of medians": "-"}
            section.rows.append(row)
    if ratios:
        section.targets.append(
            Target(f"a full ring harvested and reset in at most {_TIMES} times C's time", _TIMES, "times", ratios)
        )
    return section


def _capacity() -> int:
    """Return how many pages, a multiple of 64, fill a ring and do not reach its limit."""
    pages = 0
    with FillingGuest(Log.RING, touched_memory(_PAGES)) as guest:
        ring = _Ring(guest)
        for reserve in _RESERVES:
            pages = (MAX_ENTRIES - reserve - 1) // UNROLLED * UNROLLED
            if ring.holds(in_a_row(pages)):
                break
    return pages


def _collect(fill: Fill, rounds: int) -> list[tuple[float, float]]:
    """Return for each round the milliseconds of a harvest with its reset, and of the reset alone, of a fresh guest."""
    with FillingGuest(Log.RING, touched_memory(_PAGES)) as guest:
        ring = _Ring(guest)
        # One round more: the first touches memory.
        return [ring.collect(fill) for _ in range(rounds + 1)][1:]


class _Ring:
    """The ring of a guest, and the port that collects it."""

    def __init__(self, guest: FillingGuest) -> None:
        port = guest.memory.port
        assert isinstance(port, KvmRingPort)
        self._guest = guest
        self._port = port
        self._reset_seconds = 0.0
        self._reset_dirty_rings = guest.memory.vm.reset_dirty_rings
        guest.memory.vm.reset_dirty_rings = self._timed_reset  # type: ignore[method-assign]  # its share is a column
        port.end_collector()
        start_logging(guest.memory, RAM)

    def holds(self, fill: Fill) -> bool:
        """Return whether the ring holds so much without becoming full."""
        self._guest.fill(fill)
        with self._port.mmu_lock:
            self._port.collect()
        self._take()
        return not self._port.stats.full_exits

    def collect(self, fill: Fill) -> tuple[float, float]:
        """Fill the ring and collect it; return the milliseconds of that, and of the reset alone."""
        self._guest.fill(fill)
        self._reset_seconds = 0.0
        with self._port.mmu_lock:
            begin = time.perf_counter()
            count = self._port.collect()
            seconds = time.perf_counter() - begin
        assert count == fill.pages == self._take()
        return seconds * 1e3, self._reset_seconds * 1e3

    def _take(self) -> int:
        """Empty the slot's bitmap; return how many bits were set."""
        _, bitmap = self._guest.memory.slots.logged(RAM)
        with self._port.mmu_lock:
            count = int(np.bitwise_count(bitmap.exchange().values).sum())
            bitmap.commit()
        return count

    def _timed_reset(self) -> int:
        begin = time.perf_counter()
        count = self._reset_dirty_rings()
        self._reset_seconds += time.perf_counter() - begin
        return count


class _Anchor:
    """The C program, compiled into ``folder`` where there is a compiler; ``why_not`` says why there is none."""

    def __init__(self, folder: Path) -> None:
        self.why_not = "no C compiler"
        self._folder = folder
        self._ring: Path | None = None
        compiler = shutil.which("cc")
        if compiler is not None:
            ring = folder / "ring"
            done = subprocess.run([compiler, "-O2", "-o", str(ring), str(_SOURCE)], capture_output=True, text=True, check=False)  # noqa: S603 - our own program
            if done.returncode:
                self.why_not = f"cc: {done.stderr.strip().splitlines()[0]}"
            else:
                self._ring = ring

    def collect(self, fill: Fill, rounds: int) -> list[tuple[float, float]]:
        """Return the same of the C program; nothing where there is none."""
        if self._ring is None:
            return []
        program = self._folder / "program"
        program.write_bytes(fill.program)
        registers = (f"{name}={value}" for name, value in fill.registers.items())
        # One round more: the first touches memory.
        command = [str(self._ring), str(program), str(BASE), str(_PAGES), str(rounds + 1), *registers]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 - our own program
        lines = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
        assert all(entries == fill.pages for entries, _, _ in lines)
        return [(whole / 1e6, reset / 1e6) for _, whole, reset in lines[1:]]

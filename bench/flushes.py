"""What a get costs while vCPUs run: it has to wait until each has flushed its TLB."""

from __future__ import annotations

import statistics
import time

from dirtylog.dirty_log import DirtyLog
from dirtylog.emulated.guest import make_guest
from dirtylog.guests.machine import RAM_SLOT
from report import Section, Spread

_NBYTES = 1 << 26
_INTERVAL = 0.005


def flushes(*, quick: bool) -> Section:
    """Measure gets of a guest that runs freely."""
    gets = 60 if quick else 400
    section = Section(
        "6. A get while vCPUs run freely",
        f"{gets} gets of a 64 MiB arm64 guest, {_INTERVAL * 1e3:.0f} ms apart, while its vCPUs write their hot pages; elapsed "
        "time. The anchor is the get after as long a run with all vCPUs paused. No target: the wait depends on how many cores "
        "there are.",
    )
    for vcpus in (1, 2, 4):
        running: list[float] = []
        dirty: list[int] = []
        with make_guest("arm64", _NBYTES, program="hotset", vcpus=vcpus) as memory, DirtyLog(memory) as log:
            paused: list[float] = []
            for number in range(gets):
                # In turn: a get while they run, then one when they have run for as long but stand still.
                memory.resume()
                time.sleep(_INTERVAL)
                if number % 2:
                    memory.pause()
                begin = time.perf_counter()
                count = log.get(RAM_SLOT).count()
                seconds = time.perf_counter() - begin
                (paused if number % 2 else running).append(seconds * 1e3)
                dirty.append(count)
            memory.pause()
            memory.check()
        section.rows.append(
            {
                "vCPUs": str(vcpus),
                "running, ms": Spread.of(running),
                "paused, ms": Spread.of(paused),
                "ratio": f"{statistics.median(running) / statistics.median(paused):.1f}",
                "dirty pages": Spread.of(dirty),
            }
        )
    return section

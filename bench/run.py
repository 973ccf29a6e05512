"""Measure dirtylog. Every figure stands beside its anchor, measured in the same run in turn with it, as median [min - max].

Times are CPU time of the measuring thread, which does all the work; where vCPUs run beside it, and with KVM, they are elapsed time.

Targets are recorded, not asserted: a missed one is printed, and the exit status is 0 all the same. It is not 0 when a
measurement itself is broken, such as a guest that faults or a get that finds other pages than were written. Benchmarks of KVM
guests are skipped where there can be none; they need Linux, an x86_64 processor and permission to use /dev/kvm.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.emulated.cpu_unicorn import unicorn_version
from dirtylog.guests.host import host_memory
from flushes import flushes
from gets import gets
from recording_reads import recording_reads
from resets import resets
from stores import first_stores, hits
from terabyte import allocation, terabyte

if TYPE_CHECKING:
    from collections.abc import Callable

    from report import Section

BENCHMARKS: dict[str, Callable[..., Section]] = {
    "hits": hits,
    "first-stores": first_stores,
    "gets": gets,
    "terabyte": terabyte,
    "allocation": allocation,
    "flushes": flushes,
    "resets": resets,
    "recording-reads": recording_reads,
}
if sys.platform == "linux":
    from buffer_alternatives import buffer_alternatives
    from buffer_gets import buffer_gets
    from buffer_stores import buffer_stores
    from checkpoint_restores import checkpoint_restores
    from checkpoint_rivals import checkpoint_rivals
    from checkpoint_saves import checkpoint_saves
    from kvm_gets import kvm_gets
    from kvm_ring import kvm_ring
    from kvm_stores import kvm_stores
    from precopy import precopy
    from process_costs import attach_pauses, process_reads
    from recording_cost import recording_cost
    from report_page import report_page

    BENCHMARKS |= {"kvm-gets": kvm_gets, "kvm-ring": kvm_ring, "kvm-stores": kvm_stores}
    BENCHMARKS |= {"buffer-gets": buffer_gets, "buffer-stores": buffer_stores, "buffer-alternatives": buffer_alternatives}
    BENCHMARKS |= {"process-attach": attach_pauses, "process-reads": process_reads}
    BENCHMARKS |= {"recording-cost": recording_cost, "precopy": precopy, "report-page": report_page}
    BENCHMARKS |= {"checkpoint-saves": checkpoint_saves, "checkpoint-rivals": checkpoint_rivals}
    BENCHMARKS |= {"checkpoint-restores": checkpoint_restores}


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: the platform module's name stands
    return {
        "CPU": f"{model}, {os.cpu_count()} cores",
        "memory": f"{(host_memory() or 0) / (1 << 30):.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "NumPy": np.__version__,
        "Unicorn": str(unicorn_version()),
    }


def main() -> None:
    """Run the benchmarks and print their tables and targets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, about a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    parser.add_argument("--only", choices=BENCHMARKS, action="append", help="run just this benchmark; may be repeated")
    options = parser.parse_args()
    begin = time.monotonic()
    about = machine()
    print("; ".join(f"{name}: {value}" for name, value in about.items()), end="\n\n")
    sections = []
    for name in options.only or BENCHMARKS:
        sections.append(BENCHMARKS[name](quick=options.quick))
        print(sections[-1], flush=True)
    targets = [target for section in sections for target in section.targets]
    for target in targets:
        print(target)
    print(f"\n{time.monotonic() - begin:.0f} s")
    if options.json is not None:
        results = {
            "machine": about,
            "sections": [asdict(section) for section in sections],
            "targets": [{"text": target.text, "met": target.met, "values": target.values} for target in targets],
        }
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

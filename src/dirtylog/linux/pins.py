"""Pages that the kernel or a device may write without a fault, because they are pinned; as far as the kernel shows them.

Registered buffers of io_uring are listed in /proc/PID/fdinfo (UserBufs, address and length). What else is pinned for long (VFIO,
RDMA, AF_XDP) is only counted: VmPin in /proc/PID/status, which counts the registered buffers too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from dirtylog.linux.preflight import read_status

_BUFFER = re.compile(r"^ *\d+: 0x([0-9a-f]{1,16})/(\d{1,20})$", re.MULTILINE)


class Pins(NamedTuple):
    """``ranges`` are (address, bytes) of registered buffers; ``unexplained`` bytes are pinned elsewhere."""

    ranges: tuple[tuple[int, int], ...]
    unexplained: int


NO_PINS = Pins((), 0)


def pins_of(pid: int) -> Pins:
    """Return what is pinned in a process. Only where something is are its descriptors looked at."""
    pinned = read_status(pid).pinned
    if not pinned:
        return NO_PINS
    ranges: list[tuple[int, int]] = []
    try:
        for entry in Path(f"/proc/{pid}/fdinfo").iterdir():
            ranges += _buffers(entry)
    except OSError:
        return Pins((), pinned)
    ranges = sorted(set(ranges))  # a ring may have several descriptors
    return Pins(tuple(ranges), max(0, pinned - sum(_whole_pages(*one) for one in ranges)))


def _buffers(entry: Path) -> list[tuple[int, int]]:
    try:
        _, found, rest = entry.read_text(encoding="ascii", errors="replace").partition("UserBufs:")
    except OSError:
        return []  # closed meanwhile
    return [(int(address, 16), int(nbytes)) for address, nbytes in _BUFFER.findall(rest)] if found else []


def _whole_pages(address: int, nbytes: int) -> int:
    return (-(-(address + nbytes) // 4096) - address // 4096) * 4096

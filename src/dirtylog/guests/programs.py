"""What built-in guests do: every one is the store loop with other registers.

The loop stores a value to page ``base + page``, adds ``step`` to the value, and goes on to page
``(page * mul + add) & mask``, ``count`` times or for ever.
"""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dirtylog.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE_SIZE = 4096


@dataclass(frozen=True, slots=True)
class Pattern:
    """The registers of one vCPU's store loop. ``base`` is a guest-physical address; ``count`` None is for ever."""

    base: int
    page: int = 0
    mul: int = 1
    add: int = 1
    mask: int = 0
    value: int = 1
    step: int = 1
    count: int | None = None

    def registers(self) -> tuple[int, ...]:
        """Return the values of page, mul, add, mask, base, value, step, count, tick."""
        endless = self.count is None
        return (
            self.page,
            self.mul,
            self.add,
            self.mask,
            self.base,
            self.value,
            self.step,
            1 if self.count is None else self.count,
            0 if endless else 1,
        )


def sweep(window_page: int, window_pages: int, index: int, vcpus: int) -> Pattern:
    """Write the window page after page, over and over; several vCPUs start evenly spaced."""
    return Pattern(base=window_page * PAGE_SIZE, page=window_pages * index // vcpus, mask=window_pages - 1)


def random(window_page: int, window_pages: int, index: int, vcpus: int) -> Pattern:
    """Walk the window in a pseudo-random order that meets every page once a period (Hull-Dobell: mul = 1 mod 4, add odd)."""
    return Pattern(
        base=window_page * PAGE_SIZE,
        page=window_pages * index // vcpus,
        mul=0x5D588B65 & 0x3FFFFFFF,
        add=0x269EC3,
        mask=window_pages - 1,
    )


def hotset(window_page: int, window_pages: int, index: int, vcpus: int) -> Pattern:
    """Write a few hot pages over and over; the last of several vCPUs sweeps the whole window, so that the rest is cool, not dead.

    Each vCPU has hot pages of its own: a 32nd, 64th or 128th of the window, as their number goes.
    """
    if vcpus > 1 and index == vcpus - 1:
        return sweep(window_page, window_pages, 0, 1)
    hot = max(1, window_pages >> (5 + index % 3))
    start = window_pages * (2 * index + 1) // (2 * max(1, vcpus - 1)) // hot * hot
    return Pattern(base=(window_page + min(start, window_pages - hot)) * PAGE_SIZE, mul=5, add=3, mask=hot - 1)


def idle(window_page: int, window_pages: int, index: int, vcpus: int) -> Pattern:  # noqa: ARG001 - one signature for all
    """Write nothing, and halt at once."""
    return Pattern(base=window_page * PAGE_SIZE, count=0)


PROGRAMS: dict[str, Callable[[int, int, int, int], Pattern]] = {
    "sweep": sweep,
    "random": random,
    "hotset": hotset,
    "idle": idle,
}
"""By name: a function of (first page of the window, pages in it, a power of two, vCPU index, number of vCPUs)."""


def store_loop(isa: str) -> bytes:
    """Return the assembled store loop of an instruction set."""
    return importlib.resources.files("dirtylog.guests").joinpath(f"{isa}.bin").read_bytes()


def patterns(program: str, npages: int, vcpus: int) -> list[Pattern]:
    """Return each vCPU's pattern for a guest of ``npages`` pages: the window is the largest power of two, at the memory's end."""
    make = PROGRAMS.get(program)
    if make is None:
        raise InvalidArgumentError(f"unknown program {program!r}; the programs are: {', '.join(PROGRAMS)}")
    window = 1 << npages.bit_length() - 1
    return [make(npages - window, window, index, vcpus) for index in range(vcpus)]

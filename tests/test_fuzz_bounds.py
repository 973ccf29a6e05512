"""How the fuzz tests measure: what a decoder may allocate and how long it may run, both as stated bounds.

The fuzz tests feed everything that decodes bytes or numbers from outside. In a test run they are always the same inputs;
``make fuzz`` runs the same properties under a coverage-guided fuzzer, which looks for new ones.
"""

from __future__ import annotations

import signal
import tracemalloc
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Iterator

KIB, MIB = 1 << 10, 1 << 20
CPU_SECONDS = 2.0
"""What one small input may take, where it takes milliseconds: far from both, so that a slow machine is no hang."""

FUZZED = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def _extremes(bits: int) -> st.SearchStrategy[int]:
    top = 1 << bits
    near = sorted({value for base in (0, 1 << 12, 1 << bits // 2, top >> 1, top) for value in range(base - 2, base + 3)})
    return st.sampled_from([value for value in near if 0 <= value < top]) | st.integers(0, top - 1)


U16, U32, U64 = _extremes(16), _extremes(32), _extremes(64)
"""Unsigned numbers, often beside a power of two where something ends."""


class TooLongError(BaseException):
    """A decoder does not come to its end. No Exception, for a decoder may catch those."""


@contextmanager
def bounded(nbytes: int, seconds: float = CPU_SECONDS) -> Iterator[None]:
    """Fail if what is done here allocates more than ``nbytes`` at any time, or takes more of the CPU than ``seconds``.

    Python's and NumPy's memory counts, what is mapped does not. CPU time, because other programs cannot add to it.
    """

    def too_long(*_: Any) -> None:
        raise TooLongError(f"it has run for {seconds} s")

    before = signal.signal(signal.SIGPROF, too_long)
    tracemalloc.start()
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        signal.signal(signal.SIGPROF, before)
    assert peak <= nbytes, f"{peak} bytes were allocated; the bound is {nbytes}"


@pytest.mark.parametrize("allocate", [bytes, bytearray, lambda nbytes: np.zeros(nbytes, np.uint8)], ids=["bytes", "array", "NumPy"])
def test_what_is_allocated_and_let_go_again_is_seen(allocate: Any) -> None:
    with bounded(MIB + 64 * KIB):
        allocate(MIB)
    with pytest.raises(AssertionError, match="the bound is"), bounded(MIB):
        allocate(2 * MIB)


def test_what_does_not_end_is_ended() -> None:
    with pytest.raises(TooLongError), bounded(MIB, seconds=0.05):
        while True:
            pass

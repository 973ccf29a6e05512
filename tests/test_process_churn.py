"""Another process whose mappings are written, and change, all the time: a copy of what is reported is the memory."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from churners import Churner, Churning
from dirtylog.linux.mappings import read_mappings
from shadows import no_swap
from victims import needs_victims

pytestmark = [needs_victims, pytest.mark.skipif(not no_swap(), reason="what is swapped out would be taken for not there")]

SECONDS = 6.0
LISTING_SECONDS = 4.0


@pytest.mark.parametrize("how", ["pause", "hold"])
def test_nothing_is_lost_of_a_process_that_churns(how: str) -> None:
    churning = Churning(random.randrange(1, 1 << 30), how)
    churning.run(SECONDS)
    assert churning.shadow.reports > 10_000, churning
    assert churning.shadow.compares >= 2
    assert churning.counts.changes > 500
    print(churning)


def test_mappings_are_listed_in_order_whatever_happens() -> None:
    """The kernel gives the list in pieces, and between two of them a mapping may grow into what has been listed already."""
    with Churner(random.randrange(1, 1 << 30), pause_us=0) as churner:
        deadline = time.monotonic() + LISTING_SECONDS
        while time.monotonic() < deadline:
            for before, mapping in itertools.pairwise(read_mappings(churner.pid)):
                assert before.end <= mapping.start, f"{before} and {mapping} overlap"

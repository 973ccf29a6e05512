"""Buffers of this process, which threads store to and discard from as fast as they can: a copy of the reports is the memory."""

from __future__ import annotations

import random

import pytest

from scribblers import KINDS, Scribbling
from shadows import no_swap
from uffd_here import needs_uffd

pytestmark = [needs_uffd, pytest.mark.skipif(not no_swap(), reason="what is swapped out would be taken for not there")]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_of_a_buffer(kind: str) -> None:
    scribbling = Scribbling([kind], random.randrange(1, 1 << 30))
    scribbling.run(1.5, between_stops=0.2)
    print(scribbling)
    assert scribbling.reports > (50 if kind == "hugetlb" else 1000)
    assert scribbling.stops >= 2


def test_nothing_is_lost_of_many_buffers_at_once() -> None:
    scribbling = Scribbling([kind for kind in KINDS if kind != "hugetlb"], random.randrange(1, 1 << 30))
    scribbling.run(3.0, between_stops=0.3)
    print(scribbling)
    assert scribbling.reports > 1000

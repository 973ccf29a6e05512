"""D(t) against sets of pages, and the prediction against the definition of pre-copy."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dirtylog import DirtyBitmap, InvalidArgumentError, MemorySlot
from dirtylog.observe.footprint import Curve, Footprint
from dirtylog.observe.precopy import predict

PAGE = 4096
SIZES = (300, 70, 9000)


def slots(page_sizes: tuple[int, ...] = (PAGE, PAGE, PAGE)) -> list[MemorySlot]:
    return [
        MemorySlot(number, number << 20, npages, size) for number, (npages, size) in enumerate(zip(SIZES, page_sizes, strict=True))
    ]


def written(rounds: list[list[set[int]]], memory: list[MemorySlot], first: int, count: int) -> int:
    return sum(
        slot.page_size * len(set().union(*(found[number] for found in rounds[first : first + count])))
        for number, slot in enumerate(memory)
    )


pages_of_a_round = st.tuples(*(st.sets(st.integers(0, npages - 1), max_size=12) for npages in SIZES)).map(list)


@given(st.lists(pages_of_a_round, min_size=1, max_size=21), st.sampled_from([(PAGE, PAGE, PAGE), (PAGE, 2 << 20, 16384)]))
def test_every_window_has_as_many_pages_as_their_union(rounds: list[list[set[int]]], sizes: tuple[int, ...]) -> None:
    memory, footprint = slots(sizes), Footprint()
    for found in rounds:
        footprint.add(0.5, {slot: DirtyBitmap.from_pages(slot.npages, pages) for slot, pages in zip(memory, found, strict=True)})
    curve = footprint.curve()
    scales = [1 << scale for scale in range(len(rounds).bit_length())]
    means: list[float] = []
    errors: list[float] = []
    for length in scales:
        of_windows = [written(rounds, memory, first, length) for first in range(0, len(rounds) - length + 1, length)]
        means.append(statistics.mean(of_windows))
        errors.append(statistics.stdev(of_windows) / math.sqrt(len(of_windows)) if len(of_windows) > 1 else math.nan)
    if scales[-1] != len(rounds):
        scales.append(len(rounds))
        means.append(written(rounds, memory, 0, len(rounds)))
        errors.append(math.nan)
    assert curve.seconds.tolist() == [length * 0.5 for length in scales]
    # A mean over fewer windows may come out lower by chance; a longer window never holds less.
    assert curve.nbytes.tolist() == pytest.approx(np.maximum.accumulate(means).tolist())
    assert curve.error.tolist() == pytest.approx(errors, nan_ok=True)
    assert curve.windows.tolist()[: len(rounds).bit_length()] == [
        len(rounds) // length for length in scales[: len(rounds).bit_length()]
    ]
    assert footprint.nbytes == written(rounds, memory, 0, len(rounds))
    assert curve.capacity == sum(slot.nbytes for slot in memory)


def test_a_sparse_terabyte_costs_what_is_dirty() -> None:
    slot, footprint = MemorySlot(0, 0, 1 << 28), Footprint()
    pages = np.arange(0, 1 << 28, 1 << 18)
    for _ in range(3):
        footprint.add(1.0, {slot: DirtyBitmap.from_pages(slot.npages, pages)})
    assert footprint.nbytes == len(pages) * PAGE
    assert footprint._last.nbytes <= 2 * len(pages) * 4 * 4096


def test_no_rounds_give_no_curve() -> None:
    curve = Footprint().curve()
    assert (len(curve.seconds), curve.at(1.0)) == (0, 0.0)
    assert predict(curve, 1000, 100.0, 1.0).converges


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1e9), min_size=2, max_size=12), st.floats(1e-6, 1e6))
def test_a_curve_goes_through_its_points_and_never_falls(values: list[float], seconds: float) -> None:
    points = np.sort(np.array(values))
    # D(t) grows no faster than t.
    times = np.array([0.1 * 2**power for power in range(len(points))])
    for index in range(1, len(points)):
        points[index] = min(points[index], 2 * points[index - 1]) if points[index - 1] else points[index]
    curve = Curve(times, points, np.zeros(len(points)), np.ones(len(points), np.int64), 1 << 62)
    for time, nbytes in zip(times, points, strict=True):
        assert curve.at(float(time)) == pytest.approx(nbytes, rel=1e-9, abs=1e-6)
    assert curve.at(seconds) <= curve.at(seconds * 1.5) + 1e-6


def test_a_curve_stays_within_the_memory() -> None:
    curve = Curve(np.array([1.0, 2.0]), np.array([1000.0, 2000.0]), np.zeros(2), np.ones(2, np.int64), 5000)
    assert curve.at(1e9) == 5000
    assert curve.at(0.5) == pytest.approx(500)
    assert curve.rate(0.5) == pytest.approx(1000)


# --- between the windows


def footprint_of(rounds: list[list[int]], npages: int) -> Footprint:
    slot, footprint = MemorySlot(0, 0, npages), Footprint()
    for pages in rounds:
        footprint.add(0.01, {slot: DirtyBitmap.from_pages(npages, np.array(pages, np.int64))})
    return footprint


def swept(npages: int, a_round: int, count: int) -> list[list[int]]:
    return [[(first * a_round + page) % npages for page in range(a_round)] for first in range(count)]


@pytest.mark.parametrize("npages", [210, 420, 555])
def test_a_sweep_has_its_knee_where_it_ends_and_not_where_a_window_does(npages: int) -> None:
    curve = footprint_of(swept(npages, 10, 1000), npages).curve()
    for rounds in range(1, 600):
        assert curve.at(rounds * 0.01) == pytest.approx(min(rounds * 10, npages) * PAGE, rel=0.01)
    # A power law between the windows alone is a tenth off.
    power = Curve(curve.seconds, curve.nbytes, curve.error, curve.windows, curve.capacity)
    assert any(power.at(rounds * 0.01) < 0.93 * min(rounds * 10, npages) * PAGE for rounds in range(1, 600))


def test_between_the_windows_it_is_the_mean_of_all_windows() -> None:
    generator = np.random.default_rng(1)
    rounds = [np.unique(generator.zipf(1.3, 60) % 997).tolist() for _ in range(400)]
    curve = footprint_of(rounds, 997).curve()
    for length in (3, 5, 7, 11, 23, 45, 90):
        found = [len(set().union(*rounds[first : first + length])) for first in range(len(rounds) - length + 1)]
        assert curve.at(length * 0.01) == pytest.approx(np.mean(found) * PAGE, rel=0.01)


def test_pages_of_several_sizes_count_by_their_bytes_between_the_windows() -> None:
    generator = np.random.default_rng(2)
    small, large, footprint = MemorySlot(0, 0, 997, 4096), MemorySlot(1, 1 << 20, 300, 16384), Footprint()
    rounds = [
        (set((generator.zipf(1.3, 60) % 997).tolist()), {10 * first % 300 + page for page in range(10)}) for first in range(400)
    ]
    for written in rounds:
        footprint.add(
            0.01,
            {slot: DirtyBitmap.from_pages(slot.npages, sorted(pages)) for slot, pages in zip((small, large), written, strict=True)},
        )
    curve = footprint.curve()
    for length in (3, 5, 7, 11, 23, 45, 90):
        found = [
            sum(
                size * len(set().union(*(written[number] for written in rounds[first : first + length])))
                for number, size in enumerate((4096, 16384))
            )
            for first in range(len(rounds) - length + 1)
        ]
        assert curve.at(length * 0.01) == pytest.approx(np.mean(found), rel=0.01)


def test_what_begins_in_one_of_two_phases_lies_between_the_bounds() -> None:
    quiet, busy = [[0, 1, 2, 3]] * 200, swept(4000, 40, 200)
    curve = footprint_of([*quiet, *busy, *quiet, *busy], 4000).curve()
    low, high = curve.bounds()
    assert low.at(0.32) == pytest.approx(4 * PAGE, rel=0.01)
    assert high.at(0.32) == pytest.approx(32 * 40 * PAGE, rel=0.01)
    assert low.at(0.32) < curve.at(0.32) < high.at(0.32)
    memory, wire = 4000 * PAGE, 4e7
    seconds = [predict(of, memory, wire, 0.01).seconds for of in (low, curve, high)]
    assert seconds == sorted(seconds)
    assert seconds[2] > 1.5 * seconds[0]


def test_a_curve_of_means_alone_has_no_other_bounds() -> None:
    curve = Curve(np.array([1.0, 2.0]), np.array([10.0, 20.0]), np.zeros(2), np.ones(2, np.int64), 100)
    assert curve.bounds() == (curve, curve)


# --- the prediction


def straight(rate: float, capacity: float) -> Curve:
    """A sweep: D(t) = rate * t up to the whole memory."""
    times = np.array([2.0**power for power in range(-8, 8)])
    return Curve(times, np.minimum(times * rate, capacity), np.zeros(16), np.ones(16, np.int64), int(capacity))


def test_a_sweep_slower_than_the_wire_converges_in_a_geometric_series() -> None:
    memory, wire, rate = 1 << 30, 1e9, 2.5e8
    found = predict(straight(rate, memory), memory, wire, 0.01)
    # Each round is a quarter of the one before; the rest fits the limit after the first quarter below it.
    lengths = [memory / wire]
    while lengths[-1] > 0.01:
        lengths.append(lengths[-1] / 4)
    assert found.converges
    assert found.rounds == len(lengths) - 1
    assert found.seconds == pytest.approx(sum(lengths), rel=0.01)
    assert found.nbytes == pytest.approx(wire * sum(lengths), rel=0.01)
    assert found.downtime == pytest.approx(lengths[-1], rel=0.01)
    assert found.smallest_downtime <= found.downtime


def test_a_hot_set_that_is_written_faster_than_sent_does_not_converge_below_its_size() -> None:
    hot, wire = 200e6, 1e9
    curve = Curve(np.array([0.01, 0.1, 1.0]), np.array([hot, hot, hot]), np.zeros(3), np.ones(3, np.int64), 1 << 30)
    found = predict(curve, 1 << 30, wire, 0.1)
    assert not found.converges
    assert found.smallest_downtime == pytest.approx(hot / wire)
    assert (found.nbytes, found.seconds) == (math.inf, math.inf)
    assert predict(curve, 1 << 30, wire, found.smallest_downtime * 1.0001).converges


@given(st.floats(1e6, 1e10), st.floats(1e6, 1e10), st.floats(1e-4, 10))
def test_the_smallest_downtime_is_where_it_begins_to_converge(rate: float, wire: float, limit: float) -> None:
    curve = straight(rate, 1 << 30)
    found = predict(curve, 1 << 30, wire, limit)
    assert predict(curve, 1 << 30, wire, found.smallest_downtime + 1e-9).converges
    assert found.converges or found.smallest_downtime > limit
    if found.converges:
        assert found.downtime <= limit


def test_more_bandwidth_never_takes_longer() -> None:
    curve = straight(3e8, 1 << 30)
    times = [predict(curve, 1 << 30, wire, 0.3).seconds for wire in np.geomspace(1e8, 1e11, 40)]
    assert all(later <= sooner for sooner, later in pairwise(times) if math.isfinite(sooner))
    assert math.isinf(times[0])
    assert math.isfinite(times[-1])


@pytest.mark.parametrize(("bandwidth", "downtime"), [(0.0, 1.0), (-1.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.nan)])
def test_a_bandwidth_and_a_downtime_are_above_0(bandwidth: float, downtime: float) -> None:
    with pytest.raises(InvalidArgumentError, match="above 0"):
        predict(straight(1.0, 10.0), 10, bandwidth, downtime)

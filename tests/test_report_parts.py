"""What a report is made of: the axis, the columns of the page, cells, the hottest stretches."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dirtylog import MemorySlot
from dirtylog.recording.reader import RUN
from dirtylog.report.axis import Axis, Writes, lay_out, united
from dirtylog.report.bins import cells
from dirtylog.report.hottest import hottest
from dirtylog.report.payload import coarsen, columns_of, varints

if TYPE_CHECKING:
    from collections.abc import Iterable


def pages_of(writes: Writes) -> set[tuple[int, int]]:
    """Return (round, page) of every page written."""
    rows = zip(writes.rounds.tolist(), writes.first.tolist(), writes.end.tolist(), strict=True)
    return {(number, page) for number, first, end in rows for page in range(first, end)}


def runs(rows: Iterable[tuple[int, int, int, int]]) -> np.ndarray[Any, Any]:
    return np.array(sorted(rows), RUN)


def writes_of(rows: Iterable[tuple[int, int, int]]) -> Writes:
    table = np.array(list(rows), np.int64).reshape(-1, 3)
    return united(table[:, 0], table[:, 1], table[:, 2])


# --- the axis


@pytest.mark.parametrize("seed", range(20))
def test_the_axis_has_just_what_was_written(seed: int) -> None:
    random = np.random.default_rng(seed)
    names = ("[heap]", "", "/bin/a", "/bin/b")
    slots = [
        MemorySlot(
            number,
            int(random.integers(0, 40)) * 512,
            int(random.integers(1, 1500)) if (small := bool(random.integers(0, 4))) else 3,
            4096 if small else 1 << 21,
            name=str(random.choice(names)),
            permissions="rw-p",
        )
        for number in range(12)
    ]
    slots = [
        slot if slot.page_size == 4096 else MemorySlot(slot.id, slot.base_gfn // 512, 3, 1 << 21, name="huge", permissions="rw-p")
        for slot in slots
    ]
    rows = []
    for _ in range(60):
        number = int(random.integers(0, 12))
        first = int(random.integers(0, slots[number].npages))
        rows.append((int(random.integers(0, 5)), number, first, int(random.integers(1, slots[number].npages - first + 1))))
    axis = lay_out(slots, runs(rows))
    unit = min(slots[number].page_size for _, number, _, _ in rows)
    assert axis.page_size == unit
    expected = set()
    for row, number, first, npages in rows:
        slot = slots[number]
        start = (slot.base_gfn + first) * slot.page_size
        expected |= {(row, slot.name, start + step) for step in range(0, npages * slot.page_size, unit)}
    assert {(row, axis.region_of(page).name, axis.address_of(page)) for row, page in pages_of(axis.writes)} == expected
    assert axis.npages >= int(axis.writes.end.max())
    places = [(region.start, region.start + region.npages) for region in axis.regions]
    assert [start for start, _ in places] == [0, *(end for _, end in places[:-1])]


def test_a_long_gap_that_was_never_written_is_left_out_and_a_short_one_is_not() -> None:
    slot = MemorySlot(0, 0x1000, 100_000, name="[heap]", permissions="rw-p")
    axis = lay_out([slot], runs([(0, 0, 0, 50), (0, 0, 60, 40), (1, 0, 90_000, 100)]))
    assert [(region.address, region.npages) for region in axis.regions] == [(0x1000000, 100), ((0x1000 + 90_000) * 4096, 100)]
    assert pages_of(axis.writes) == {(0, page) for page in (*range(50), *range(60, 100))} | {(1, page) for page in range(100, 200)}


def test_scattered_writes_do_not_make_regions_without_end() -> None:
    slot = MemorySlot(0, 0, 1 << 28)
    axis = lay_out([slot], runs((0, 0, page << 14, 1) for page in range(5000)))
    assert len(axis.regions) == 33


def test_pieces_of_a_heap_that_grew_are_one_region_and_a_guests_slots_are_not() -> None:
    grown = [MemorySlot(number, 100 + number * 10, 10, name="[heap]", permissions="rw-p") for number in range(3)]
    assert [
        (region.label, region.npages) for region in lay_out(grown, runs((0, number, 0, 10) for number in range(3))).regions
    ] == [("[heap]", 30)]
    guest = [MemorySlot(number, 100 + number * 10, 10) for number in range(3)]
    axis = lay_out(guest, runs((0, number, 0, 10) for number in range(3)))
    assert [region.label for region in axis.regions] == ["slot 0", "slot 1", "slot 2"]


def test_nothing_written_is_an_axis_of_no_length() -> None:
    axis = lay_out([MemorySlot(0, 0, 64)], runs([]))
    assert (axis.npages, axis.regions, len(axis.writes.first)) == (0, (), 0)
    assert hottest(axis, 3) == []


# --- what goes into the page


def decoded(data: bytes) -> list[int]:
    values, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            values.append(value)
            value, shift = 0, 0
    return values


def test_varints_are_what_they_say() -> None:
    numbers = [0, 1, 127, 128, 129, 16383, 16384, (1 << 32) - 1, 1 << 32, (1 << 53) - 1, 5]
    assert decoded(varints(np.array(numbers))) == numbers
    assert varints(np.array([300])) == bytes([0xAC, 0x02])
    assert varints(np.empty(0, np.int64)) == b""


def test_columns_tell_every_run() -> None:
    writes = writes_of([(0, 5, 9), (0, 12, 13), (3, 0, 2), (3, 70_000, 70_001)])
    columns = {name: values.tolist() for name, values in columns_of(writes, 5).items()}
    assert columns == {"run_counts": [2, 0, 0, 2, 0], "run_gaps": [5, 3, 0, 69_998], "run_lengths": [3, 0, 1, 0]}


@pytest.mark.parametrize("rounds", [3, 2000])
def test_a_coarser_recording_has_all_that_was_written(rounds: int) -> None:
    random = np.random.default_rng(rounds)
    rows = random.integers(0, rounds, 4000)
    first = random.integers(0, 100_000, 4000)
    writes = united(rows, first, first + random.integers(1, 4, 4000))
    coarse = coarsen(writes, rounds, 1000)
    assert len(coarse.writes.first) <= 1000
    # Rounds that no picture shows apart go first.
    assert coarse.rounds > 1 if rounds == 2000 else coarse.pages > coarse.rounds
    merged = {(row >> coarse.rounds, page >> coarse.pages) for row, page in pages_of(writes)}
    assert {(row, page >> coarse.pages) for row, page in pages_of(coarse.writes)} == merged
    assert coarsen(writes, rounds, len(writes.first)) == (writes, 0, 0)


def test_cells_are_shares_of_pages_and_rounds() -> None:
    random = np.random.default_rng(3)
    dense = random.random((23, 101)) < 0.3
    dense[4] = True
    writes = writes_of((row, page, page + 1) for row, page in zip(*(axis.tolist() for axis in np.nonzero(dense)), strict=True))
    found = cells(writes, 101, 23, rows=9, columns=5)
    assert found.pages.tolist() == [0, 12, 24, 36, 48, 60, 72, 84, 96, 101]
    assert found.rounds.tolist() == [0, 5, 10, 15, 20, 23]
    for row in range(9):
        for column in range(5):
            part = dense[found.rounds[column] : found.rounds[column + 1], found.pages[row] : found.pages[row + 1]]
            assert found.shares[row, column] == pytest.approx(part.mean())


def axis_of(npages: int, rows: Iterable[tuple[int, int, int]]) -> Axis:
    return lay_out([MemorySlot(0, 0, npages)], runs((row, 0, first, end - first) for row, first, end in rows))


def test_the_hottest_stretch_is_the_one_of_the_most_rounds() -> None:
    rows = [(row, 10, 20) for row in range(100)] + [(row, 500, 900) for row in range(30)] + [(row, 90, 91) for row in range(60)]
    found = hottest(axis_of(1000, rows), 100)
    assert [(one.first, one.npages, one.writes, one.heat) for one in found] == [
        (10, 10, 1000, 1),
        (90, 1, 60, 0),
        (500, 400, 12_000, -1),
    ]


def test_pages_that_are_a_little_cooler_do_not_part_a_stretch_and_those_that_are_cold_do() -> None:
    # 51, 49, 51, ... of 100 rounds: on both sides of a half.
    rows = [(row, page, page + 1) for page in range(40) for row in range(51 if page % 2 else 49)]
    rows += [(row, page, page + 1) for page in range(40, 50) for row in range(3)]
    found = hottest(axis_of(100, rows), 100)
    assert [(one.first, one.npages, one.writes) for one in found] == [(0, 40, 2000), (40, 10, 30)]


@pytest.mark.parametrize("seed", range(5))
def test_stretches_have_every_write_once(seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = [(int(row), int(first), int(first + length)) for row, first, length in random.integers((0, 0, 1), (9, 300, 30), (80, 3))]
    axis = axis_of(400, rows)
    counts = Counter(page for _, page in pages_of(axis.writes))
    found = hottest(axis, 9, limit=10_000)
    seen = [page for one in found for page in range(one.first, one.first + one.npages)]
    assert sorted(seen) == sorted(counts)
    for one in found:
        pages = range(one.first, one.first + one.npages)
        assert one.writes == sum(counts[page] for page in pages)
        assert one.heat == np.frexp(max(counts[page] for page in pages) / 9)[1]

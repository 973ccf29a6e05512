"""What the live view knows and how it is laid out: heat that cools, zoomed ranges, sorting, slots that go, history and marks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirtylog import DirtyBitmap, MemorySlot
from dirtylog.memslot import SlotFlags
from dirtylog.observe.rounds import Round
from dirtylog.top.draw import Choices, Facts, Layout, screen
from dirtylog.top.heat import CELLS, Heat, levels, stretches
from dirtylog.top.history import History
from dirtylog.top.model import Area, Model, View, divided
from dirtylog.top.table import Sort, sorted_rows
from dirtylog.top.text import Colours, Terminal

PAGE = 4096
FACTS = Facts("emu:x86", "port x86", "running 1.0 s", "", ("what the port cannot see",))
PLAIN = Terminal(80, 24, unicode=False, colours=Colours.NONE)


def slot_of(npages: int, number: int = 0, base: int | None = None, name: str = "") -> MemorySlot:
    return MemorySlot(number, (1 << 20) * number if base is None else base, npages, name=name, permissions="rw-p" if name else "")


def round_of(dirty: dict[MemorySlot, list[int]], seconds: float = 1.0, get_seconds: float = 0.0) -> Round:
    return Round(1, seconds, get_seconds, {slot: DirtyBitmap.from_pages(slot.npages, pages) for slot, pages in dirty.items()}, 0.0)


def model_of(*rounds: dict[MemorySlot, list[int]]) -> Model:
    """Return a model that was told of rounds of a second each, of slots that are there in all of them."""
    model = Model(0.0)
    slots = list(dict.fromkeys(slot for found in rounds for slot in found))
    for number, found in enumerate(rounds, start=1):
        model.add(round_of(found), slots, float(number))
    return model


def view_of(model: Model, now: float, cells: int = 400, area: Area | None = None) -> View:
    return model.view(now, cells, 64, area)


def text_of(view: View, choices: Choices | None = None, terminal: Terminal = PLAIN, facts: Facts = FACTS) -> list[str]:
    return ["".join(text for text, _ in line) for line in screen(view, facts, choices or Choices(), terminal)]


# --- heat


def test_heat_is_the_share_written_and_halves() -> None:
    heat = Heat(0, 8 * CELLS)
    heat.add(DirtyBitmap.from_pages(8 * CELLS, [0, 1, 8, *range(16, 24)]), 10.0, 2.0)
    assert heat.at(10.0, 2.0)[:4].tolist() == [0.25, 0.125, 1.0, 0.0]
    assert heat.at(12.0, 2.0)[:4].tolist() == [0.125, 0.0625, 0.5, 0.0]
    heat.add(DirtyBitmap.from_pages(8 * CELLS, [0]), 14.0, 2.0)
    assert heat.at(14.0, 2.0)[:3].tolist() == [0.125, 0.03125, 0.25]


@given(
    st.integers(1, 1 << 31).flatmap(
        lambda npages: st.tuples(st.just(npages), st.lists(st.integers(0, min(npages, (1 << 31) - 1) - 1), min_size=1, max_size=20))
    )
)
def test_the_cell_of_a_page_that_was_written_is_hot_and_no_other_is(scene: tuple[int, list[int]]) -> None:
    npages, pages = min(scene[0], (1 << 31) - 1), scene[1]
    heat = Heat(0, npages)
    assert len(heat.sizes) <= CELLS
    assert heat.sizes.sum() == npages
    heat.add(DirtyBitmap.from_pages(npages, pages), 1.0, 2.0)
    hot = heat.at(1.0, 2.0)
    assert set(np.flatnonzero(hot).tolist()) == {page // heat.pages_per_cell for page in pages}
    assert hot.max() <= 1
    for count in (1, 7, 300):
        shown, first = stretches(hot, heat.sizes, min(count, npages))
        ends = [*(first[1:] * heat.pages_per_cell).tolist(), npages]
        level = levels(shown, np.maximum(np.array(ends) - first * heat.pages_per_cell, 1).astype(float))
        for page in pages:
            assert level[np.searchsorted(first, page // heat.pages_per_cell, "right") - 1] > 0


@given(st.data())
def test_a_part_of_the_heat_agrees_with_the_whole(data: st.DataObject) -> None:
    npages = data.draw(st.integers(1, 1 << 22))
    whole = Heat(0, npages)
    ncells = len(whole.sizes)
    start = data.draw(st.integers(0, ncells - 1))
    first = start * whole.pages_per_cell
    length = min(data.draw(st.integers(1, ncells - start)) * whole.pages_per_cell, npages - first)
    before, after = (data.draw(st.lists(st.integers(0, npages - 1), max_size=20)) for _ in range(2))
    whole.add(DirtyBitmap.from_pages(npages, before), 1.0, 2.0)
    part = whole.part(first, length)
    for cell in np.flatnonzero(part.at(1.0, 2.0)).tolist():
        holder = (first + cell * part.pages_per_cell) // whole.pages_per_cell
        assert any(page // whole.pages_per_cell == holder for page in before)
    fresh = Heat(first, length)
    fresh.add(DirtyBitmap.from_pages(npages, after), 2.0, 2.0)
    within = {(page - first) // fresh.pages_per_cell for page in after if first <= page < first + length}
    assert set(np.flatnonzero(fresh.at(2.0, 2.0)).tolist()) == within


def test_each_level_is_half_as_hot_as_the_next_and_a_trace_stays() -> None:
    heat = np.array([0.0, 1.0, 0.5, 0.49, 0.25, 1 / 256, 1 / 1000, 1 / 20000])
    assert levels(heat, np.full(len(heat), 1000.0)).tolist() == [0, 9, 9, 8, 8, 2, 1, 0]
    assert levels(np.array([1 / 32]), np.array([1.0])).tolist() == [0], "five half-lives after the only page was written"


# --- the map


def test_the_map_cools_to_nothing() -> None:
    slot = slot_of(4)
    model = model_of({slot: [2]})
    assert view_of(model, 1.0).map.level.tolist() == [0, 0, 9, 0]
    assert view_of(model, 3.5).map.level.tolist() == [0, 0, 8, 0]
    assert view_of(model, 30.0).map.level.tolist() == [0, 0, 0, 0]


def test_the_half_life_can_be_changed() -> None:
    model = model_of({slot_of(4): [2]})
    model.half_life = 16.0
    assert view_of(model, 3.5).map.level.tolist() == [0, 0, 9, 0]


def test_the_map_has_the_slots_that_were_written_in_order_of_address() -> None:
    low, high, clean = slot_of(4, 1), slot_of(2, 2), slot_of(1000, 3)
    shown = view_of(model_of({high: [0], low: [3], clean: []}), 1.0).map
    assert shown.slots == (low, high)
    assert shown.level.tolist() == [0, 0, 0, 9, 9, 0]
    assert shown.owner.tolist() == [0, 0, 0, 0, 1, 1]
    assert [shown.address(stretch) for stretch in range(6)] == [
        *((low.base_gfn + page) * PAGE for page in range(4)),
        *((high.base_gfn + page) * PAGE for page in range(2)),
    ]


def test_a_small_slot_beside_a_huge_one_has_a_cell_and_is_seen() -> None:
    huge, small = slot_of((1 << 31) - 1, 0, 0), slot_of(1, 1, 1 << 40)
    shown = view_of(model_of({huge: [1 << 30], small: [0]}), 1.0).map
    assert shown.slots == (huge, small)
    assert shown.level[-1] == 9
    assert np.count_nonzero(shown.level[:-1]) == 1
    assert len(shown.level) <= 400


def test_where_slots_have_no_room_the_last_written_are_shown() -> None:
    slots = [slot_of(1, number) for number in range(30)]
    model = model_of({slot: [0] for slot in slots}, {slots[7]: [0], slots[3]: [0]})
    shown = view_of(model, 2.0, cells=2).map
    assert shown.slots == (slots[3], slots[7])
    assert shown.hidden == 28


@given(st.lists(st.tuples(st.integers(1, 1 << 44), st.integers(1, 4096)), min_size=1, max_size=300), st.integers(300, 2000))
def test_every_slot_has_a_cell_and_no_more_are_given_than_there_are(slots: list[tuple[int, int]], cells: int) -> None:
    counts = divided([size for size, _ in slots], cells, [limit for _, limit in slots])
    assert sum(counts) <= cells
    assert all(1 <= count <= limit for count, (_, limit) in zip(counts, slots, strict=True))


def test_zooming_shows_a_range_in_finer_cells_that_are_kept_up_to_date() -> None:
    slot = slot_of(64 * CELLS)
    model = model_of({slot: [64, 65]})
    area = Area(slot, 64, 64)
    first = view_of(model, 1.0, area=area).map
    assert len(first.level) == 64
    assert set(first.level.tolist()) == {levels(np.array([2 / 64]), np.ones(1))[0]}, "as hot as the cell that held them"
    model.add(round_of({slot: [64, 127, 128, 63]}), [slot], 30.0)
    later = view_of(model, 30.0, area=area).map
    assert np.flatnonzero(later.level).tolist() == [0, 63]
    assert later.address(63) == 127 * PAGE


def test_the_whole_slot_zoomed_is_that_slot_only() -> None:
    slot, other = slot_of(8, 1), slot_of(8, 2)
    model = model_of({slot: [1], other: [2]})
    assert view_of(model, 1.0, area=Area(other, 0, 8)).map.level.tolist() == [0, 0, 9, 0, 0, 0, 0, 0]
    clean = model_of({slot: []})
    assert view_of(clean, 1.0, area=Area(slot, 0, 8)).map.level.tolist() == [0] * 8


# --- slots


def test_a_slot_that_goes_leaves_the_totals() -> None:
    stays, goes = slot_of(4, 1), slot_of(4, 2)
    model = Model(0.0)
    model.add(round_of({stays: [0], goes: [0, 1]}), [stays, goes], 1.0)
    model.add(round_of({stays: [0]}), [stays], 2.0)
    view = view_of(model, 2.0)
    assert [row.slot for row in view.rows] == [stays]
    assert view.map.slots == (stays,)
    assert (view.total, view.distinct, view.distinct_bytes) == (4, 3, 3 * PAGE)
    assert not model.has(goes)


def test_totals() -> None:
    slot = slot_of(100)
    model = Model(5.0)
    model.add(round_of({slot: [0, 1, 2]}, 0.5, 0.25), [slot], 5.5)
    model.add(round_of({slot: [2, 3]}, 0.5, 0.0), [slot], 6.0)
    view = view_of(model, 7.0)
    assert (view.seconds, view.logged, view.rounds) == (2.0, 1.0, 2)
    assert (view.total, view.distinct) == (5, 4)
    assert (view.rate, view.mean) == (4 * PAGE, 5 * PAGE)
    assert view.get_share == 0.25
    (row,) = view.rows
    assert (row.total, row.distinct, row.dirty, row.quiet) == (5, 4, 0.02, 1.0)


def test_the_rate_of_a_slot_is_smoothed_and_falls() -> None:
    slot = slot_of(100)
    view = view_of(model_of({slot: list(range(100))}, {slot: []}), 2.0)
    assert (view.rate, view.rows[0].rate, view.rows[0].pages) == (0.0, 50 * PAGE, 50.0)


def test_distinct_pages_are_right_whatever_lies_dense() -> None:
    slot = slot_of(100_000)
    model, seen = Model(0.0), set[int]()
    chance = np.random.default_rng(1)
    for number in range(1, 30):
        pages = chance.integers(0, 100_000, 500 * number).tolist()
        seen |= set(pages)
        model.add(round_of({slot: pages}), [slot], float(number))
        assert view_of(model, float(number)).distinct == len(seen)


def test_sorting() -> None:
    first, second, third = slot_of(10, 1), slot_of(30, 2), slot_of(20, 3)
    rows = view_of(model_of({first: [0], second: [], third: [0]}, {first: [1], second: [], third: [0, 1, 2]}), 2.0).rows
    order = {sort: [row.slot for row in sorted_rows(rows, sort)] for sort in Sort}
    assert order == {
        Sort.RATE: [third, first, second],
        Sort.ADDRESS: [first, second, third],
        Sort.SIZE: [second, third, first],
        Sort.TOTAL: [third, first, second],
    }
    assert [Sort.RATE.next(), Sort.TOTAL.next()] == [Sort.ADDRESS, Sort.RATE]


# --- history


def test_the_curve_has_a_round_a_column_or_all_of_them() -> None:
    history = History()
    for number in range(10):
        history.add(number, 0.5)
    recent = history.curve(4, whole=False)
    assert (recent.rates.tolist(), recent.seconds) == ([12, 14, 16, 18], 2.0)
    whole = history.curve(5, whole=True)
    assert (whole.rates.tolist(), whole.seconds) == ([1, 5, 9, 13, 17], 5.0)
    assert History().curve(5, whole=False).rates.tolist() == []


def test_marks_stand_where_they_were_made() -> None:
    history = History()
    history.add(1, 1.0)
    first = history.mark(1.5)
    history.add(1, 1.0)
    history.add(1, 1.0)
    second = history.mark(3.5)
    assert history.curve(9, whole=False).marks == ((1, first), (2, second))
    assert history.curve(1, whole=False).marks == ((0, second),)
    assert history.curve(2, whole=True).marks == ((1, first), (1, second))
    assert (first.number, second.number, second.seconds) == (1, 2, 3.5)


# --- the screen


@pytest.mark.parametrize(("width", "height"), [(80, 24), (72, 18), (200, 60), (71, 30), (20, 3), (1, 1)])
@pytest.mark.parametrize("help_shown", [False, True])
def test_the_screen_is_as_large_as_the_terminal(width: int, height: int, help_shown: bool) -> None:
    for text in (False, True):
        for colours in Colours:
            terminal = Terminal(width, height, unicode=text, colours=colours)
            slots = {slot_of(20, number, name=f"/a/long/name/of/a/file.{number}"): [number] for number in range(20)}
            model = model_of(*[slots] * 100)
            for _ in range(12):
                model.mark(50.0)
            layout = Layout.of(terminal)
            for area in (None, Area(next(iter(slots)), 0, 20)):
                view = model.view(100.0, max(1, layout.map * layout.columns), max(1, layout.columns), area)
                lines = text_of(view, Choices(selected=next(iter(slots)), help=help_shown, notice="n" * 300), terminal)
                assert [len(line) for line in lines] == [width] * height
                assert text or all(line.isascii() for line in lines)


def test_the_screen_shows_the_hot_pages_the_slots_the_rate_and_the_marks() -> None:
    slot, rom = slot_of(1000), MemorySlot(1, 1 << 20, 1, flags=SlotFlags.READONLY)
    model = model_of({slot: list(range(500, 510)), rom: []}, {slot: list(range(500, 510)), rom: []})
    model.mark(2.0)
    layout = Layout.of(PLAIN)
    view = model.view(2.0, layout.map * layout.columns, layout.columns)
    lines = text_of(view, Choices(selected=slot))
    marked = {number: line for number, line in enumerate(lines[5 : 5 + layout.map]) if "@" in line or "%" in line}
    row = 500 * layout.map // 1000
    assert list(marked) == [row]
    assert lines[0].startswith(" dirtylog top  emu:x86")
    assert any(line.startswith("> 0x0 memory") and " 20 " in line for line in lines)
    assert any(line.startswith("  0x100000000 read-only") and line.endswith("never") for line in lines)
    assert sum("|" in line for line in lines) == layout.curve
    assert any(line.rstrip().endswith("1") and "the last" in line for line in lines)


def test_a_gap_in_the_coverage_is_told_in_words() -> None:
    lines = text_of(
        view_of(Model(0.0), 1.0), facts=Facts("pid:1", "port", "running", "WRITES MAY HAVE BEEN MISSED: for a reason", ())
    )
    assert any("WRITES MAY HAVE BEEN MISSED: for a reason" in line for line in lines)
    assert not any("coverage complete" in line for line in lines)


def test_the_selected_slot_is_among_the_rows_that_are_shown() -> None:
    slots = [slot_of(4, number) for number in range(50)]
    model = model_of({slot: [0] for slot in slots})
    for selected in (slots[0], slots[25], slots[49]):
        lines = text_of(view_of(model, 1.0), Choices(sort=Sort.ADDRESS, selected=selected))
        assert sum(line.startswith(f"> {selected.base_gfn * PAGE:#x} ") for line in lines) == 1
        assert any(" of 50" in line for line in lines)


def test_of_a_zoomed_slot_the_chosen_row_is_marked() -> None:
    slot = slot_of(1000)
    layout = Layout.of(PLAIN)
    view = view_of(model_of({slot: [0]}), 1.0, layout.map * layout.columns, Area(slot, 0, 1000))
    lines = text_of(view, Choices(selected=slot, row=2))
    assert [number for number, line in enumerate(lines) if line[15:16] == ">"] == [5 + 2]


def test_names_from_outside_cannot_draw_on_the_screen() -> None:
    slot = slot_of(4, 1, name="/srv/\x1b[31m\nx\u200b\U0001f600")
    lines = text_of(view_of(model_of({slot: [0]}), 1.0), terminal=Terminal(80, 24, unicode=True, colours=Colours.MANY))
    assert all(line.isprintable() for line in lines)
    assert any("?[31m?x??" in line for line in lines)

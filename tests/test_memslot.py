from __future__ import annotations

import errno
import itertools
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from dirtylog.errors import BadSlotError, InvalidArgumentError, LoggingOffError
from dirtylog.memslot import KVM_USER_MEM_SLOTS, MAX_GFN, MEM_MAX_NR_PAGES, MemorySlot, SlotFlags, SlotTable
from dirtylog.slotbitmap import SlotBitmap

if TYPE_CHECKING:
    from collections.abc import Callable


def slot_id(address_space: int, number: int) -> int:
    return address_space << 16 | number


@pytest.fixture
def table() -> SlotTable:
    """Two address spaces: slots 0 (gfn 0 to 99) and 1 (200 to 299) in the first, 0 (0 to 99) in the second."""
    table = SlotTable(address_spaces=2)
    table.add(MemorySlot(0, 0, 100))
    table.add(MemorySlot(1, 200, 100))
    table.add(MemorySlot(slot_id(1, 0), 0, 100))
    return table


def content(table: SlotTable) -> list[tuple[int, int, int]]:
    return [(slot.id, slot.base_gfn, slot.npages) for slot in table]


UNCHANGED = [(0, 0, 100), (1, 200, 100), (0x1_0000, 0, 100)]


# --- one slot


def test_kvms_limits() -> None:
    assert KVM_USER_MEM_SLOTS == 32764
    assert MEM_MAX_NR_PAGES == 2147483647


def test_flags_have_kvms_values() -> None:
    assert {flag.name: flag.value for flag in SlotFlags} == {"LOG_DIRTY_PAGES": 1, "READONLY": 2}
    assert SlotFlags.NONE.value == 0


def test_an_id_is_an_address_space_and_a_number() -> None:
    assert MemorySlot(slot_id(1, 5), 0, 1).address_space == 1
    assert MemorySlot(5, 0, 1).address_space == 0


def test_what_a_slot_says_of_itself() -> None:
    slot = MemorySlot(3, 0x100, 0x40, page_size=16384, flags=SlotFlags.READONLY)

    assert slot.end_gfn == 0x140
    assert slot.nbytes == 0x40 * 16384
    assert slot.readonly
    assert not MemorySlot(3, 0x100, 0x40).readonly
    assert slot.dirty_bitmap is None


def test_slots_are_told_apart_by_identity() -> None:
    first, second = MemorySlot(0, 0, 1), MemorySlot(0, 0, 1)

    assert first != second
    assert len({first, second}) == 2


def test_numpy_integers_become_pythons() -> None:
    slot = MemorySlot(np.uint8(200), np.uint8(200), np.uint8(200), np.uint16(4096))  # type: ignore[arg-type]  # as callers have them

    assert (slot.end_gfn, slot.nbytes) == (400, 200 * 4096)
    assert pickle.loads(pickle.dumps(slot)).end_gfn == 400  # noqa: S301 - our own


@pytest.mark.parametrize("npages", [1, 63, MEM_MAX_NR_PAGES])
def test_a_slot_may_have_1_to_2_to_the_31_minus_1_pages(npages: int) -> None:
    assert MemorySlot(0, 0, npages).npages == npages


@pytest.mark.parametrize("npages", [0, -1, 1 << 31, 1 << 64])
def test_a_slot_may_not_have_any_other_number_of_pages(npages: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"slot of {npages} pages") as caught:
        MemorySlot(7, 0, npages)
    assert (caught.value.errno, caught.value.slot) == (errno.EINVAL, 7)


def test_a_slot_may_end_at_the_last_gfn() -> None:
    assert MemorySlot(0, MAX_GFN - 10, 10).end_gfn == MAX_GFN


@pytest.mark.parametrize("base_gfn", [-1, MAX_GFN - 9, MAX_GFN, 1 << 64])
def test_a_slot_may_not_leave_the_gfn_range(base_gfn: int) -> None:
    with pytest.raises(InvalidArgumentError, match="do not lie between gfn") as caught:
        MemorySlot(7, base_gfn, 10)
    assert (caught.value.errno, caught.value.slot) == (errno.EINVAL, 7)


@pytest.mark.parametrize("page_size", [1, 512, 4096, 65536, 1 << 30])
def test_a_page_size_is_a_power_of_two(page_size: int) -> None:
    assert MemorySlot(0, 0, 1, page_size).page_size == page_size


@pytest.mark.parametrize("page_size", [0, -1, -4096, 3, 4095, 4097, 6144])
def test_no_other_page_size_will_do(page_size: int) -> None:
    with pytest.raises(InvalidArgumentError, match="power of two") as caught:
        MemorySlot(0, 0, 1, page_size)
    assert caught.value.errno == errno.EINVAL


def test_fractions_are_no_page_numbers() -> None:
    fraction: Any = 1.5

    with pytest.raises(TypeError):
        MemorySlot(0, fraction, 1)
    with pytest.raises(TypeError):
        MemorySlot(0, 0, fraction)


# --- ids


@pytest.mark.parametrize("number", [0, KVM_USER_MEM_SLOTS - 1])
@pytest.mark.parametrize("address_space", [0, 1])
def test_every_id_in_range_has_its_place(address_space: int, number: int) -> None:
    table = SlotTable(address_spaces=2)
    slot = MemorySlot(slot_id(address_space, number), 0, 1)

    table.add(slot)

    assert table[slot.id] is slot


OUT_OF_RANGE = [-1, -(1 << 16), KVM_USER_MEM_SLOTS, 0xFFFF, slot_id(1, KVM_USER_MEM_SLOTS), slot_id(2, 0), 1 << 32]


@pytest.mark.parametrize("bad_id", OUT_OF_RANGE)
def test_an_id_out_of_range_is_einval_whoever_asks(table: SlotTable, bad_id: int) -> None:
    uses: list[Callable[[], object]] = [
        lambda: table[bad_id],
        lambda: table.check_id(bad_id),
        lambda: table.logged(bad_id),
        lambda: table.remove(bad_id),
        lambda: table.check_move(bad_id, 1000),
        lambda: table.add(MemorySlot(bad_id, 1000, 1)),
    ]
    for use in uses:
        with pytest.raises(BadSlotError, match="out of range") as caught:
            use()
        assert (caught.value.errno, caught.value.slot) == (errno.EINVAL, bad_id)
    assert content(table) == UNCHANGED


def test_a_table_has_one_address_space_unless_told() -> None:
    with pytest.raises(BadSlotError, match="address spaces are 0 to 0"):
        SlotTable().add(MemorySlot(slot_id(1, 0), 0, 1))


def test_no_such_slot_is_enoent(table: SlotTable) -> None:
    for use in (table.__getitem__, table.logged, table.remove, lambda absent: table.check_move(absent, 1000)):
        with pytest.raises(LoggingOffError, match="the slots are: 0, 1, 65536") as caught:
            use(2)
        assert (caught.value.errno, caught.value.slot) == (errno.ENOENT, 2)
    assert content(table) == UNCHANGED


def test_an_empty_table_says_so() -> None:
    with pytest.raises(LoggingOffError, match="the slots are: none"):
        SlotTable()[0]


def test_a_slot_that_is_not_logged_is_enoent(table: SlotTable) -> None:
    with pytest.raises(LoggingOffError, match="not being logged") as caught:
        table.logged(1)
    assert (caught.value.errno, caught.value.slot) == (errno.ENOENT, 1)


def test_a_logged_slot_comes_with_its_bitmap(table: SlotTable) -> None:
    bitmap = table[1].dirty_bitmap = SlotBitmap(100)

    assert table.logged(1) == (table[1], bitmap)


# --- places


@pytest.mark.parametrize(("base_gfn", "npages"), [(0, 1), (99, 1), (50, 10), (99, 2), (100, 101), (0, 1000), (299, 5)])
def test_slots_of_one_address_space_may_not_overlap(table: SlotTable, base_gfn: int, npages: int) -> None:
    with pytest.raises(BadSlotError, match="overlaps slot") as caught:
        table.add(MemorySlot(2, base_gfn, npages))
    assert (caught.value.errno, caught.value.slot) == (errno.EEXIST, 2)
    assert content(table) == UNCHANGED


@pytest.mark.parametrize(("base_gfn", "npages"), [(100, 100), (100, 1), (199, 1), (300, 1 << 20)])
def test_slots_may_touch(table: SlotTable, base_gfn: int, npages: int) -> None:
    table.add(MemorySlot(2, base_gfn, npages))

    assert content(table) == [*UNCHANGED, (2, base_gfn, npages)]


def test_slots_of_two_address_spaces_may_overlap(table: SlotTable) -> None:
    table.add(MemorySlot(slot_id(1, 1), 200, 50))

    found = [table.find(220, address_space) for address_space in (0, 1)]
    assert [slot and slot.id for slot in found] == [1, slot_id(1, 1)]


def test_an_id_is_used_once(table: SlotTable) -> None:
    with pytest.raises(BadSlotError, match="exists already") as caught:
        table.add(MemorySlot(1, 1000, 1))
    assert (caught.value.errno, caught.value.slot) == (errno.EEXIST, 1)
    assert content(table) == UNCHANGED


def test_a_slot_is_added_once(table: SlotTable) -> None:
    with pytest.raises(BadSlotError) as caught:
        table.add(table[1])
    assert caught.value.errno == errno.EEXIST
    assert content(table) == UNCHANGED


def test_a_removed_slot_makes_room(table: SlotTable) -> None:
    slot = table[0]

    assert table.remove(0) is slot
    assert len(table) == 2
    assert table.find(50) is None
    table.add(MemorySlot(0, 50, 10))
    assert content(table) == [*UNCHANGED[1:], (0, 50, 10)]


def test_find_gives_the_slot_that_holds_a_gfn(table: SlotTable) -> None:
    def found(gfn: int, address_space: int = 0) -> int | None:
        slot = table.find(gfn, address_space)
        return None if slot is None else slot.id

    assert [found(gfn) for gfn in (-1, 0, 99, 100, 199, 200, 299, 300)] == [None, 0, 0, None, None, 1, 1, None]
    assert [found(gfn, 1) for gfn in (0, 99, 200)] == [0x1_0000, 0x1_0000, None]
    assert found(0, 2) is None


def test_a_reader_keeps_the_table_that_it_began_with(table: SlotTable) -> None:
    slots = iter(table)
    first = next(slots)

    table.remove(1)

    assert [first.id, *(slot.id for slot in slots)] == [0, 1, 0x1_0000]


# --- moves


@pytest.mark.parametrize("base_gfn", [0, 1, 100, 300, MAX_GFN - 100])
def test_a_slot_may_move_to_free_frames_and_to_its_own(table: SlotTable, base_gfn: int) -> None:
    assert table.check_move(0, base_gfn) is table[0]
    assert content(table) == UNCHANGED


@pytest.mark.parametrize("base_gfn", [101, 200, 250, 299])
def test_a_slot_may_not_move_onto_another(table: SlotTable, base_gfn: int) -> None:
    with pytest.raises(BadSlotError, match="overlaps slot 1") as caught:
        table.check_move(0, base_gfn)
    assert (caught.value.errno, caught.value.slot) == (errno.EEXIST, 0)
    assert content(table) == UNCHANGED


@pytest.mark.parametrize("base_gfn", [-1, MAX_GFN - 99, MAX_GFN])
def test_a_slot_may_not_move_out_of_the_gfn_range(table: SlotTable, base_gfn: int) -> None:
    with pytest.raises(InvalidArgumentError, match="do not lie between gfn") as caught:
        table.check_move(0, base_gfn)
    assert (caught.value.errno, caught.value.slot) == (errno.EINVAL, 0)
    assert content(table) == UNCHANGED


def test_a_slot_moves_freely_past_another_address_space(table: SlotTable) -> None:
    assert table.check_move(slot_id(1, 0), 200).id == slot_id(1, 0)


def test_of_any_two_slots_add_refuses_just_those_that_share_a_frame() -> None:
    places = list(itertools.product(range(6), range(1, 4)))
    for (gfn, npages), (other_gfn, other_npages) in itertools.product(places, places):
        table = SlotTable()
        table.add(MemorySlot(0, gfn, npages))
        try:
            table.add(MemorySlot(1, other_gfn, other_npages))
        except BadSlotError:
            refused = True
        else:
            refused = False
        assert refused is bool({*range(gfn, gfn + npages)} & {*range(other_gfn, other_gfn + other_npages)})

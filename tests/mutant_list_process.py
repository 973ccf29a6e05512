"""Mutants of what follows a process's mappings, and of the port that compares with a copy."""

from __future__ import annotations

from mutant import Mutant

_MOVES = "test_process_moves.py"
_SEEN = "test_mutants_seen_in_memory.py"
_PINNED = "test_process_devices.py"
_MEANWHILE = "test_mutants_seen.py::test_a_store_after_the_copy_that_is_compared_is_in_no_copy_that_is_kept"


def _slots(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "linux/process_slots.py", old, new, tests)


def _placement(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "linux/placement.py", old, new, tests)


def _compare(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "compare.py", old, new, tests)


PROCESS = (
    Mutant(
        "only-what-is-written-is-news",
        "a new slot's contents",
        "linux/uffd_port.py",
        "            watch.mark(watch.contents)\n",
        "            watch.contents.pages()\n",
        ("test_process.py::test_of_a_new_mapping_all_that_it_holds_is_reported_once",),
    ),
    _placement(
        "another-kind-of-mapping-is-kept",
        "a changed mapping is kept",
        "        if under and all(Kind.of(mapping) == one.kind for mapping in under):\n",
        "        if under:\n",
        "test_process.py::test_a_mapping_over_part_of_another",
    ),
    _placement(
        "what-was-a-hole-is-clean",
        "a hole that is filled",
        "    one.changed = (*one.holes, *holes) if tuple(holes) != one.holes else ()\n",
        "    one.changed = ()\n",
        f"{_MOVES}::test_what_is_left_around_a_hole",
    ),
    _placement(
        "the-end-of-a-mapping-is-in-no-slot",
        "KVM 53eac7a8f8cf",
        "        if cursor < mapping.end:\n            pieces",
        "        if cursor == mapping.start:\n            pieces",
        f"{_MOVES}::test_a_mapping_grows_and_shrinks_where_it_is",
    ),
    _slots(
        "an-unmapped-part-is-not-reported",
        "a hole reads as zeros",
        "                        one.slot.dirty_bitmap.merge(_words(one.slot, one.changed))\n",
        "                        one.slot.dirty_bitmap.give_back()\n",
        f"{_MOVES}::test_what_is_left_around_a_hole",
    ),
    _slots(
        "a-slot-that-is-gone-stays",
        "a slot for each mapping",
        "        self.table.change(gone, (",
        "        self.table.change((), (",
        "test_process.py::test_a_mapping_over_part_of_another",
    ),
    _slots(
        "pinned-pages-are-not-reported",
        "KVM 2efd61a608b0",
        "            self._mark_pins(port, (*before.ranges, *self._pins.ranges))\n",
        "            self._mark_pins(port, ())\n",
        f"{_PINNED}::test_registered_buffers_count_as_written_always",
    ),
    _slots(
        "pages-that-were-pinned-are-not-reported",
        "KVM 5593473a1e6c",
        "            self._mark_pins(port, (*before.ranges, *self._pins.ranges))\n",
        "            self._mark_pins(port, self._pins.ranges)\n",
        f"{_PINNED}::test_what_was_read_before_a_buffer_is_let_go_is_reported",
    ),
    Mutant(
        "pinned-pages-are-reported-once",
        "KVM 2efd61a608b0",
        "linux/uffd_port.py",
        "            always = self.always.get(slot)\n",
        "            always = self.always.pop(slot, None)\n",
        (f"{_SEEN}::test_what_is_pinned_is_reported_by_each_get",),
    ),
    _slots(
        "the-last-page-of-a-span-is-none",
        "KVM 53eac7a8f8cf",
        "        pages.set_range(first, -(-(end - slot.host_address) // slot.page_size) - first)\n",
        "        pages.set_range(first, (end - slot.host_address) // slot.page_size - first)\n",
        f"{_SEEN}::test_a_span_of_addresses_has_each_page_that_it_touches",
    ),
    _slots(
        "a-process-without-its-first-thread-is-quiet",
        "a reader is told of a loss",
        "        if not found and runs_without_first(self._pid):\n",
        "        if not found and runs_without_first(self._pid) and self._numbers < 0:\n",
        "test_process_ends.py::test_its_first_thread_ends_before_the_others",
    ),
    _slots(
        "what-is-skipped-is-no-gap",
        "a reader is told of a loss",
        '            if mapping.permissions[1] == "w":\n                yield',
        '            if mapping.permissions[1] == "x":\n                yield',
        "test_process_left.py::test_the_second_of_two_logs_says_that_it_sees_nothing",
    ),
    Mutant(
        "a-mapping-that-went-is-clean",
        "what comes and goes counts as written",
        "linux/process_port.py",
        "        self._check_alive()\n        self.mark_all(watch)\n",
        "        self._check_alive()\n",
        (f"{_SEEN}::test_what_cannot_be_armed_counts_as_written",),
    ),
    _compare(
        "a-copy-later-than-the-comparison",
        "trap: reading before the scan",
        "                before[differs] = now[differs]\n",
        "                self._read(slot, first, before)\n",
        _MEANWHILE,
    ),
    _compare(
        "the-copy-before-the-bits",
        "nothing is lost on failure",
        """\
                with self.mmu_lock:
                    if slot.dirty_bitmap is not None:
                        slot.dirty_bitmap.merge(words_of_pages(np.flatnonzero(differs) + first))
                # After the bits: an interrupt between the two reports these pages again.
                before[differs] = now[differs]
""",
        """\
                before[differs] = now[differs]
                with self.mmu_lock:
                    if slot.dirty_bitmap is not None:
                        slot.dirty_bitmap.merge(words_of_pages(np.flatnonzero(differs) + first))
""",
        "test_uffd_interrupts.py::test_a_comparing_get_interrupted_anywhere_loses_nothing",
    ),
    _compare(
        "a-copy-that-stays-old",
        "exactness",
        "                before[differs] = now[differs]\n",
        "",
        "test_track.py::test_what_is_written_is_reported_once",
    ),
    _compare(
        "a-piece-s-pages-are-the-slot-s",
        "KVM locking.rst, ABA",
        "words_of_pages(np.flatnonzero(differs) + first)",
        "words_of_pages(np.flatnonzero(differs))",
        "test_compare.py::test_the_first_and_the_last_byte_of_each_page",
    ),
    Mutant(
        "what-is-read-is-later-than-what-was-compared",
        "trap: reading before the scan",
        "buffers/memory.py",
        "            contents = compared\n",
        "            pass\n",
        ("test_copies.py::test_a_copy_of_a_buffer",),
    ),
)

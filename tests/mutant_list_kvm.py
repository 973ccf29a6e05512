"""Mutants of KVM's three logs: the kernel's bitmap, manual protect, and the dirty ring."""

from __future__ import annotations

from mutant import Mutant

_RING = "test_kvm_ring.py"
_OVERFLOW = "test_kvm_ring_overflow.py"
_INTERRUPT = f"{_OVERFLOW}::test_an_interrupt_at_any_point_loses_nothing"
_LOG = "test_kvm_log.py"
_EXACT = f"{_LOG}::test_the_log_is_exactly_what_the_guest_stored"
_PIECES = f"{_LOG}::test_a_clear_of_a_large_slot_goes_to_the_kernel_piece_by_piece"
_MANUAL = f"{_LOG}::test_a_get_of_manual_protect_changes_nothing_and_clear_takes_what_it_is_given"
_MARKS = "test_mutants_seen.py::test_rings_are_harvested_and_marked_under_mmu_lock"
_KICKS = "test_mutants_seen.py::test_every_vcpu_leaves_the_guest_before_rings_are_harvested"
_EARLY = f"{_OVERFLOW}::test_a_reset_that_ends_early_leaves_no_page_unprotected"


def _ports(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "kvm/ports.py", old, new, tests)


def _port(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "kvm/ring_port.py", old, new, tests)


def _ring(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "kvm/ring.py", old, new, tests)


KVM = (
    _ports(
        "bitmap-is-fetched-twice",
        "KVM e88643ba1acb",
        "        self._vm.get_dirty_log_into(known[1])\n",
        "        self._vm.get_dirty_log_into(known[1])\n        self._vm.get_dirty_log_into(known[1])\n",
        f"{_EXACT}[131-bitmap]",
    ),
    _ports(
        "logging-is-not-switched-on",
        "the slot's flag",
        '        """Set the slot\'s flag: the kernel protects its pages and flushes."""\n        self.place(slot)\n',
        '        """Set the slot\'s flag: the kernel protects its pages and flushes."""\n',
        f"{_LOG}::test_two_vcpus_on_two_slots[bitmap]",
    ),
    _ports(
        "manual-sync-reads-nothing",
        "what the kernel holds",
        "                slot.dirty_bitmap.merge_all(copy)\n",
        "                slot.dirty_bitmap.give_back()\n",
        f"{_LOG}::test_two_vcpus_on_two_slots[manual]",
    ),
    _ports(
        "manual-clears-what-nobody-took",
        "KVM 4ddc9204572c",
        "            mask[:] = 0\n",
        "            mask[:] = ~np.uint64(0)\n",
        "test_mutants_seen.py::test_a_clear_takes_nothing_that_was_written_since_the_kernel_was_asked",
    ),
    _ports(
        "manual-clears-whole-words-at-the-end",
        "KVM 76d58e0f07ec",
        "            npages = min(len(mask) * PAGES_PER_WORD, slot.npages - first_page)\n",
        "            npages = len(mask) * PAGES_PER_WORD\n",
        f"{_LOG}::test_two_vcpus_on_two_slots[manual]",
    ),
    _ports(
        "manual-clears-from-page-0",
        "KVM 53eac7a8f8cf",
        "            first_page = first * PAGES_PER_WORD\n",
        "            first_page = 0\n",
        _PIECES,
    ),
    _ports(
        "manual-misses-the-last-word-of-a-piece",
        "KVM 53eac7a8f8cf",
        "            if not len(offsets):\n                continue\n",
        "            offsets, values = offsets[:-1], values[:-1]\n            if not len(offsets):\n                continue\n",
        _PIECES,
    ),
    _ports(
        "all-set-is-not-asked-for",
        "KVM 3c9bd4006bfc, INITIALLY_SET",
        "        self._start(slot, abi.DIRTY_LOG_MANUAL_PROTECT_ENABLE | abi.DIRTY_LOG_INITIALLY_SET)\n",
        "        self._start(slot, abi.DIRTY_LOG_MANUAL_PROTECT_ENABLE)\n",
        f"{_LOG}::test_with_all_pages_set_at_first_every_page_and_none_past_the_end_is_dirty",
    ),
    Mutant(
        "a-device-s-bit-is-early",
        "KVM 0a61b222df75",
        "kvm/memory.py",
        """\
        try:
            yield self.contents(slot).reshape(-1).data[offset : offset + nbytes]
        finally:
            with self._port.mmu_lock:
                if slot.dirty_bitmap is not None and nbytes:
                    slot.dirty_bitmap.merge(words_of_range(first, end - first))
""",
        """\
        with self._port.mmu_lock:
            if slot.dirty_bitmap is not None and nbytes:
                slot.dirty_bitmap.merge(words_of_range(first, end - first))
        yield self.contents(slot).reshape(-1).data[offset : offset + nbytes]
""",
        (f"{_LOG}::test_a_get_in_the_middle_of_a_host_write_does_not_take_its_bit",),
    ),
    _port(
        "reset-before-it-is-marked",
        "KVM 8929bc965964: the order of the flags",
        """\
            self._mark_ahead(ring, count)
            ring.give(count)
            # After the flags are set and before the reset: what is written over from here on the kernel does not reset.
            if count == ring.size or ring.came_round():
                self._lose(ring)
            self._reset(ring)
""",
        """\
            entries = ring.ahead(count)
            ring.give(count)
            if count == ring.size or ring.came_round():
                self._lose(ring)
            self._reset(ring)
            self._mark(entries)
""",
        _INTERRUPT,
    ),
    _port(
        "get-before-the-mark",
        "harvest, mark and reset are one section",
        "        with self.mmu_lock:\n            self.collect()\n            if self._with_bitmap",
        "        self.collect()\n        with self.mmu_lock:\n            if self._with_bitmap",
        _MARKS,
    ),
    _port(
        "an-offset-without-a-bound",
        "KVM msgid 20260512060742",
        "                inside = mine < np.uint64(slot.npages)\n",
        "                inside = mine < np.uint64(slot.npages + 64)\n",
        f"{_RING}::test_entries_of_a_slot_that_has_gone_or_shrunk_since_are_ignored",
    ),
    _port(
        "an-offset-of-32-bits",
        "KVM 87bf6e7de113",
        "                inside = mine < np.uint64(slot.npages)\n",
        "                mine = mine.astype(np.uint32)\n                inside = mine < slot.npages\n",
        "test_mutants_seen.py::test_an_entry_of_no_page_is_no_page_of_the_first_32_bits",
    ),
    _port(
        "a-slot-by-its-number",
        "KVM 1f4e5fc83a42",
        "            slot = self._slots.get(int(slots[0]))\n",
        "            slot = self._slots.get(int(slots[0]) & 0xFFFF)\n",
        f"{_RING}::test_every_entry_finds_its_slot_by_the_whole_of_its_id",
    ),
    _port(
        "a-stop-leaves-entries-in-the-rings",
        "KVM 13a17cc0526f",
        "        if self._failure is None:\n            self.collect()\n",
        "",
        "test_mutants_seen.py::test_a_stop_drops_what_the_rings_hold",
    ),
    _port(
        "a-slot-that-is-not-logged",
        "KVM 13a17cc0526f",
        "            if slot is not None and slot.dirty_bitmap is not None:\n                mine",
        "            if slot is not None:\n                mine",
        "test_mutants_seen.py::test_a_stop_drops_what_the_rings_hold",
    ),
    _port(
        "an-overflow-is-not-noticed",
        "a ring that is written over",
        "            if count == ring.size or ring.came_round():\n                self._lose(ring)\n            self._reset",
        "            if count > ring.size:\n                self._lose(ring)\n            self._reset",
        f"{_OVERFLOW}::test_an_overflow_loses_nothing_and_after_it_the_ring_is_exact_again",
    ),
    _port(
        "an-overflow-is-noticed-too-early",
        "a ring that is written over",
        """\
            self._mark_ahead(ring, count)
            ring.give(count)
            # After the flags are set and before the reset: what is written over from here on the kernel does not reset.
            if count == ring.size or ring.came_round():
                self._lose(ring)
""",
        """\
            over = count == ring.size or ring.came_round()
            self._mark_ahead(ring, count)
            ring.give(count)
            if over:
                self._lose(ring)
""",
        f"{_OVERFLOW}::test_an_overflow_at_any_step_of_a_get_loses_nothing",
    ),
    _port(
        "a-reset-is-taken-for-whole",
        "KVM 530a8ba71b4c",
        "            ring.taken(done)\n",
        "            ring.taken(ring.given)\n",
        _EARLY,
    ),
    _port(
        "an-early-end-is-believed",
        "Linux 6.17: a reset that a signal ends",
        "            self._all_due |= ring.given > 0\n",
        "",
        _EARLY,
    ),
    _port(
        "signals-come-through-a-reset",
        "KVM 530a8ba71b4c",
        "            done = without_signals(self._vm.reset_dirty_rings)\n",
        "            done = self._vm.reset_dirty_rings()\n",
        _EARLY,
    ),
    _port(
        "everything-is-marked-and-not-protected",
        "step 2 left out",
        "                slot.flags = flags & ~SlotFlags.LOG_DIRTY_PAGES\n",
        "                slot.flags = flags\n",
        f"{_OVERFLOW}::test_an_overflow_loses_nothing_and_after_it_the_ring_is_exact_again",
    ),
    _port(
        "everything-is-protected-and-not-marked",
        "KVM edde99ce0529",
        "                bitmap.merge(words_of_range(0, slot.npages))\n",
        "",
        f"{_OVERFLOW}::test_an_overflow_loses_nothing_and_after_it_the_ring_is_exact_again",
    ),
    _port(
        "the-backup-bitmap-is-asked-first",
        "the backup bitmap comes last",
        """\
            self.collect()
            if self._with_bitmap and slot.dirty_bitmap is not None:
""",
        "            if self._with_bitmap and slot.dirty_bitmap is not None:\n",
        f"{_RING}::test_a_get_adds_what_was_written_without_a_vcpu_and_asks_for_it_last",
    ),
    _port(
        "the-backup-bitmap-is-written-over",
        "KVM e88643ba1acb",
        """\
                slot.dirty_bitmap.merge_all(copy)
                self._vm.get_dirty_log(slot.id, copy)
""",
        "                self._vm.get_dirty_log(slot.id, copy)\n",
        f"{_INTERRUPT}[with_a_bitmap]",
    ),
    _port(
        "no-vcpu-leaves-the-guest",
        "a buffer of the hardware's (PML)",
        "        leave_guest(self._vcpus)\n",
        "",
        _KICKS,
    ),
    _port(
        "an-interrupted-harvest-is-forgotten",
        "nothing is lost on failure",
        "            if ring.given:\n                self._resume(ring)\n",
        "            ring.given = 0\n",
        _INTERRUPT,
    ),
    _port(
        "a-dead-collector-says-nothing",
        "a reader is told of a loss",
        "        if self._failure is not None:\n            raise",
        "        if self._failure is not None and self._closing.is_set():\n            raise",
        f"{_RING}::test_a_collector_that_failed_makes_every_get_say_so",
    ),
    _ring(
        "a-ring-does-not-wrap",
        "KVM 53eac7a8f8cf",
        "        if first + count > self.size:\n",
        "        if first + count > 2 * self.size:\n",
        f"{_RING}::test_the_ring_and_the_kernel_s_indexes_wrap",
    ),
    _ring(
        "an-empty-batch-gives-an-entry",
        "KVM 676f819c3e98",
        "                return count + int(free[0])\n",
        "                return count + max(1, int(free[0]))\n",
        f"{_RING}::test_where_nothing_was_stored_a_get_costs_no_call",
    ),
    _ring(
        "a-gap-holds-page-0",
        "KVM 676f819c3e98",
        '            entries["slot"][free] = _NO_SLOT\n',
        "",
        f"{_OVERFLOW}::test_what_lies_in_a_gap_does_not_keep_the_kernel_from_protecting_its_neighbours",
    ),
)

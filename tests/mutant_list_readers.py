"""Mutants of what stands around the generic functions: the slot's bitmap, consumers and their epochs, DirtyLog."""

from __future__ import annotations

from mutant import Mutant

_BITMAP = "test_slotbitmap.py"
_BITMAP_INTERRUPT = f"{_BITMAP}::test_an_interrupt_at_any_step_loses_no_bit"

_EXCHANGE_TAKE = '        self._current.take(index, out=values, mode="clip")\n'
_EXCHANGE_CLEAR = """\
        self._current[index] = 0
        self._flags[index] = False
        return DirtyWords(index, values)
"""


def _slotbitmap(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "slotbitmap.py", old, new, tests)


def _epoch(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "epoch.py", old, new, tuple(f"test_epoch.py::{test}" for test in tests))


def _dirty_log(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "dirty_log.py", old, new, tests)


READERS = (
    _slotbitmap(
        "snapshot-recorded-last",
        "every bit is in one of the halves",
        _EXCHANGE_TAKE + "        self._taken = index\n" + _EXCHANGE_CLEAR,
        _EXCHANGE_TAKE + _EXCHANGE_CLEAR.replace("        return", "        self._taken = index\n        return"),
        _BITMAP_INTERRUPT,
    ),
    _slotbitmap(
        "exchange-over-a-snapshot",
        "an exchange begins with give_back",
        "        self.give_back()\n        index = np.flatnonzero(self._flags)\n        values = self._snapshot[: len(index)]\n",
        "        index = np.flatnonzero(self._flags)\n        values = self._snapshot[: len(index)]\n",
        f"{_BITMAP}::test_the_next_exchange_gives_back_one_that_was_not_committed",
    ),
    _slotbitmap(
        "give-back-forgets",
        "a failed get puts its bits back",
        "            self.merge(DirtyWords(self._taken, self._snapshot[: len(self._taken)]))\n",
        "            self._taken = None\n",
        f"{_BITMAP}::test_the_next_exchange_gives_back_one_that_was_not_committed",
    ),
    _slotbitmap(
        "merge-writes-over",
        "KVM e88643ba1acb",
        "        self._current[words.offsets] |= words.values\n",
        "        self._current[words.offsets] = words.values\n",
        "test_kvm_lessons.py",
    ),
    _slotbitmap(
        "mark-32-bits",
        "KVM 87bf6e7de113",
        "        word = page >> 6\n",
        "        word = (page & 0x3FFF_FFFF) >> 6\n",
        "test_kvm_lessons.py::test_bitmaps_of_the_largest_slot_need_more_than_32_bits_87bf6e7de113",
    ),
    _slotbitmap(
        "mark-without-flag",
        "a flag for each non-zero word",
        "        self._flags_view[word] = True\n",
        "",
        f"{_BITMAP}::test_a_page_marked_while_a_snapshot_is_out_outlives_the_commit",
    ),
    _slotbitmap(
        "masked-takes-whole-words",
        "KVM 4ddc9204572c",
        "        self._current[index] &= ~snapshot\n",
        "        self._current[index] = 0\n",
        "test_errno.py::test_a_clear_touches_only_bits_that_are_dirty",
    ),
    _slotbitmap(
        "masked-drops-the-flag",
        "a flag for each non-zero word",
        "        self._flags[index] = self._current[index] != 0\n",
        "        self._flags[index] = False\n",
        "test_errno.py::test_a_clear_touches_only_bits_that_are_dirty",
    ),
    _slotbitmap(
        "runs-are-added",
        "a sum is no union",
        "        if np.count_nonzero(self._current[index]):\n",
        "        if not len(index):\n",
        "test_words_of_runs.py::test_runs_that_are_merged_are_all_there",
    ),
    _slotbitmap(
        "runs-end-with-their-word",
        "KVM 687414bebe30",
        "        if len(longer):\n            self.merge(",
        "        if not len(longer):\n            self.merge(",
        "test_words_of_runs.py::test_runs_that_are_merged_are_all_there",
    ),
    _slotbitmap(
        "receive-without-own-marks",
        "KVM 2efd61a608b0",
        "            self._snapshot[index] |= self._current[index]\n",
        "",
        "test_kvm_log.py::test_what_this_process_writes_is_in_the_log",
    ),
    _slotbitmap(
        "receive-recorded-last",
        "every bit is in one of the halves",
        "        self._taken = _WHOLE\n",
        "",
        "test_kvm_log.py::test_a_get_that_is_interrupted_at_any_point_loses_nothing",
    ),
    _epoch(
        "epoch-gives-its-own-bitmaps",
        "what is given is a copy",
        "        return {slot.id: pages.copy() for slot, pages in self._taken.items()}",
        "        return {slot.id: pages for slot, pages in self._taken.items()}",
        "test_changing_what_an_epoch_gave_changes_nothing_that_a_rollback_gives_back",
    ),
    _epoch(
        "take-forgets-before-it-has",
        "nothing is lost on failure",
        """\
        self._taken = self._pending
        self._pending = {slot: DirtyBitmap(slot.npages) for slot in self._taken}
""",
        """\
        taken, self._pending = self._pending, {}
        self._pending = {slot: DirtyBitmap(slot.npages) for slot in taken}
        self._taken = taken
""",
        "test_an_interrupt_at_any_point_of_an_epoch_loses_no_page",
    ),
    _epoch(
        "rollback-writes-over",
        "KVM e88643ba1acb",
        """\
            if slot in self._pending:
                self._pending[slot] |= pages
        self._taken = {}
""",
        """\
            if slot in self._pending:
                self._pending[slot] = pages
        self._taken = {}
""",
        "test_a_rollback_keeps_what_another_reader_drained_since",
    ),
    _epoch(
        "a-slot-never-met-is-taken-for-clean",
        "a new slot's contents",
        "            everything.set_range(0, slot.npages)\n",
        "            everything |= pages\n",
        "test_a_slot_added_later_is_all_dirty_once",
    ),
    _epoch(
        "commit-on-an-exception",
        "an epoch that fails is rolled back",
        "        self.consumer.end(self, commit=kind is None)\n",
        "        self.consumer.end(self, commit=True)\n",
        "test_an_exception_rolls_back_and_goes_on",
    ),
    _epoch(
        "an-ended-epoch-ends-the-next",
        "an epoch ends once",
        "            if self._open is not epoch:\n                return\n",
        "            if self._open is None:\n                return\n",
        "test_an_ended_epoch_has_no_say_in_the_next",
    ),
    Mutant(
        "an-interrupted-entry-stays-open",
        "nothing is lost on failure",
        "epoch.py",
        "        except BaseException:\n            self.rollback()\n            raise\n",
        "        except BaseException:\n            raise\n",
        ("test_mutants_seen.py::test_an_entry_that_is_interrupted_leaves_no_epoch_open",),
    ),
    Mutant(
        "an-epoch-without-the-log-s-lock",
        "a consumer has one epoch open",
        "epoch.py",
        "        with self._lock:\n            if self._open is not None:\n",
        "        if self._lock is not None:\n            if self._open is not None:\n",
        ("test_mutants_seen.py::test_an_epoch_begins_and_ends_under_the_log_s_lock",),
    ),
    _epoch(
        "two-epochs-at-once",
        "one epoch is open at a time",
        "            if self._open is not None:\n",
        "            if self._open is epoch:\n",
        "test_a_consumer_has_one_epoch_open_at_a_time",
    ),
    _dirty_log(
        "get-takes-from-consumers",
        "what get takes is kept for consumers",
        "        for consumer in self._consumers.values():\n            consumer.pending.add(slot, snapshot)\n",
        "",
        "test_epoch.py::test_neither_consumers_nor_get_steal_from_each_other",
    ),
    _dirty_log(
        "consumers-take-from-get",
        "what a consumer drains is kept for get",
        "        unread = self._unread[slot]\n        unread |= snapshot\n",
        "        unread = self._unread[slot]\n        unread.assign(snapshot)\n",
        "test_epoch.py::test_get_into_a_bitmap_replaces_what_was_there_also_when_consumers_drained_the_port",
    ),
    _dirty_log(
        "get-pops-first",
        "nothing is lost on failure",
        """\
            self._take(self.memory, slot, partial(self._deliver, memslot, out=out))
            # Last: until here an interrupt leaves the pages to the next get.
            unread = self._unread.pop(memslot)
""",
        """\
            unread = self._unread[memslot]
            self._unread.pop(memslot)
            self._take(self.memory, slot, partial(self._deliver, memslot, out=out))
            unread |= self._unread.pop(memslot)
""",
        "test_epoch.py::test_a_get_that_fails_takes_from_nobody",
    ),
    _dirty_log(
        "clear-takes-from-consumers",
        "a clear takes from no consumer",
        "                for consumer in self._consumers.values():\n                    consumer.pending.add(memslot, cleared)\n",
        "                cleared.any()\n",
        "test_epoch.py::test_with_manual_protect_a_clear_takes_from_get_and_from_no_consumer",
    ),
    _dirty_log(
        "clear-leaves-get",
        "a clear takes from get",
        "            unread.assign(unread - taken)\n",
        "",
        "test_epoch.py::test_with_manual_protect_a_clear_takes_from_get_and_from_no_consumer",
    ),
    _dirty_log(
        "a-restart-begins-clean",
        "after a stop nobody saw what was written",
        "            self._stopped = True\n",
        "",
        "test_epoch.py::test_after_a_restart_an_older_consumer_finds_every_page_dirty_once",
    ),
    _dirty_log(
        "stop-says-so-last",
        "nothing is lost on failure",
        """\
            self._stopped = True
            self._on = False
            for consumer in self._consumers.values():
                consumer.pending = PendingPages()
            for slot in self.memory.slots:
                stop_logging(self.memory, slot.id)
""",
        """\
            for slot in self.memory.slots:
                stop_logging(self.memory, slot.id)
            self._stopped = True
            self._on = False
            for consumer in self._consumers.values():
                consumer.pending = PendingPages()
""",
        "test_epoch.py::test_an_interrupt_at_any_point_of_a_stop_hides_nothing_from_older_consumers",
    ),
    _dirty_log(
        "get-outside-slots-lock",
        "a slot replaced amid a get",
        """\
        with self._lock, self.memory.slots.lock:
            memslot, _ = self.memory.slots.logged(slot)
            if out is not None""",
        """\
        with self._lock:
            memslot, _ = self.memory.slots.logged(slot)
            if out is not None""",
        "test_epoch.py::test_a_slot_is_not_replaced_in_the_middle_of",
    ),
    _dirty_log(
        "locks-of-a-fork-stay-held",
        "a fork takes nothing of its parent's",
        "    os.register_at_fork(after_in_child=_unlock_all)\n",
        "    os.register_at_fork(after_in_parent=_unlock_all)\n",
        "test_lone_process.py::test_a_fork_takes_nothing_of_its_parents",
    ),
    _dirty_log(
        "new-slots-begin-clean",
        "a new slot's contents",
        "                    start_logging(self.memory, slot.id, contents=True)\n",
        "                    start_logging(self.memory, slot.id)\n",
        "test_process.py::test_of_a_new_mapping_all_that_it_holds_is_reported_once",
    ),
)

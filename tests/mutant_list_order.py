"""Mutants of the generic functions: each step of a get left out, moved, or done outside its lock."""

from __future__ import annotations

from mutant import Mutant

_PORTS = "test_mutants.py::test_the_real_ports_lose_nothing"
_FAULT = "test_errno.py::test_a_copy_that_faults_loses_nothing_and_flushes"
_INTERRUPT = "test_errno.py::test_a_get_that_is_interrupted_at_any_point_loses_nothing"
_LOCKS = "test_mutants_seen.py::test_each_step_has_its_locks"
_STARTS = "test_mutants_seen.py::test_a_start_that_fails_leaves_no_log_whose_contents_nobody_was_told_of"

EXCHANGE = """\
            with port.mmu_lock:
                words = bitmap.exchange()  # 1. take a snapshot and clear it
                port.enable_log_dirty(slot, words)  # 2. write-protect those pages
"""
COPY = "            _copy_to_caller(slot, DirtyBitmap.from_words(slot.npages, words), copy)  # 3. copy the snapshot\n"
FLUSH = """\
            if words:
                port.flush_tlbs(slot)  # 4. flush TLBs
"""
_SYNC_EXCHANGE = """\
            port.sync_dirty_log(slot)
            with port.mmu_lock:
                words = bitmap.exchange()
"""
_SYNC_FLUSH = """\
            _copy_to_caller(slot, DirtyBitmap.from_words(slot.npages, words), copy)
            if words:
                port.flush_tlbs(slot)


def fetch_dirty_log"""
_FETCH = """\
            with port.mmu_lock:
                snapshot = bitmap.receive(slot, port.fetch_dirty_log)
"""
_MASKED = """\
                words = bitmap.exchange_masked(DirtyWords(index + first_page // PAGES_PER_WORD, values))
                port.enable_log_dirty(slot, words)
"""
_GIVE_BACK = """\
        with self._port.mmu_lock:
            self._bitmap.give_back()
        self._port.flush_tlbs(self._slot)
"""


def _log(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "log.py", old, new, tests)


ORDER = (
    _log(
        "protect-copy-clear",
        "KVM edde99ce0529",
        EXCHANGE + COPY,
        """\
            with port.mmu_lock:
                words = bitmap.read()
                port.enable_log_dirty(slot, words)
"""
        + COPY
        + """\
            with port.mmu_lock:
                bitmap.exchange()
""",
        _PORTS,
    ),
    _log(
        "copy-then-wipe",
        "KVM e88643ba1acb",
        _SYNC_EXCHANGE + "            _copy_to_caller(slot, DirtyBitmap.from_words(slot.npages, words), copy)\n",
        """\
            port.sync_dirty_log(slot)
            with port.mmu_lock:
                words = bitmap.read()
            _copy_to_caller(slot, DirtyBitmap.from_words(slot.npages, words), copy)
            with port.mmu_lock:
                bitmap.exchange()
""",
        _PORTS,
    ),
    _log(
        "exchange-outside-mmu-lock",
        "KVM 50e92b3c9711",
        EXCHANGE,
        """\
            words = bitmap.exchange()
            with port.mmu_lock:
                port.enable_log_dirty(slot, words)
""",
        _LOCKS,
    ),
    _log(
        "protect-outside-mmu-lock",
        "KVM 50e92b3c9711",
        "                port.enable_log_dirty(slot, words)  # 2. write-protect those pages\n",
        "            port.enable_log_dirty(slot, words)\n",
        _LOCKS,
    ),
    _log(
        "sync-exchange-outside-mmu-lock",
        "KVM 50e92b3c9711",
        _SYNC_EXCHANGE,
        """\
            port.sync_dirty_log(slot)
            words = bitmap.exchange()
""",
        _LOCKS,
    ),
    _log(
        "no-protect",
        "step 2 left out",
        "                port.enable_log_dirty(slot, words)  # 2. write-protect those pages\n",
        "",
        _PORTS,
    ),
    _log("no-flush", "KVM 7e71a59b2503", FLUSH, "", _PORTS),
    _log("no-flush-after-sync", "KVM 7e71a59b2503", _SYNC_FLUSH, _SYNC_FLUSH.replace("port.flush_tlbs(slot)", "pass"), _PORTS),
    _log(
        "flush-after-slots-lock",
        "why 4 before slots_lock is let go",
        FLUSH,
        "        if words:\n            pass\n    if words:\n        port.flush_tlbs(slot)\n",
        _LOCKS,
    ),
    _log(
        "flush-always",
        "KVM 676f819c3e98",
        FLUSH,
        "            port.flush_tlbs(slot)\n",
        "test_kvm_lessons.py::test_an_empty_batch_does_no_work_676f819c3e98",
    ),
    _log(
        "flush-at-start-if-changed",
        "KVM b64d740ea7dd",
        "                raise\n        port.flush_tlbs(slot)\n",
        "                raise\n        if bitmap.read():\n            port.flush_tlbs(slot)\n",
        "test_kvm_lessons.py::test_starting_the_log_flushes_always_b64d740ea7dd",
    ),
    _log("commit-before-copy", "nothing is lost on failure", COPY, "            bitmap.commit()\n" + COPY, _INTERRUPT),
    _log(
        "commit-before-sync-copy",
        "nothing is lost on failure",
        _SYNC_EXCHANGE,
        _SYNC_EXCHANGE + "            bitmap.commit()\n",
        _INTERRUPT,
    ),
    _log(
        "commit-before-fetched-copy",
        "nothing is lost on failure",
        _FETCH,
        _FETCH + "            bitmap.commit()\n",
        "test_kvm_log.py::test_a_get_that_is_interrupted_at_any_point_loses_nothing[bitmap]",
    ),
    _log(
        "commit-on-failure",
        "nothing is lost on failure",
        "        if kind is None:\n            self._bitmap.commit()\n            return\n",
        "        self._bitmap.commit()\n        if kind is None:\n            return\n",
        _INTERRUPT,
    ),
    _log(
        "no-flush-on-failure",
        "nothing is lost on failure",
        _GIVE_BACK,
        _GIVE_BACK.replace("        self._port.flush_tlbs(self._slot)\n", ""),
        _FAULT,
    ),
    _log(
        "sync-after-exchange",
        "KVM 6c576e74fd91",
        _SYNC_EXCHANGE,
        """\
            with port.mmu_lock:
                words = bitmap.exchange()
            port.sync_dirty_log(slot)
""",
        _PORTS,
    ),
    _log(
        "read-takes",
        "a get of manual protect only reads",
        "            words = bitmap.read()\n",
        "            words = bitmap.exchange()\n            bitmap.commit()\n",
        "test_errno.py::test_a_clear_touches_only_bits_that_are_dirty",
    ),
    _log(
        "clear-does-not-protect",
        "step 2 left out",
        _MASKED,
        _MASKED.replace("                port.enable_log_dirty(slot, words)\n", ""),
        "test_errno.py::test_a_clear_takes_just_its_range",
    ),
    _log(
        "clear-does-not-flush",
        "KVM 7e71a59b2503",
        """\
            if words:
                port.flush_tlbs(slot)


def start_logging""",
        "\n\ndef start_logging",
        "test_errno.py::test_a_clear_takes_just_its_range",
    ),
    _log(
        "clear-from-page-0",
        "KVM 53eac7a8f8cf",
        "DirtyWords(index + first_page // PAGES_PER_WORD, values)",
        "DirtyWords(index, values)",
        "test_errno.py::test_a_clear_takes_just_its_range",
    ),
    _log(
        "clear-without-a-bound",
        "KVM 98938aa8edd6",
        "first_page > slot.npages or npages > slot.npages - first_page:",
        "npages > slot.npages:",
        "test_errno.py::test_a_misaligned_or_too_long_clear_is_einval_and_clears_nothing",
    ),
    _log(
        "clear-in-whole-words-only",
        "KVM 76d58e0f07ec",
        "    elif npages < slot.npages - first_page and npages % PAGES_PER_WORD:\n",
        "    elif npages % PAGES_PER_WORD:\n",
        "test_errno.py::test_a_clear_takes_just_its_range",
    ),
    _log(
        "start-protects-nothing",
        "start as with all bits set",
        "                if initially_all_set and isinstance(port, ProtectPort):\n",
        "                if isinstance(port, ProtectPort):\n",
        _PORTS,
    ),
    _log(
        "start-fails-by-half",
        "whole or not at all",
        "                _stop(port, slot)\n                raise\n",
        "                raise\n",
        _STARTS,
    ),
    _log(
        "contents-not-reported",
        "a new slot's contents",
        "                if contents:\n",
        "                if contents and slot.readonly:\n",
        "test_process.py::test_of_a_new_mapping_all_that_it_holds_is_reported_once",
    ),
    _log(
        "stop-without-slots-lock",
        "KVM 530a8ba71b4c",
        "    with slots.lock:\n        slot = slots[slot_id]\n        if slot.dirty_bitmap is None:\n",
        "    if slots.lock is not None:\n        slot = slots[slot_id]\n        if slot.dirty_bitmap is None:\n",
        _LOCKS,
    ),
)

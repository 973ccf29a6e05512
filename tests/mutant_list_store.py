"""Mutants of checkpoints: what loses a saved page, or keeps a wrong one."""

from __future__ import annotations

from mutant import Mutant

_POWER = "test_checkpoint_power.py"
_CRASHES = "test_checkpoint_crashes.py"
_FAULTS = "test_checkpoint_faults.py"
_CHECKPOINT = "test_checkpoint.py"


def _store(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "checkpoint/store.py", old, new, tests)


def _draft(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "checkpoint/draft.py", old, new, tests)


STORE = (
    Mutant(
        "a-segment-is-not-synced",
        "a power cut after a commit",
        "checkpoint/segments.py",
        "            os.fdatasync(self._descriptor)\n",
        "",
        (_POWER,),
    ),
    Mutant(
        "a-new-segment-has-no-name-yet",
        "a power cut after a commit",
        "checkpoint/segments.py",
        "                sync_folder(self._folder)\n                self._new = False\n",
        "                self._new = False\n",
        (_POWER,),
    ),
    _draft(
        "the-index-commits-before-the-data",
        "commit order: data, sync, index",
        "        self._flush()\n        self._store.sync()\n        npages",
        "        self._flush()\n        npages",
        _POWER,
    ),
    _draft(
        "a-page-that-begins-with-zeros-is-zero",
        "hypeman 262: what was not looked at taken for zeros",
        "        zero[maybe] = ~words[maybe].any(axis=1)\n",
        "",
        _CHECKPOINT,
    ),
    _draft(
        "a-later-round-of-a-save-does-not-count",
        "QEMU: a page sent before it was written again",
        "self._maps[key].under(taken) if key in self._maps else taken",
        "taken.under(self._maps[key]) if key in self._maps else taken",
        f"{_CHECKPOINT}::test_a_background_save_has_what_there_was_when_it_was_finished",
    ),
    _store(
        "a-full-segment-is-gone-on-with",
        "an index that does not know yet how long a segment is",
        "                self.avoid(self._segment.number)\n            if self._segment is None:",
        "                self.leave_segment()\n            if self._segment is None:",
        f"{_CHECKPOINT}::test_a_checkpoint_longer_than_a_segment_goes_on_in_the_next",
    ),
    _store(
        "a-segment-whose-sync-failed-is-gone-on-with",
        "fsync: the next one says all is well",
        "            self._spoiled.add(self._segment.number)\n            self.leave_segment()\n\n    def check_writable",
        "            self.leave_segment()\n\n    def check_writable",
        _FAULTS,
    ),
    _store(
        "a-commit-in-doubt-is-written-over",
        "a commit that failed and came to be",
        "            self._in_doubt |= not (isinstance(error, DirtyLogError) and error.errno == errno.ENOSPC)\n",
        "",
        _FAULTS,
    ),
    Mutant(
        "a-failed-save-takes-its-pages-along",
        "Firecracker: ENOSPC loses the dirty pages",
        "epoch.py",
        "        self.consumer.end(self, commit=kind is None)\n",
        "        self.consumer.end(self, commit=True)\n",
        (f"{_CHECKPOINT}::test_a_failed_save_leaves_its_pages_to_the_next",),
    ),
    Mutant(
        "a-segment-goes-before-the-index-has-left-it",
        "garbage collection in the wrong order",
        "checkpoint/retention.py",
        "    store.sync()\n    with store.transaction() as index:\n",
        "    store.sync()\n    segments.drop(store.folder, segment)\n    with store.transaction() as index:\n",
        (_CRASHES,),
    ),
    Mutant(
        "a-moved-page-has-its-neighbours-sum",
        "garbage collection that shifts",
        "checkpoint/retention.py",
        "reshape(row.npages, size)[mask].tobytes()",
        "reshape(row.npages, size)[: int(mask.sum())].tobytes()",
        (f"{_CHECKPOINT}::test_pruned_checkpoints_leave_the_others_whole_and_give_their_room_back",),
    ),
    Mutant(
        "a-page-is-restored-unchecked",
        "a checksum that nobody looks at",
        "checkpoint/contents.py",
        "        if self._checksum.of_pages(contents) != expected:\n",
        "        if len(contents) == 0:\n",
        ("test_checkpoint_damage.py::test_a_flipped_bit_in_a_segment_is_named_and_spoils_nothing_else",),
    ),
    Mutant(
        "dropped-pages-do-not-move-on",
        "a chain whose middle was dropped",
        "checkpoint/retention.py",
        "            maps[key] = one.under(maps[key]) if key in maps else one\n",
        "            maps[key] = maps[key] if key in maps else one\n",
        (f"{_CHECKPOINT}::test_pruned_checkpoints_leave_the_others_whole_and_give_their_room_back",),
    ),
    Mutant(
        "two-write-to-one-store",
        "two writers",
        "checkpoint/folder.py",
        "            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)\n",
        ("test_checkpoint_refusals.py::test_a_second_writer_is_refused_and_told_of_the_first",),
    ),
    Mutant(
        "a-reset-forgets-what-it-did-not-put-back",
        "nothing is lost on failure",
        "guests/baseline.py",
        "                        with self.memory.port.mmu_lock:\n                            copy.put_back(pages)\n",
        "                        epoch.commit()\n                        with self.memory.port.mmu_lock:\n"
        "                            copy.put_back(pages)\n",
        ("test_reset.py",),
    ),
)

"""Mutants of D(t), of recordings and of what commands say of gaps."""

from __future__ import annotations

from mutant import Mutant

_RECORDING = "test_recording.py"
_FOOTPRINT = "test_footprint.py::test_every_window_has_as_many_pages_as_their_union"
_FLIPPED = f"{_RECORDING}::test_no_flipped_bit_changes_what_a_round_had"


def _footprint(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "observe/footprint.py", old, new, tests)


def _recorder(name: str, like: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, like, "recording/recorder.py", old, new, tests)


RECORDS = (
    _footprint(
        "a-page-is-new-in-every-round",
        "one rate that counts a page as often as it is written",
        "        self._last[places] = number\n",
        "",
        _FOOTPRINT,
    ),
    _footprint(
        "the-first-round-is-taken-for-never",
        "a sentinel that is a value",
        "_FIRST_ROUND = 1 << 31\n",
        "_FIRST_ROUND = 0\n",
        _FOOTPRINT,
    ),
    _footprint(
        "the-pages-of-two-slots-are-the-same",
        "Firecracker 5705: several slots",
        "            self._end += slot.npages\n",
        "            self._end += 0\n",
        _FOOTPRINT,
    ),
    Mutant(
        "a-prediction-needs-no-rest",
        "Cloud Hypervisor: the last round is no part of the downtime",
        "observe/precopy.py",
        "        if reached is None and rest <= downtime:\n",
        "        if reached is None and lengths[-1] <= downtime:\n",
        ("test_footprint.py",),
    ),
    _recorder(
        "an-interrupted-round-leaves-a-transaction",
        "Ctrl-C between two statements",
        "            if self._database.in_transaction:\n",
        "            if self._database.in_transaction and isinstance(error, sqlite3.Error):\n",
        f"{_RECORDING}::test_a_recorder_that_is_interrupted_goes_on",
    ),
    _recorder(
        "a-round-that-meets-a-reader-is-dropped",
        "a reader takes rounds away",
        "            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or last:\n",
        "            self._pending.clear()\n            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or last:\n",
        f"{_RECORDING}::test_a_recording_is_read_while_it_goes_on_and_a_reader_that_holds_it_loses_no_round",
    ),
    _recorder(
        "a-recording-is-replaced-under-its-recorder",
        "two writers",
        "            _refuse_if_recorded(path)\n",
        "",
        f"{_RECORDING}::test_a_file_is_replaced_only_when_that_is_said",
    ),
    _recorder(
        "a-gap-that-is-over-was-none",
        "coverage that is looked at only at the end",
        '        known = self._told.get("incomplete", [])\n',
        "        known: list[str] = []\n",
        "test_cli_observe.py::test_a_gap_that_is_over_before_the_end_is_told_all_the_same",
    ),
    Mutant(
        "a-run-that-had-a-gap-exits-0",
        "coverage that is looked at only at the end",
        "cli/session.py",
        "            gaps |= dict.fromkeys(log.memory.incomplete)\n",
        "            gaps = dict.fromkeys(log.memory.incomplete)\n",
        ("test_cli_observe.py::test_a_gap_that_is_over_before_the_end_is_told_all_the_same",),
    ),
    Mutant(
        "a-round-is-believed-without-its-sum",
        "a checksum that nobody looks at",
        "recording/reader.py",
        "                if row.crc != row.sum():\n",
        "                if row.crc != row.sum() and not row.data:\n",
        (_FLIPPED, f"{_RECORDING}::test_a_round_without_its_checksum_is_named"),
    ),
    Mutant(
        "a-newer-recording-is-read",
        "a version that is not looked at",
        "recording/reader.py",
        "        if version > VERSION:\n",
        "        if version > VERSION + 9:\n",
        (f"{_RECORDING}::test_a_newer_recording_is_refused_with_the_remedy",),
    ),
    Mutant(
        "the-runs-of-a-slot-go-on-from-the-slot-before",
        "Firecracker 5705: several slots",
        "recording/runs.py",
        "    gaps[begins] = rows[begins, 0]\n",
        "",
        ("test_recording_runs.py::test_rounds_come_back_as_they_were_packed",),
    ),
)

"""Recordings of every kind of source: what is read is what was found, and a recorder may end in any way."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dirtylog
from dirtylog.observe.footprint import Footprint
from dirtylog.observe.rounds import Round, rounds
from dirtylog.recording.schema import VERSION
from kvm_here import missing_kvm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from dirtylog.memory import Memory

SPINNER = "import time; a = bytearray(8 << 20)\nwhile True:\n for i in range(0, len(a), 40960): a[i] = 1\n time.sleep(0.001)"


def shift(found: Round) -> dict[tuple[int, int], set[int]]:
    return {(slot.id, slot.base_gfn): set(dirty.pages().tolist()) for slot, dirty in found.dirty.items() if dirty}


@contextlib.contextmanager
def source(kind: str) -> Iterator[Memory]:
    if kind == "kvm" and (missing := missing_kvm()):
        pytest.skip(missing)
    if kind == "process":
        with dirtylog.open([sys.executable, "-c", SPINNER]) as memory:
            yield memory
    elif kind == "buffer":
        array = dirtylog.empty(1 << 20, "uint8")
        over = threading.Event()

        def write() -> None:
            while not over.wait(0.001):
                array[np.random.default_rng().integers(0, len(array), 9)] += 1

        writer = threading.Thread(target=write)
        with dirtylog.track(array) as log:
            log.stop()
            writer.start()
            try:
                yield log.memory
            finally:
                over.set()
                writer.join()
    else:
        with dirtylog.open({"kvm": "kvm:random", "emulated": "emu:arm64:hotset"}[kind], size="4MiB") as memory:
            yield memory


@pytest.mark.parametrize("kind", ["emulated", "kvm", "process", "buffer"])
def test_what_is_read_is_what_was_found(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "run.dlog"
    footprint = Footprint()
    with source(kind) as memory, dirtylog.DirtyLog(memory) as log:
        with dirtylog.Recorder(path, memory, target=kind) as recorder:
            memory.resume()
            found = []
            for one in rounds(log, 8, 0.03):
                recorder.add(one)
                footprint.add(one.seconds, one.dirty)
                found.append(one)
                if one.number == 4:
                    recorder.mark("half")
        memory.pause()
        facts: dict[str, object] = {"target": kind, "port": memory.port.name, "exactness": memory.exactness.value, "status": 0}
        facts |= {"blind_spots": list(memory.blind_spots), "incomplete": [], "page_size": 4096}
    assert any(shift(one) for one in found)
    with dirtylog.Recording(path) as recording:
        assert recording.facts.items() >= facts.items()
        assert recording.facts["held"] > 0
        assert recording.rounds["number"].tolist() == [one.number for one in found]
        assert recording.rounds["pages"].tolist() == [one.dirty_pages for one in found]
        assert recording.rounds["nbytes"].tolist() == [one.dirty_bytes for one in found]
        assert recording.rounds["seconds"].tolist() == [one.seconds for one in found]
        assert recording.rounds["get_seconds"].tolist() == [one.get_seconds for one in found]
        assert np.diff(recording.rounds["began"]) == pytest.approx(np.diff([one.began for one in found]), abs=1e-6)
        for row, one in enumerate(found):
            again = {(slot.id, slot.base_gfn): set(dirty.pages().tolist()) for slot, dirty in recording.dirty(row).items()}
            assert again == shift(one)
        runs = recording.runs()
        assert len(runs) == recording.rounds["runs"].sum()
        assert runs["npages"].sum() == recording.rounds["pages"].sum()
        curve, expected = recording.footprint(), footprint.curve()
        assert curve.nbytes.tolist() == expected.nbytes.tolist()
        assert curve.seconds.tolist() == pytest.approx(expected.seconds.tolist())
        (mark,) = recording.marks
        assert mark.text == "half"
        assert recording.rounds["began"][3] < mark.seconds < recording.rounds["began"][5]


def test_a_part_of_the_time_has_the_rounds_that_lie_in_it(tmp_path: Path) -> None:
    path = recorded(tmp_path, [[1, 2, 3], [2], [], [9, 10], [2]])
    with dirtylog.Recording(path) as recording:
        assert recording.duration == pytest.approx(5.0)
        assert recording.runs(0.9, 4.1)["first"].tolist() == [2, 9]
        assert recording.runs(start=3.5)["first"].tolist() == [2]
        assert recording.runs(end=1.5)["npages"].tolist() == [3]
        assert len(recording.runs(7.0)) == len(recording.runs(3.0, 2.0)) == 0
        assert recording.footprint(1.0, 5.0).nbytes.tolist() == [4096.0, 8192.0, 12288.0]
        assert recording.dirty(-1).keys() == {recording.slots[0]}
        with pytest.raises(IndexError):
            recording.dirty(5)


def recorded(tmp_path: Path, pages: list[list[int]], name: str = "made.dlog") -> Path:
    """A recording of a buffer, a second a round, of pages as they are given."""
    path = tmp_path / name
    array = dirtylog.empty(16 * 4096, "uint8")
    with dirtylog.track(array) as log, dirtylog.Recorder(path, log.memory) as recorder:
        (slot,) = log.memory.slots
        for number, found in enumerate(pages):
            dirty = dirtylog.DirtyBitmap.from_pages(slot.npages, found)
            recorder.add(Round(number + 1, 1.0, 0.001, {slot: dirty}, recorder._began + number))
    return path


# --- record, in the background


def test_record_takes_all_that_is_written_and_no_page_from_anybody(tmp_path: Path) -> None:
    array = dirtylog.empty((64, 4096), "uint8")
    with dirtylog.track(array) as log:
        with dirtylog.record(log, tmp_path / "a.dlog", interval="5ms", target="mine") as recorder:
            for page in range(64):
                array[page, 7] = 1
                time.sleep(0.001)
            recorder.mark("done")
        assert log.get(0).count() == 64
        assert not log._consumers
    with dirtylog.Recording(tmp_path / "a.dlog") as recording:
        assert recording.facts["target"] == "mine"
        assert set(recording.runs()["first"].tolist()) <= set(range(64))
        assert recording.footprint().nbytes[-1] == 64 * 4096
        assert len(recording.rounds) > 3


def test_what_goes_wrong_in_the_background_is_raised_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = dirtylog.empty(4096, "uint8")

    def refuse(*_: object) -> None:
        raise dirtylog.DirtyLogError("no room")

    monkeypatch.setattr(dirtylog.Recorder, "add", refuse)
    with dirtylog.track(array) as log, pytest.raises(dirtylog.DirtyLogError, match="no room"):  # noqa: SIM117 - in this order
        with dirtylog.record(log, tmp_path / "a.dlog", interval=0.001):
            time.sleep(0.05)


# --- a recorder may end in any way


RECORDS = """
import dirtylog, sys
from dirtylog.observe.rounds import rounds
memory = dirtylog.open("emu:arm64:random", size="4MiB")
with dirtylog.DirtyLog(memory) as log:
    recorder = dirtylog.Recorder(sys.argv[1], memory)
    memory.resume()
    for found in rounds(log, None, 0.001):
        recorder.add(found)
        print(found.number, found.dirty_pages, flush=True)
"""


@pytest.mark.parametrize("seed", range(8))
def test_a_recorder_that_is_killed_leaves_every_round_but_perhaps_the_last(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "killed.dlog"
    told: list[list[int]] = []
    with subprocess.Popen([sys.executable, "-c", RECORDS, str(path)], stdout=subprocess.PIPE, text=True) as recorder:
        assert recorder.stdout is not None
        wait = 0.05 + np.random.default_rng(seed).uniform(0, 0.05)
        for line in recorder.stdout:
            if line.endswith("\n"):
                told.append(list(map(int, line.split())))
            if len(told) == 10:
                threading.Timer(wait, recorder.kill).start()
    assert recorder.returncode == -signal.SIGKILL
    with dirtylog.Recording(path) as recording:
        assert recording.facts["status"] is None
        assert len(recording.rounds) >= len(told)
        assert np.stack((recording.rounds["number"], recording.rounds["pages"]), axis=1)[: len(told)].tolist() == told
        assert recording.runs()["npages"].sum() == recording.rounds["pages"].sum()


@pytest.mark.parametrize("size", ["24k", "48k", "200k"])
def test_a_full_disk_is_told_and_what_was_written_stays(tmp_path: Path, size: str) -> None:
    if os.geteuid():
        pytest.skip("mounting a small disk takes root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(tmp_path)], check=True)
    path = tmp_path / "full.dlog"
    try:
        kept = 0
        array = dirtylog.empty(4096 * 4096, "uint8")
        random = np.random.default_rng(3)
        with dirtylog.track(array) as log, pytest.raises(dirtylog.DirtyLogError, match=r"cannot be written.*full") as caught:
            (slot,) = log.memory.slots
            with dirtylog.Recorder(path, log.memory) as recorder:
                for number in range(1000):
                    dirty = dirtylog.DirtyBitmap.from_pages(slot.npages, random.integers(0, slot.npages, 500))
                    recorder.add(Round(number, 1.0, 0.0, {slot: dirty}, 0.0))
                    kept = number + 1
        assert caught.value.errno == 28
        if kept:
            with dirtylog.Recording(path) as recording:
                assert len(recording.rounds) == kept
                assert recording.runs()["npages"].sum() == recording.rounds["pages"].sum()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_recording_is_read_while_it_goes_on_and_a_reader_that_holds_it_loses_no_round(tmp_path: Path) -> None:
    path = tmp_path / "live.dlog"
    array = dirtylog.empty(4096 * 64, "uint8")
    with dirtylog.track(array) as log:
        (slot,) = log.memory.slots
        recorder = dirtylog.Recorder(path, log.memory)
        recorder._database.execute("PRAGMA busy_timeout=1")

        def add(number: int) -> None:
            recorder.add(Round(number, 1.0, 0.0, {slot: dirtylog.DirtyBitmap.from_pages(slot.npages, [number])}, float(number)))

        add(1)
        with dirtylog.Recording(path) as recording:
            assert recording.rounds["number"].tolist() == [1]
            assert recording.facts["status"] is None
        reader = sqlite3.connect(path)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM rounds").fetchone()
        add(2)
        add(3)
        reader.close()
        add(4)
        recorder.close()
        recorder.close()
        with pytest.raises(dirtylog.DirtyLogError, match="closed"):
            add(5)
    with dirtylog.Recording(path) as recording:
        assert recording.runs()["first"].tolist() == recording.rounds["number"].tolist() == [1, 2, 3, 4]


class InterruptedHere(BaseException):
    """Comes like a Ctrl-C, at which pytest would end."""


def test_a_recorder_that_is_interrupted_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.dlog"
    with dirtylog.track(bytearray(4096 * 8)) as log:
        (slot,) = log.memory.slots
        with dirtylog.Recorder(path, log.memory) as recorder:
            whole = recorder._database

            class Interrupted:
                """A database in which an interrupt comes before one of the statements."""

                def __init__(self, left: int) -> None:
                    self.left = left

                def __getattr__(self, name: str) -> object:
                    return getattr(whole, name)

                def execute(self, statement: str, *values: Any) -> object:
                    self.left -= 1
                    if self.left == 0:
                        raise InterruptedHere
                    return whole.execute(statement, *values)

            for number in range(1, 9):
                found = Round(number, 1.0, 0.0, {slot: dirtylog.DirtyBitmap.from_pages(slot.npages, [number % 8])}, float(number))
                recorder._database = Interrupted(number)  # type: ignore[assignment]  # as much of it as the recorder uses
                with contextlib.suppress(InterruptedHere):
                    recorder.add(found)
                recorder._database = whole
            recorder.mark("end")
    with dirtylog.Recording(path) as recording:
        assert recording.rounds["number"].tolist() == list(range(1, 9))
        assert recording.runs()["first"].tolist() == [number % 8 for number in range(1, 9)]


def test_names_of_any_octets_come_back(tmp_path: Path) -> None:
    name = os.fsdecode(b"/tmp/\xff\xfe\n</script>")
    slot = dirtylog.MemorySlot(3, 5, 100, name=name, permissions="rw-p", file_offset=4096, host_address=0x5000)
    with dirtylog.track(bytearray(4096)) as log, dirtylog.Recorder(tmp_path / "a.dlog", log.memory) as recorder:
        recorder.add(Round(1, 1.0, 0.0, {slot: dirtylog.DirtyBitmap.from_pages(100, [99])}, 0.0))
    with dirtylog.Recording(tmp_path / "a.dlog") as recording:
        (again,) = recording.slots
        assert (again.name, again.permissions, again.file_offset, again.host_address) == (name, "rw-p", 4096, 0x5000)


# --- files that exist


def test_a_file_is_replaced_only_when_that_is_said(tmp_path: Path) -> None:
    path = recorded(tmp_path, [[1]])
    with dirtylog.track(bytearray(4096)) as log:
        with pytest.raises(dirtylog.InvalidArgumentError, match="exists; choose another name, or replace it"):
            dirtylog.Recorder(path, log.memory)
        with dirtylog.Recorder(path, log.memory, overwrite=True) as recorder:
            with pytest.raises(dirtylog.InvalidArgumentError, match="is being recorded"):
                dirtylog.Recorder(path, log.memory, overwrite=True)
            recorder.mark("still")
    with dirtylog.Recording(path) as recording:
        assert (len(recording.rounds), recording.marks[0].text) == (0, "still")


def test_a_journal_that_an_earlier_file_left_is_not_played_into_a_new_one(tmp_path: Path) -> None:
    path, old = tmp_path / "new.dlog", tmp_path / "old"
    with contextlib.closing(sqlite3.connect(old, isolation_level=None)) as database:
        database.execute("PRAGMA cache_size=1")
        database.execute("CREATE TABLE big (data)")
        database.execute("INSERT INTO big VALUES (zeroblob(100000))")
        database.execute("BEGIN")
        database.execute("UPDATE big SET data = randomblob(100000)")
        (tmp_path / "new.dlog-journal").write_bytes((tmp_path / "old-journal").read_bytes())
        assert (tmp_path / "new.dlog-journal").stat().st_size > 4096
    assert read_all(recorded(tmp_path, [[1], [2]], "new.dlog")) == [1, 2]
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, old.name]


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with dirtylog.track(bytearray(4096)) as log, pytest.raises(dirtylog.InvalidArgumentError, match=r"no/such.*cannot be written"):
        dirtylog.Recorder(tmp_path / "no/such", log.memory)


# --- what is no recording, or a damaged one


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    text, other, empty = tmp_path / "a.txt", tmp_path / "b.db", tmp_path / "empty"
    text.write_text("round,seconds\n" * 1000)
    empty.write_bytes(b"")
    with contextlib.closing(sqlite3.connect(other)) as database:
        database.execute("CREATE TABLE rounds (a)")
    for path, why in (
        (text, "not an SQLite file"),
        (other, "another program's"),
        (empty, "no recording"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(dirtylog.InvalidArgumentError, match=why):
            dirtylog.Recording(path)
    with pytest.raises(dirtylog.InvalidArgumentError, match="no file"):
        dirtylog.Recording(tmp_path / "none")


def test_a_newer_recording_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = recorded(tmp_path, [[1]])
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute(f"PRAGMA user_version={VERSION + 1}")
    with pytest.raises(dirtylog.UnsupportedError, match="newer dirtylog"):
        dirtylog.Recording(path)


def read_all(path: Path) -> list[int]:
    with dirtylog.Recording(path) as recording:
        json.dumps(recording.facts)
        recording.footprint()
        return list(recording.runs()["first"].tolist())


def test_a_truncated_recording_is_damaged_wherever_it_ends(tmp_path: Path) -> None:
    path = recorded(tmp_path, [[page % 16, (page * 7) % 16] for page in range(300)])
    whole, expected = path.read_bytes(), read_all(path)
    for length in {*range(0, len(whole), 1000), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises((dirtylog.CorruptDataError, dirtylog.InvalidArgumentError)):
            read_all(path)
    path.write_bytes(whole)
    assert read_all(path) == expected


def test_no_flipped_bit_changes_what_a_round_had(tmp_path: Path) -> None:
    path = recorded(tmp_path, [[page % 16, (page * 7) % 16] for page in range(60)])
    whole, expected = path.read_bytes(), read_all(path)
    random = np.random.default_rng(5)
    noticed = 0
    for at in random.integers(0, 8 * len(whole), 400).tolist():
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        path.write_bytes(flipped)
        try:
            assert read_all(path) == expected
        except dirtylog.DirtyLogError:
            noticed += 1
    # The rest hit free space, or a fact: those have no sum.
    assert noticed > 50


def test_a_round_without_its_checksum_is_named(tmp_path: Path) -> None:
    path = recorded(tmp_path, [[1], [2], [3]])
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("UPDATE rounds SET pages = 2 WHERE round = 2")
        database.commit()
    with dirtylog.Recording(path) as recording:
        assert recording.runs(end=1.1)["first"].tolist() == [1]
        with pytest.raises(dirtylog.CorruptDataError, match="round 2 "):
            recording.runs()

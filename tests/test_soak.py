"""A short soak of every source; and the oracle: where a bit is taken out of each get on purpose, it says that pages are lost."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest

import soak as command
from dirtylog import DirtyBitmap, DirtyLog
from dirtylog.emulated.arch.arm64 import Arm64Port
from oracle import Copy
from scene import SLOT, Scene
from soak_sources import SOURCES, missing, soak
from soak_tally import Tally, document, table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dirtylog import MemorySlot

# A descriptor that an interrupt catches between its opening and its owner is the garbage collector's to close, and it says so.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

SECONDS = 0.4
TRIES = 8


@pytest.mark.parametrize("source", SOURCES)
def test_a_short_soak_loses_nothing(source: str) -> None:
    tally = soak(source, random.randrange(1 << 32), SECONDS)
    if tally.skipped is not None:
        pytest.skip(tally.skipped)
    print(table([tally]))
    assert tally.error is None, tally.error
    assert tally.lost == 0, table([tally])
    assert tally.reports > 0
    assert tally.compared > 0
    assert tally.stops > 0


def test_it_ends_when_enough_was_reported() -> None:
    tally = soak("loongarch", 1, 3600.0, reports=1)
    assert tally.reports > 0
    assert tally.error is None


# --- the oracle


def forgetful(deliver: Callable[..., None]) -> Callable[..., None]:
    """Return a mutant of ``DirtyLog._deliver`` that keeps the first page of each snapshot to itself."""

    def deliver_less(log: DirtyLog, slot: MemorySlot, snapshot: DirtyBitmap, **out: Any) -> None:
        deliver(log, slot, DirtyBitmap.from_pages(slot.npages, snapshot.pages()[1:]), **out)

    return deliver_less


@pytest.mark.parametrize("source", ["arm64", "ia64", "kvm-bitmap", "buffer-uffd", "buffer-compare"])
def test_a_bit_that_is_taken_out_of_each_get_is_noticed(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if (reason := missing(source)) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(DirtyLog, "_deliver", forgetful(DirtyLog._deliver))
    path = tmp_path / "soak.json"
    # One bit of each get is little: now and then all that are missing come again before there is a stop.
    words = ["--seconds", "0.5", "--sources", source, "--json", str(path)]
    assert any(command.main(words) for _ in range(TRIES)), "no page was lost"
    [found] = json.loads(path.read_text(encoding="utf-8"))["sources"]
    assert found["error"] is None
    assert found["lost"] > 0
    assert found["lost_pages"]
    assert not found["good"]


def test_the_oracle_names_the_page_that_was_not_reported_and_counts_it_once() -> None:
    scene, copy = Scene(Arm64Port), Copy("get")
    copy.begin(scene.slot, scene.contents())
    with DirtyLog(scene.memory) as log:
        for page in (3, 64, 130):
            scene.store(page)
        reported = log.get(SLOT) - DirtyBitmap.from_pages(scene.slot.npages, [64])
        copy.take(scene.slot, reported.pages(), scene.memory.read(SLOT, reported.pages()))
        copy.compare(scene.slot, 0, scene.contents())
        copy.compare(scene.slot, 0, scene.contents())
    [lost] = copy.lost
    assert (lost.reader, lost.slot, lost.page, lost.differs_from, lost.there, lost.copied) == ("get", scene.slot, 64, 0, 2, 0)
    assert "page 64 of the 131" in str(lost)
    assert (copy.reports, copy.false_positives, copy.compared) == (2, 0, 2 * 131)


def test_the_oracle_finds_a_page_in_a_piece_and_in_a_slot_that_it_never_met() -> None:
    scene, copy = Scene(Arm64Port), Copy("get")
    scene.store(70)
    copy.compare(scene.slot, 64, scene.contents()[64:])
    assert [lost.page for lost in copy.lost] == [70]


def test_a_report_of_what_has_not_changed_is_a_false_positive() -> None:
    scene, copy = Scene(Arm64Port), Copy("get")
    scene.store(1)
    pages = DirtyBitmap.from_pages(scene.slot.npages, [1, 2]).pages()
    copy.take(scene.slot, pages, scene.memory.read(SLOT, pages))
    assert (copy.reports, copy.false_positives) == (2, 1)
    copy.keep(())
    copy.compare(scene.slot, 1, scene.contents()[1:2])
    assert [lost.page for lost in copy.lost] == [1], "a slot that was forgotten begins with zeros again"


# --- what it says


def test_a_source_that_is_skipped_is_listed_and_does_not_count_as_passed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("soak_sources.missing", lambda _source: "it is not here")
    path = tmp_path / "soak.json"
    assert command.main(["--seconds", "0.1", "--sources", "arm64,mips", "--json", str(path)]) == 1, "nothing ran"
    said = capsys.readouterr().out
    assert "SKIPPED arm64: it is not here" in said
    assert "0 of 2 sources ran" in said
    assert [each["skipped"] for each in json.loads(path.read_text(encoding="utf-8"))["sources"]] == ["it is not here"] * 2


def test_what_goes_wrong_is_the_result_of_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ValueError("on purpose")

    monkeypatch.setattr(DirtyLog, "start", fails)
    tally = soak("arm64", 1, 0.1)
    assert tally.error is not None
    assert "on purpose" in tally.error
    assert not tally.good
    assert "FAILED arm64 (seed 1)" in table([tally])


def test_the_table_and_the_document_say_the_same() -> None:
    tally = Tally("arm64", 7, port="arm64", seconds=1.23456, writes=1234, reports=5678, lost=1, lost_pages=["page 3"])
    tally.failures["toggle"] += 2
    said = table([tally])
    for text in ("1,234", "5,678", "LOST arm64 (seed 7): page 3", "1 of 1 sources ran: 5,678 page reports, 1 pages lost"):
        assert text in said
    [found] = json.loads(document([tally], 7))["sources"]
    assert (found["writes"], found["reports"], found["seconds"], found["failures"]) == (1234, 5678, 1.235, {"toggle": 2})


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(SystemExit, match="no source is named"):
        command.main(["--sources", "vax"])

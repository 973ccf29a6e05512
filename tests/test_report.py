"""The page as a file, and the command that makes it; test_report_browser.py opens the page."""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import zlib
from typing import TYPE_CHECKING, Any

import pytest

from dirtylog import MemorySlot, Recording
from dirtylog.cli import main
from dirtylog.report.page import page
from recorded import recorded

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

HOSTILE = "</script><img src=x onerror=alert(1)>"
GUEST = MemorySlot(0, 0, 64)


# --- the page


def hostile(tmp_path: Path) -> Path:
    slots = [GUEST, MemorySlot(1, 100, 10, name=HOSTILE, permissions="rw-p")]
    return recorded(
        tmp_path / "hostile.dlog", slots, [{0: [1, 2]}, {1: [3]}], target=HOSTILE, marks={1: HOSTILE}, incomplete=(HOSTILE,)
    )


def made(path: Path, **options: Any) -> str:
    pytest.importorskip("plotly", reason="Plotly is not installed")
    with Recording(path) as recording:
        return page(recording, **options)


def head_of(text: str) -> dict[str, Any]:
    data = re.search(r'id="data">([^<]*)<', text)
    assert data is not None
    packed = zlib.decompress(base64.b64decode(data[1]))
    head = json.loads(packed[4 : 4 + int.from_bytes(packed[:4], "little")])
    assert isinstance(head, dict)
    return head


def test_nothing_of_a_stranger_stands_in_the_html(tmp_path: Path) -> None:
    text = made(hostile(tmp_path))
    assert "onerror" not in text
    head = head_of(text)
    assert (head["facts"]["target"], head["regions"][1]["name"], head["marks"][0][1]) == (HOSTILE, HOSTILE, HOSTILE)
    assert head["facts"]["incomplete"] == [HOSTILE]


def test_the_page_names_no_other_place_and_may_load_nothing(tmp_path: Path) -> None:
    text = made(hostile(tmp_path))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy[1].split(";")[1]
    assert "unsafe-eval" not in policy[1]
    assert not re.search(r"\b(src|href)\s*=|https?://", text)


def test_a_recording_beyond_the_limit_is_made_coarser_and_the_page_says_so(tmp_path: Path) -> None:
    path = recorded(tmp_path / "long.dlog", [MemorySlot(0, 0, 5000)], [{0: range(0, 5000, 3)} for _ in range(4)])
    assert (head_of(made(path))["merged_pages"], head_of(made(path))["merged_rounds"]) == (0, 0)
    head = head_of(made(path, max_runs=500))
    assert head["merged_pages"] > 0
    assert head["runs"] == 4 * 1667


# --- the command


def report(path: Path, output: Path, *options: str) -> int:
    return main(["report", str(path), "-o", str(output), *options])


@pytest.mark.parametrize("suffix", [".html", ".png", ".svg", ".pdf"])
def test_the_suffix_says_what_is_made(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("plotly" if suffix == ".html" else "matplotlib", reason="the extra is not installed")
    path = recorded(tmp_path / "run.dlog", [GUEST], [{0: range(number)} for number in range(1, 9)], marks={3: "here"})
    output = tmp_path / f"out{suffix}"
    assert report(path, output) == 0
    assert output.read_bytes().startswith({".html": b"<!DO", ".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [output.name, "run.dlog"]


@pytest.mark.parametrize("name", ["out.txt", "out", "html"])
def test_another_suffix_is_a_usage_error(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = recorded(tmp_path / "run.dlog", [GUEST], [{0: [1]}])
    assert report(path, tmp_path / name) == 2
    assert ".html, .png, .svg, .pdf" in capsys.readouterr().err


def test_a_file_is_replaced_when_told_so_only(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    path = recorded(tmp_path / "run.dlog", [GUEST], [{0: [1]}])
    output = tmp_path / "out.svg"
    output.write_text("precious")
    assert report(path, output) == 2
    assert output.read_text() == "precious"
    assert report(path, output, "-f") == 0
    assert output.read_text().startswith("<?xml")


def test_what_may_have_missed_writes_does_not_exit_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    path = recorded(tmp_path / "run.dlog", [GUEST], [{0: [1]}], incomplete=("a ring overflowed",))
    assert report(path, tmp_path / "out.svg") == 6
    assert "writes may have been missed: a ring overflowed" in capsys.readouterr().err


def test_a_recording_that_goes_on_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    path = recorded(tmp_path / "run.dlog", [GUEST], [{0: [1]}], status=None)
    assert report(path, tmp_path / "out.svg") == 0
    assert "was not ended" in capsys.readouterr().err


@pytest.mark.parametrize("rounds", [[], [{}], [{0: [7]}]])
@pytest.mark.parametrize("suffix", [".html", ".svg"])
def test_however_little_was_recorded_there_is_a_report(tmp_path: Path, rounds: list[dict[int, Iterable[int]]], suffix: str) -> None:
    pytest.importorskip("plotly" if suffix == ".html" else "matplotlib", reason="the extra is not installed")
    assert report(recorded(tmp_path / "run.dlog", [GUEST], rounds, marks={1: "$x^2"}), tmp_path / f"out{suffix}") == 0


@pytest.mark.parametrize(("module", "suffix", "extra"), [("plotly.offline", ".html", "report"), ("matplotlib", ".png", "plot")])
def test_a_missing_extra_is_named(
    tmp_path: Path, module: str, suffix: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    path = recorded(tmp_path / "run.dlog", [GUEST], [{0: [1]}])
    assert report(path, tmp_path / f"out{suffix}") == 3
    assert f"pip install 'dirtylog[{extra}]'" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.dlog"]


def test_what_cannot_be_written_is_told_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    path = recorded(tmp_path / "run.dlog", [GUEST], [{0: [1]}])
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    assert report(path, tmp_path / f"{'x' * (longest - 4)}.svg") == 1
    assert "cannot be written" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.dlog"]


def test_what_is_no_recording_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no recording")
    assert report(tmp_path / "text", tmp_path / "out.html") == 2
    assert report(tmp_path / "nothing", tmp_path / "out.html") == 2

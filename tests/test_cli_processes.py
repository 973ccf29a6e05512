"""Processes on the command line, run as a user runs it: what a run of one reports, and how it is told."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from dirtylog.cli import main
from victims import needs_victims
from writers import (
    ARENA,
    ARENA_MAP,
    NPAGES,
    PAGE,
    SHARED,
    Writer,
    arena_pages,
    command_line,
    dirtylog,
    eventually,
    finish,
    start,
    writer,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = needs_victims

SPUN = {3, 4, 200}
QUICK = ("--rounds", "3", "--interval", "0.05")


@pytest.fixture
def spinner() -> Iterator[Writer]:
    with Writer("store", *(str(page) for page in range(NPAGES)), "spin", *(str(page) for page in SPUN)) as running:
        yield running


# --- what is told


def test_run_prints_one_document_with_what_every_result_names(spinner: Writer) -> None:
    ran = dirtylog("run", f"pid:{spinner.pid}", *QUICK, "--json")
    assert ran.status == 0, ran.err
    assert ran.err == ""
    document = ran.document
    assert document["schema"] == "dirtylog/run/1"
    assert document["target"] == f"pid:{spinner.pid}"
    assert document["pid"] == spinner.pid
    assert (document["port"], document["attached"], document["fallback"]) == ("uffd", "injected", "")
    assert (document["exactness"], document["page_size"]) == ("superset", PAGE)
    assert len(document["blind_spots"]) == 5
    assert document["incomplete"] == []
    assert document["complete"] is True
    assert document["programs"] == 1
    assert document["mappings"] == len(document["slots"])
    assert {skipped["name"] for skipped in document["skipped_mappings"]} <= {"[vsyscall]"}
    slots = {slot["address"]: slot for slot in document["slots"]}
    assert slots[ARENA]["npages"] == NPAGES
    assert slots[ARENA]["base_gfn"] == ARENA // PAGE
    assert (slots[ARENA]["page_size"], slots[ARENA]["name"], slots[ARENA]["permissions"]) == (PAGE, "", "rw-p")
    assert {slot["name"] for slot in slots.values()} >= {"[heap]", "[stack]", writer()}
    assert [found["round"] for found in document["rounds"]] == [1, 2, 3]
    for found in document["rounds"]:
        assert arena_pages(found) == SPUN
        assert found["dirty_by_slot"][str(slots[ARENA]["id"])] == len(SPUN)
        assert found["dirty_pages"] == sum(npages for _, npages in found["runs"]) == sum(found["dirty_by_slot"].values())
        assert found["dirty_bytes"] == PAGE * found["dirty_pages"]
        assert 0 < found["get_seconds"] < 60
    assert document["total"]["dirty_pages"] == sum(found["dirty_pages"] for found in document["rounds"])


def test_run_prints_a_line_a_round_at_once_and_each_complete_in_itself(spinner: Writer) -> None:
    with start("run", f"pid:{spinner.pid}", "--map", ARENA_MAP, "--interval", "0.02", "--rounds", "100000", "--jsonl") as process:
        assert process.stdout is not None
        lines = [json.loads(process.stdout.readline()) for _ in range(5)]
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert finish(process).status == 130
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines:
        assert {"schema", "target", "port", "exactness", "page_size", "blind_spots", "pid", "attached"} <= line.keys()
        base = ARENA // PAGE
        assert line["runs"] == [[base + 3, 2], [base + 200, 1]]


def test_run_prints_a_table_for_people(spinner: Writer) -> None:
    ran = dirtylog("run", f"pid:{spinner.pid}", "--map", "writable", *QUICK)
    assert (ran.status, ran.err) == (0, "")
    head, columns, *rest = ran.out.splitlines()
    what = rf"pid:{spinner.pid}: port uffd \(superset\), page size 4096, \d+ mappings of [0-9.]+ [KM]iB in process {spinner.pid}"
    assert re.fullmatch(what, head)
    assert columns.split() == ["round", "seconds", "dirty", "pages", "MB/s", "runs", "get", "ms"]
    assert [line.split()[0] for line in rest[:4]] == ["1", "2", "3", "total"]
    assert any(line.endswith(" of anonymous rw-p") for line in rest)
    assert sum(line.startswith("mappings ") for line in rest) == 1
    assert sum(line.startswith("blind spot: ") for line in rest) == 5


def test_rounds_are_as_many_and_as_long_as_asked(spinner: Writer) -> None:
    began = time.monotonic()
    ran = dirtylog("run", f"pid:{spinner.pid}", "--map", ARENA_MAP, "--rounds", "4", "--interval", "0.3", "--json")
    assert time.monotonic() - began > 1.2
    assert [found["seconds"] > 0.29 for found in ran.document["rounds"]] == [True] * 4


def test_pages_written_in_different_rounds_are_told_apart() -> None:
    with Writer() as target, start("run", f"pid:{target.pid}", "--map", ARENA_MAP, "--interval", "0.2", "--jsonl") as process:
        assert process.stdout is not None
        process.stdout.readline()
        target.order("store 7 8 9 100")
        lines = [json.loads(line) for line in process.stdout]
        assert finish(process).status == 0
        assert [arena_pages(line) for line in lines if line["runs"]] == [{7, 8, 9, 100}]


def test_a_heat_map_of_the_mapping_that_is_written_most(tmp_path: Path, spinner: Writer) -> None:
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    picture = tmp_path / "heat.png"
    arguments = ("run", f"pid:{spinner.pid}", *QUICK, "--heatmap", str(picture))
    ran = dirtylog(*arguments)
    assert (ran.status, ran.err) == (0, f"wrote {picture}\n")
    assert picture.read_bytes().startswith(b"\x89PNG")
    refused = dirtylog(*arguments)
    assert refused.status == 2
    assert "-f" in refused.err
    assert dirtylog(*arguments, "-f").status == 0


def test_a_heat_map_of_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    with Writer() as target:
        picture = tmp_path / "heat.svg"
        ran = dirtylog("run", f"pid:{target.pid}", "--map", ARENA_MAP, *QUICK, "--heatmap", str(picture))
        assert ran.status == 0, ran.err
        assert picture.stat().st_size > 1000


# --- which mappings


def mappings_of(pid: int) -> list[tuple[int, str, str, str]]:
    """Return (address, permissions, inode, name), without what the kernel keeps there."""
    lines = [line.split(maxsplit=5) for line in Path(f"/proc/{pid}/maps").read_text(encoding="ascii").splitlines()]
    found = [(int(span.partition("-")[0], 16), perms, inode, "".join(name)) for span, perms, _, _, inode, *name in lines]
    return [one for one in found if not one[3].startswith(("[v", "[uprobes"))]


KINDS: dict[str, Callable[[int, str, str, str], bool]] = {
    "heap": lambda _address, _permissions, _inode, name: name == "[heap]",
    "stack": lambda _address, _permissions, _inode, name: name == "[stack]",
    "anonymous": lambda _address, permissions, inode, _name: inode == "0" and permissions.endswith("p"),
    "file": lambda _address, _permissions, inode, _name: inode != "0",
    "shared": lambda _address, permissions, _inode, _name: permissions.endswith("s"),
    "private": lambda _address, permissions, _inode, _name: permissions.endswith("p"),
    "writable": lambda _address, permissions, _inode, _name: "w" in permissions,
    ARENA_MAP: lambda address, *_: address == ARENA,
    f"{ARENA + 5 * PAGE:#x}-{ARENA + 5 * PAGE + 1:#x}": lambda address, *_: address == ARENA,
    "*/libc.so*": lambda _address, _permissions, _inode, name: Path(name).name.startswith("libc.so"),
    "[heap*": lambda _address, _permissions, _inode, name: name == "[heap]",
}


@pytest.mark.parametrize("word", KINDS)
def test_a_word_chooses_mappings(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Writer("share") as target:
        wanted = [one[0] for one in mappings_of(target.pid) if KINDS[word](*one)]
        assert wanted
        arguments = ["run", f"pid:{target.pid}", "--map", word, "--rounds", "1", "--interval", "0.01", "--json"]
        assert main(arguments) in (0, 6)
        assert sorted(slot["address"] for slot in json.loads(capsys.readouterr().out)["slots"]) == wanted


def test_several_words_choose_what_one_of_them_chooses(capsys: pytest.CaptureFixture[str]) -> None:
    with Writer("share") as target:
        arguments = ["run", f"pid:{target.pid}", "--map", "heap", "--map", "shared", "--map", "stack", "--rounds", "1", "--json"]
        assert main(arguments) == 6
        names = [slot["name"] for slot in json.loads(capsys.readouterr().out)["slots"]]
        assert set(names) == {"[heap]", "[stack]", "/dev/zero (deleted)"}


def test_a_word_that_chooses_nothing_is_no_quiet_process(capsys: pytest.CaptureFixture[str]) -> None:
    with Writer() as target:
        assert main(["run", f"pid:{target.pid}", "--map", "*/no-such-library*", "--rounds", "1", "--json"]) == 2
        assert "no-such-library" in capsys.readouterr().err


# --- ports


@pytest.mark.parametrize("port", ["auto", "uffd", "compare"])
def test_each_port_reports_what_was_written(port: str, spinner: Writer) -> None:
    ran = dirtylog("run", f"pid:{spinner.pid}", "--port", port, "--map", "anonymous", *QUICK, "--json")
    assert ran.status == 0, ran.err
    document = ran.document
    assert document["port"] == ("uffd" if port == "auto" else port)
    assert document["attached"] == ("not" if port == "compare" else "injected")
    assert document["exactness"] == ("exact" if port == "compare" else "superset")
    assert document["blind_spots"]
    assert [arena_pages(found) for found in document["rounds"]] == [SPUN] * 3


def test_a_target_that_is_stopped_is_compared_and_the_reason_is_said() -> None:
    with Writer() as target:
        os.kill(target.pid, signal.SIGSTOP)
        eventually(lambda: "T (stopped)" in Path(f"/proc/{target.pid}/status").read_text(encoding="ascii"), "it does not stop")
        ran = dirtylog("run", f"pid:{target.pid}", *QUICK)
        assert ran.status == 0, ran.err
        assert "port compare (exact)" in ran.out.splitlines()[0]
        assert ran.out.splitlines()[1].startswith("not the best port: uffd: ")
        assert "is stopped" in ran.out.splitlines()[1]
        os.kill(target.pid, signal.SIGCONT)


# --- targets that change


def test_another_program_in_the_same_process_is_reported_as_new(spinner: Writer) -> None:
    with start("run", f"pid:{spinner.pid}", "--interval", "0.05", "--rounds", "20", "--jsonl") as process:
        assert process.stdout is not None
        before = json.loads(process.stdout.readline())
        spinner.say("exec store 5 6 spin 6 obey")
        ran = finish(process)
    assert spinner.line() == "ready"
    assert ran.status == 0, ran.err
    assert arena_pages(before) == SPUN
    after = [arena_pages(line) for line in ran.lines]
    assert {5, 6} <= set().union(*after), "what the new program has written"
    assert after[-1] == {6}


def test_memory_mapped_in_the_middle_is_reported_as_a_whole() -> None:
    with Writer() as target, start("run", f"pid:{target.pid}", "--interval", "0.1", "--jsonl") as process:
        assert process.stdout is not None
        process.stdout.readline()
        target.order("share")
        ran = finish(process)
        assert ran.status == 6
        assert set().union(*(arena_pages(line, SHARED, 4) for line in ran.lines)) == {0, 1, 2, 3}
        assert "shared" in ran.err


# --- a command


def test_a_command_is_logged_from_its_first_instruction_to_its_last() -> None:
    words = ("early", "store", "3", "sleep", "250", "store", "9")
    ran = dirtylog("run", "--json", "--interval", "0.1", "--", writer(), *words)
    assert ran.status == 0, ran.err
    document = ran.document
    assert (document["attached"], document["port"]) == ("started", "uffd")
    assert document["target"] == " ".join(("--", writer(), *words))
    assert document["complete"] is True
    pages = [arena_pages(found) for found in document["rounds"]]
    assert pages[0] == {3, 255}
    assert {9} in pages[-2:]


def test_the_command_s_exit_status_is_told() -> None:
    ran = dirtylog("run", "--json", "--", writer(), "exit", "3")
    assert ran.status == 0, ran.err
    assert ran.document["status"] == 3


def test_a_command_is_ended_after_as_many_rounds_as_asked() -> None:
    began = time.monotonic()
    ran = dirtylog("run", "--rounds", "2", "--interval", "0.05", "--jsonl", "--", writer(), "spin", "1", "sleep", "60000")
    assert ran.status == 0, ran.err
    assert time.monotonic() - began < 30
    assert len(ran.lines) == 2


def test_options_after_two_dashes_are_the_command_s() -> None:
    ran = dirtylog("run", "--jsonl", "--", "sh", "-c", "echo $0 $@ >&2", "--json", "--", "-x")
    assert ran.status == 0
    assert ran.err == "--json -- -x\n"


@pytest.mark.parametrize("port", ["compare", "uffd"])
def test_a_command_on_another_port(port: str) -> None:
    ran = dirtylog(
        *("run", "--port", port, "--json", "--interval", "0.1", "--", writer(), "spin", "5", "sleep", "450", "store", "9"),
    )
    assert ran.status == 0, ran.err
    assert ran.document["port"] == port
    pages = [arena_pages(found) for found in ran.document["rounds"]]
    assert 5 in pages[1]
    assert 9 in pages[-1] | pages[-2], "at its exit it has a last get"


def test_help_shows_both_ways_to_a_process() -> None:
    ran = dirtylog("run", "--help", env={**os.environ, "COLUMNS": "200"})
    assert ran.status == 0
    for word in ("pid:N", "-- COMMAND", "--port", "--map", "heap, stack, anonymous"):
        assert word in ran.out


def test_a_program_says_what_it_likes_and_reads_what_it_gets() -> None:
    command = command_line("run", "--rounds", "1000", "--", "sh", "-c", "read word; echo said $word")
    answer: Any = subprocess.run(command, input="hello\n", capture_output=True, text=True, check=True, timeout=60)
    assert "said hello\n" in answer.stdout

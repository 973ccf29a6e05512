"""rate, record and export on the command line, run as a user runs them, on every kind of source."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from address_space import ANONYMOUS, SHARED
from cli_targets import GUEST, KINDS, SPIN, named
from dirtylog import Recording
from dirtylog.recording.marks import GUEST_PORT
from kvm_here import needs_kvm
from puppets import Puppet
from victims import needs_victims
from writers import dirtylog, eventually, finish, start

if TYPE_CHECKING:
    from collections.abc import Iterator

QUICK = ("--duration", "400ms", "--interval", "20ms")


@pytest.fixture(params=KINDS)
def target(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    with named(request.param) as words:
        yield words


@contextlib.contextmanager
def running(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A command that runs until it is ended, at the latest here."""
    with start(*words) as process:
        try:
            yield process
        finally:
            process.kill()


# --- rate


def test_rate_measures_predicts_and_tells_its_own_cost(target: list[str]) -> None:
    ran = dirtylog("rate", *QUICK, "--json", "--bandwidth", "1Gbit", "--downtime", "300ms", *target)
    assert ran.status == 0, ran.err
    document = ran.document
    assert document["schema"] == "dirtylog/rate/1"
    assert document.keys() >= {"port", "exactness", "page_size", "blind_spots", "incomplete", "complete"}
    curve = document["curve"]
    assert curve[0]["windows"] == document["rounds"]
    assert [point["seconds"] for point in curve] == sorted(point["seconds"] for point in curve)
    assert [point["bytes"] for point in curve] == sorted(point["bytes"] for point in curve)
    assert 0 < curve[0]["bytes"] <= curve[-1]["bytes"] == document["working_set_bytes"] <= 1 << 30
    assert curve[-1]["seconds"] == pytest.approx(document["seconds"])
    assert curve[0]["standard_error"] >= 0
    assert curve[-1]["standard_error"] is None
    migration = document["migration"]
    assert (migration["bandwidth"], migration["downtime_limit"]) == (1.25e8, 0.3)
    assert migration["converges"]
    assert migration["downtime"] <= 0.3
    assert migration["nbytes"] >= document["memory_bytes"] > 0
    cost = document["cost"]
    assert 0 < cost["get_seconds"] < 60
    assert cost["get_share"] == pytest.approx(cost["get_seconds"] / document["seconds"])
    assert cost["faults"] is None or cost["faults"] >= 0


def test_rate_prints_a_line_a_window_and_what_a_migration_would_cost() -> None:
    ran = dirtylog("rate", "emu:riscv:hotset", *GUEST, *QUICK, "--bandwidth", "10Gbit")
    assert ran.status == 0
    assert ran.err == ""
    lines = ran.out.splitlines()
    assert lines[0] == "emu:riscv:hotset: port riscv (exact), page size 4096"
    assert re.fullmatch(r" +\d+(\.\d+)? ms +\d+(\.\d)? KiB +\d+\.\d % +\d+\.\d +\d+", lines[2])
    assert re.search(
        r"^pre-copy at 10 Gbit/s with at most 300 ms of downtime: 1 round, .* sent in .* would do$", ran.out, re.MULTILINE
    )
    assert re.search(r"^cost of logging: gets took .* % of the time; \d+ pages were armed again", ran.out, re.MULTILINE)
    assert "blind spot: " in ran.out


def test_rate_says_what_would_converge_where_the_limit_does_not() -> None:
    ran = dirtylog("rate", "emu:arm64:random", *GUEST, *QUICK, "--bandwidth", "10Mbit", "--downtime", "1ms", "--json")
    migration = ran.document["migration"]
    assert (migration["converges"], migration["seconds"], migration["nbytes"]) == (False, None, None)
    # A window that wrote all memory: to send that once more is the least.
    assert migration["smallest_downtime"] == pytest.approx((2 << 20) / 1.25e6, rel=0.1)
    text = dirtylog("rate", "emu:arm64:random", *GUEST, *QUICK, "--bandwidth", "10Mbit", "--downtime", "1ms").out
    assert "does not converge; the smallest downtime that would is 1." in text


def test_rate_of_an_idle_guest_is_nothing() -> None:
    document = dirtylog("rate", "emu:s390:idle", *GUEST, *QUICK, "--json").document
    assert document["working_set_bytes"] == 0
    assert document["migration"]["rounds"] == 1
    assert document["migration"]["downtime"] == 0


# --- record and export


def test_record_export_and_the_reader_agree(target: list[str], tmp_path: Path) -> None:
    path = tmp_path / "run.dlog"
    ran = dirtylog("record", "-o", str(path), *QUICK, *target)
    assert ran.status == 0, ran.err
    assert f"wrote {path}: " in ran.out
    assert "blind spot: " in ran.out
    lines = dirtylog("export", str(path), "--to", "csv").out
    rows = list(csv.DictReader(lines.splitlines()))
    found = [json.loads(line) for line in dirtylog("export", str(path), "--to", "jsonl").out.splitlines()]
    with Recording(path) as recording:
        assert recording.facts["status"] == 0
        assert 10 < len(recording.rounds) < 30
        runs = recording.runs()
        assert len(runs) == len(rows) > 0
        numbers = recording.rounds["number"][runs["round"]]
        for row, run, number in zip(rows, runs.tolist(), numbers.tolist(), strict=True):
            slot = recording.slots[run[1]]
            assert (int(row["round"]), int(row["slot"]), row["name"]) == (number, slot.id, slot.name)
            assert int(row["first_gfn"]) == slot.base_gfn + run[2]
            assert int(row["address"]) == slot.host_address + run[2] * slot.page_size
            assert int(row["npages"]) == run[3]
        assert found[0]["schema"] == "dirtylog/recording/1"
        assert found[0].items() >= recording.facts.items()
        assert [one["round"] for one in found[1:]] == recording.rounds["number"].tolist()
        assert [sum(n for runs in one["runs"].values() for _, n in runs) for one in found[1:]] == recording.rounds["pages"].tolist()
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
        assert dirtylog("export", str(path), "--to", "parquet", "-o", str(tmp_path / "run.parquet")).status == 0
        table = parquet.read_table(tmp_path / "run.parquet")
        assert table["round"].to_pylist() == numbers.tolist()
        assert table["npages"].to_pylist() == runs["npages"].tolist()
        assert table["name"].to_pylist() == [row["name"] for row in rows]
        assert json.loads(table.schema.metadata[b"dirtylog"])["port"] == recording.facts["port"]
    assert {path.name for path in tmp_path.iterdir()} == {"run.dlog", "run.parquet"}


def test_a_recording_of_nothing_exports_to_every_format(tmp_path: Path) -> None:
    path = tmp_path / "idle.dlog"
    assert dirtylog("record", "-o", str(path), *QUICK, "emu:arm:idle", *GUEST).status == 0
    assert len(dirtylog("export", str(path), "--to", "csv").out.splitlines()) == 1
    assert dirtylog("export", str(path), "--to", "parquet", "-o", str(tmp_path / "a.parquet")).status == 0
    assert dirtylog("export", str(path), "--to", "csv", "-o", str(tmp_path / "a.csv")).status == 0
    assert (tmp_path / "a.csv").read_text().startswith("round,began,")


def test_an_interrupted_recording_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.dlog"
    with running("record", "-o", str(path), "emu:mips:sweep", *GUEST, "--interval", "10ms") as process:
        eventually(lambda: rounds_in(path) > 3, "some rounds")
        process.send_signal(signal.SIGINT)
        ended = finish(process)
    assert ended.status == 130
    assert "Traceback" not in ended.err
    with Recording(path) as recording:
        assert recording.facts["status"] == 130
        told = re.search(r": (\d+) rounds", ended.out)
        assert told is not None
        # The interrupt may come between the two.
        assert 0 <= len(recording.rounds) - int(told[1]) <= 1


def rounds_in(path: Path) -> int:
    try:
        with Recording(path) as recording:
            return len(recording.rounds)
    except ValueError:
        return 0  # it is being made


def test_of_a_target_that_vanishes_what_was_gathered_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.dlog"
    spinner = subprocess.Popen([sys.executable, "-c", SPIN])
    with spinner, running("record", "-o", str(path), f"pid:{spinner.pid}", "--interval", "10ms") as process:
        eventually(lambda: rounds_in(path) > 3, "some rounds")
        spinner.kill()
        ended = finish(process)
    assert ended.status == 5
    assert f"process {spinner.pid} has ended" in ended.err
    with Recording(path) as recording:
        assert recording.facts["status"] == 5
        assert len(recording.rounds) > 3
    port = free_port()
    spinner = subprocess.Popen([sys.executable, "-c", SPIN])
    with spinner, running("rate", f"pid:{spinner.pid}", "--json", "--metrics", str(port)) as process:
        eventually(lambda: scraped(port).get("dirtylog_rounds_total", 0) > 3, "some rounds")
        spinner.kill()
        ended = finish(process)
    assert ended.status == 5
    assert ended.document["complete"] is False
    assert ended.document["rounds"] > 3


def test_a_full_disk_ends_a_recording_with_a_clear_error(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("mounting a small disk takes root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)], check=True)
    try:
        path = tmp_path / "full.dlog"
        ran = dirtylog("record", "-o", str(path), "buffer:random", "--size", "64MiB", "--interval", "2ms", "--duration", "30s")
        assert ran.status == 1
        assert re.fullmatch(
            r"dirtylog: the recording '.*full.dlog' cannot be written; .*full; the rounds before are in it\n", ran.err
        )
        with Recording(path) as recording:
            assert len(recording.rounds) > 3
            assert recording.runs()["npages"].sum() == recording.rounds["pages"].sum()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@needs_victims
def test_a_gap_that_is_over_before_the_end_is_told_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "run.dlog"
    with Puppet() as puppet:
        shared = puppet.map(4, SHARED | ANONYMOUS)
        with running("record", "-o", str(path), f"pid:{puppet.pid}", "--rounds", "20", "--interval", "0.1") as process:
            eventually(lambda: rounds_in(path) > 1, "two rounds")
            puppet.unmap(shared, 4)
            ended = finish(process)
    assert ended.status == 6
    assert "shared" in ended.err
    assert "incomplete: " not in ended.out
    with Recording(path) as recording:
        assert "shared" in recording.facts["incomplete"][0]
        assert recording.facts["status"] == 6


# --- marks


def test_lines_written_to_the_pipe_are_marks(tmp_path: Path) -> None:
    path, pipe = tmp_path / "run.dlog", tmp_path / "marks"
    with running("record", "-o", str(path), "emu:arm:sweep", *GUEST, "--interval", "10ms", "--marks", str(pipe)) as process:
        eventually(lambda: rounds_in(path) > 1, "two rounds")
        with pipe.open("w") as out:
            out.write("one\n\n")
        with pipe.open("wb") as raw:
            raw.write(b"two \xff\n" + b"x" * 5000 + b"\n")
        eventually(lambda: len(marks_in(path)) == 3, "three marks")
        process.send_signal(signal.SIGINT)
        assert finish(process).status == 130
    assert marks_in(path) == ["one", "two \ufffd", "x" * 1000]
    assert not pipe.exists()


def marks_in(path: Path) -> list[str]:
    with Recording(path) as recording:
        return [mark.text for mark in recording.marks]


@needs_kvm
def test_what_a_guest_writes_to_its_port_is_a_mark(tmp_path: Path) -> None:
    image, path = tmp_path / "guest.bin", tmp_path / "run.dlog"
    # mov al, character; out 0xe9, al; and at last hlt.
    image.write_bytes(b"".join(bytes([0xB0, character, 0xE6, GUEST_PORT]) for character in b"boot\nready\n") + b"\xf4")
    ran = dirtylog("record", "-o", str(path), "kvm", "--image", str(image), "--load", "0x1000", *GUEST, *QUICK)
    assert ran.status == 0, ran.err
    assert marks_in(path) == ["boot", "ready"]
    with Recording(path) as recording:
        assert recording.facts["image"] == str(image)


# --- metrics


def free_port() -> int:
    import socket  # noqa: PLC0415 - here alone

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scraped(port: int) -> dict[str, float]:
    """What Prometheus reads, by its own parser."""
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus-client is not installed")
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    return {
        sample.name + (sample.labels.get("le", "") and "@" + sample.labels["le"]): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_are_what_the_recording_says(target: list[str], tmp_path: Path) -> None:
    path, port = tmp_path / "run.dlog", free_port()
    words = ["record", "-o", str(path), "--interval", "20ms", "--metrics", str(port), *target]
    with running(*words) as process:
        eventually(lambda: scraped(port).get("dirtylog_rounds_total", 0) >= 5, "five rounds")
        before = time.perf_counter()
        found = scraped(port)
        assert time.perf_counter() - before < 60
        process.send_signal(signal.SIGINT)
        ended = finish(process)
    assert ended.status == 130, ended.err
    with Recording(path) as recording:
        rounds = recording.rounds[: int(found["dirtylog_rounds_total"])]
        assert found["dirtylog_dirty_pages_total"] == rounds["pages"].sum()
        assert found["dirtylog_dirty_bytes_total"] == rounds["nbytes"].sum()
        assert found["dirtylog_dirty_rate_bytes_per_second"] == pytest.approx(rounds["nbytes"][-1] / rounds["seconds"][-1])
        assert found["dirtylog_get_seconds_sum"] == pytest.approx(rounds["get_seconds"].sum())
        assert found["dirtylog_get_seconds_count"] == found["dirtylog_get_seconds_bucket@+Inf"] == len(rounds)
        end = float(rounds["began"][-1] + rounds["seconds"][-1])
        assert found["dirtylog_working_set_bytes"] == recording.footprint(end=end + 1e-6).nbytes[-1]
        assert found["dirtylog_coverage_lost"] == 0
        assert found["dirtylog_target_info"] == 1


def test_metrics_are_served_on_loopback_only_and_a_port_in_use_is_told(tmp_path: Path) -> None:
    port = free_port()
    with running("record", "-o", str(tmp_path / "a"), "emu:arm:idle", *GUEST, "--metrics", str(port)) as process:
        eventually(lambda: bool(scraped(port)), "an answer")
        listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"]
        assert f"0100007F:{port:04X}" in listening
        assert f"00000000:{port:04X}" not in listening
        ran = dirtylog("rate", "emu:arm:idle", "--metrics", str(port))
        assert ran.status == 2
        assert ran.err == f"dirtylog: metrics cannot be served on 127.0.0.1 port {port}; Address already in use\n"
        process.send_signal(signal.SIGINT)
        finish(process)


# --- bad input


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("recorded") / "good"
    assert dirtylog("record", "emu:arm:random", *GUEST, "--rounds", "40", "--interval", "2ms", "-o", str(path)).status == 0
    return path.read_bytes()


@pytest.mark.parametrize(
    ("words", "status", "why"),
    [
        (["rate", "emu:arm", "--bandwidth", "10"], 2, "write a number above 0 and its unit, such as 10Gbit"),
        (["rate", "emu:arm", "--bandwidth", "10Gb"], 2, "such as 10Gbit"),
        (["rate", "emu:arm", "--bandwidth", "0Gbit"], 2, "above 0"),
        (["rate", "emu:arm", "--downtime", "3 parsecs"], 2, "must be a number of seconds above 0, or a time such as 300ms"),
        (["rate", "emu:arm", "--duration", "-1"], 2, "above 0"),
        (["rate", "emu:arm", "--metrics", "99999"], 2, "must be the number of a TCP port"),
        (["rate"], 2, "no TARGET"),
        (["record", "emu:arm"], 2, "required: -o"),
        (["record", "emu:arm", "-o", "{tmp}/there"], 2, "there' exists; choose another name, or replace it with -f"),
        (["record", "emu:arm", "-o", "{tmp}/no/file"], 2, "cannot be written"),
        (["record", "emu:arm", "-o", "{tmp}/a", "--marks", "{tmp}/there"], 2, "is no named pipe"),
        (["export", "{tmp}/there", "--to", "csv"], 2, "is no recording"),
        (["export", "{tmp}/none", "--to", "csv"], 2, "there is no file"),
        (["export", "{tmp}/there", "--to", "xml"], 2, "invalid choice"),
        (["export", "{tmp}/good", "--to", "parquet"], 2, "name a file with -o"),
        (["export", "{tmp}/good", "--to", "csv", "-o", "{tmp}/there"], 2, "exists"),
        (["export", "{tmp}/cut", "--to", "csv"], 7, "is damaged"),
        (["export", "{tmp}/cut", "--to", "csv", "-o", "{tmp}/new.csv"], 7, "is damaged"),
    ],
)
def test_bad_input_is_told_in_a_sentence(words: list[str], status: int, why: str, tmp_path: Path, recorded: bytes) -> None:
    (tmp_path / "there").write_text("something else")
    (tmp_path / "good").write_bytes(recorded)
    (tmp_path / "cut").write_bytes(recorded[: len(recorded) // 2])
    before = set(tmp_path.iterdir())
    ran = dirtylog(*(word.format(tmp=tmp_path) for word in words))
    assert (ran.status, why in ran.err) == (status, True), ran.err
    assert "Traceback" not in ran.err
    assert (tmp_path / "there").read_text() == "something else"
    assert set(tmp_path.iterdir()) - {tmp_path / "a"} == before


def test_bandwidths_and_times_are_read_with_their_units() -> None:
    from dirtylog.size import format_seconds, parse_bandwidth, parse_seconds  # noqa: PLC0415 - here alone

    assert [parse_bandwidth(text) for text in ("10Gbit", "10Gbit/s", "8kbps", "1.5MB/s", "1MiB", "3")[:-1]] == [
        *(1.25e9, 1.25e9, 1000.0, 1.5e6, float(1 << 20)),
    ]
    assert [parse_seconds(text) for text in ("10", "300ms", "5min", "1h", "20us")] == [10, 0.3, 300, 3600, pytest.approx(2e-5)]
    assert [format_seconds(time) for time in (0.0, 0.00002, 0.9996, 0.0123, 12.345, 1234.5)] == [
        *("0 us", "20 us", "1 s", "12.3 ms", "12.3 s", "1234 s"),
    ]
    assert math.isclose(parse_bandwidth(2.5), 2.5)
    assert np.isfinite(parse_bandwidth("0.1bit"))

"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from dirtylog.cli import COMMANDS, main, parser
from dirtylog.cli.exits import ExitCode, exit_code_of
from dirtylog.emulated.arch import PORTS
from dirtylog.errors import (
    AccessDeniedError,
    CorruptDataError,
    CoverageLostError,
    DirtyLogError,
    InvalidArgumentError,
    TargetGoneError,
    UnsupportedError,
)
from dirtylog.kvm.memory import PORTS as KVM_PORTS
from kvm_here import missing_kvm

if TYPE_CHECKING:
    from pathlib import Path


def dirtylog(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dirtylog", *arguments], capture_output=True, text=True, check=False, timeout=100, **options
    )


@pytest.mark.parametrize("arch", PORTS)
def test_run_prints_one_document_with_what_every_result_names(arch: str) -> None:
    result = dirtylog("run", f"emu:{arch}:sweep", "--size", "1MiB", "--rounds", "3", "--interval", "0.02", "--vcpus", "2", "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    document = json.loads(result.stdout)
    assert document["schema"] == "dirtylog/run/1"
    assert document["port"] == arch
    assert document["exactness"] == "exact"
    assert document["page_size"] == 4096
    assert document["blind_spots"]
    assert document["complete"] is True
    assert document["slots"][0] == {"id": 0, "base_gfn": 0, "npages": 256, "readonly": False}
    assert [found["round"] for found in document["rounds"]] == [1, 2, 3]
    for found in document["rounds"]:
        assert found["dirty_pages"] == sum(npages for _, npages in found["runs"])
        assert found["dirty_bytes"] == 4096 * found["dirty_pages"]
        assert 0 < found["seconds"] < 60
        assert 0 < found["get_seconds"] < 60
    assert document["total"]["dirty_pages"] == sum(found["dirty_pages"] for found in document["rounds"]) > 0


def test_run_prints_a_line_a_round_each_complete_in_itself() -> None:
    result = dirtylog("run", "emu:riscv:hotset", "--size", "1MiB", "--rounds", "4", "--interval", "0.02", "--jsonl")
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    assert all(
        {"schema", "port", "exactness", "page_size", "blind_spots", "seconds", "dirty_pages", "runs"} <= line.keys()
        for line in lines
    )
    assert lines[-1]["dirty_pages"] == 8, "a 32nd of 256 pages is hot"


def test_run_prints_a_table_for_people() -> None:
    result = dirtylog("run", "emu:x86:hotset", "--size", "1MiB", "--rounds", "2", "--interval", "0.02")
    assert result.returncode == 0, result.stderr
    head, columns, *rounds, total, counters, blind = result.stdout.splitlines()
    assert head == "emu:x86:hotset: port x86 (exact), page size 4096, 1 MiB, 1 vCPU"
    assert columns.split() == ["round", "seconds", "dirty", "pages", "MB/s", "runs", "get", "ms"]
    assert [line.split()[0] for line in rounds] == ["1", "2"]
    assert total.split()[0] == "total"
    assert counters.startswith("faults ")
    assert blind.startswith("blind spot: ")


def test_an_idle_guest_has_rounds_without_pages() -> None:
    result = dirtylog("run", "emu:mips:idle", "--size", "1MiB", "--rounds", "2", "--interval", "0.01", "--json")
    assert result.returncode == 0
    assert [found["dirty_pages"] for found in json.loads(result.stdout)["rounds"]] == [0, 0]
    assert [found["runs"] for found in json.loads(result.stdout)["rounds"]] == [[], []]


USAGE = [
    (["run", "emu:vax"], "'vax'"),
    (["run", "emu:x86:nap"], "'nap'"),
    (["run", "x86"], "'x86'"),
    (["run", "emu:x86", "--size", "0"], "0 bytes"),
    (["run", "emu:x86", "--size", "5000"], "5000 bytes"),
    (["run", "emu:x86", "--size", "ten"], "'ten'"),
    (["run", "emu:x86", "--size", "999TiB"], "at most"),
    (["run", "emu:x86", "--rounds", "-1"], "'-1'"),
    (["run", "emu:x86", "--rounds", "0"], "'0'"),
    (["run", "emu:x86", "--rounds", "many"], "'many'"),
    (["run", "emu:x86", "--interval", "-0.1"], "'-0.1'"),
    (["run", "emu:x86", "--interval", "nan"], "'nan'"),
    (["run", "emu:x86", "--vcpus", "9"], "9 vCPUs"),
    (["run", "emu:x86", "--json", "--jsonl"], "--json"),
    (["run", "emu:x86", "--entry", "0x10"], "--image"),
    (["run", "emu:x86", "--image", "/no/such/file"], "/no/such/file"),
    (["run", "emu:x86", "--image", "/dev/null", "--load", "-1"], "'-1'"),
    (["run", "emu:x86", "--heatmap", "/no/such/place/a.png"], "/no/such/place"),
    (["run"], "TARGET"),
    ([], "COMMAND"),
    (["fly"], "fly"),
]


@pytest.mark.parametrize(("arguments", "named"), USAGE, ids=[" ".join(words) for words, _ in USAGE])
def test_bad_input_exits_2_and_names_the_value(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(arguments)
    except SystemExit as leave:
        status = leave.code if isinstance(leave.code, int) else 1
    captured = capsys.readouterr()
    assert status == 2
    assert named in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_a_program_that_does_not_fit_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "big"
    image.write_bytes(bytes(8192))
    assert main(["run", "emu:x86", "--size", "4096", "--image", str(image)]) == 2
    assert "8192 bytes does not fit" in capsys.readouterr().err


def test_a_user_s_image_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes.fromhex("48893c2500300000f4"))
    arguments = [
        "run",
        "emu:x86",
        "--size",
        "64KiB",
        "--rounds",
        "2",
        "--interval",
        "0.05",
        "--image",
        str(image),
        "--load",
        "0x1000",
        "--json",
    ]
    assert main(arguments) == 0
    rounds = json.loads(capsys.readouterr().out)["rounds"]
    assert [found["runs"] for found in rounds] == [[[3, 1]], []]


def test_a_guest_fault_exits_1_keeps_what_was_gathered_and_shows_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes.fromhex("48893c2500300000 48893c2500000010".replace(" ", "")))
    arguments = ["run", "emu:x86", "--size", "64KiB", "--rounds", "5", "--interval", "0.05", "--image", str(image), "--json"]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["complete"] is False
    assert document["rounds"][0]["runs"] == [[3, 1]]
    assert "0x10000000" in captured.err
    assert "Traceback" not in captured.err


def test_an_interrupt_exits_130_and_keeps_what_was_gathered() -> None:
    command = [
        sys.executable,
        "-m",
        "dirtylog",
        "run",
        "emu:arm64",
        "--size",
        "1MiB",
        "--rounds",
        "1000",
        "--interval",
        "0.05",
        "--json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    document = json.loads(out)
    assert document["complete"] is False
    assert 0 < len(document["rounds"]) < 1000
    assert "Traceback" not in err


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = [
        sys.executable,
        "-m",
        "dirtylog",
        "run",
        "emu:arm64",
        "--size",
        "1MiB",
        "--rounds",
        "50",
        "--interval",
        "0.01",
        "--jsonl",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode != 0
    assert "Traceback" not in err


def test_a_heat_map_is_written_and_not_over_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    picture = tmp_path / "heat.png"
    arguments = ["run", "emu:x86:hotset", "--size", "1MiB", "--rounds", "3", "--interval", "0.02", "--heatmap", str(picture)]
    assert main(arguments) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    before = picture.stat().st_mtime_ns
    assert main(arguments) == 2
    assert "-f" in capsys.readouterr().err
    assert picture.stat().st_mtime_ns == before
    assert main([*arguments, "-f"]) == 0


def test_check_lists_every_port(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    text = capsys.readouterr().out
    assert all(f"emu:{name} " in text for name in PORTS)
    assert "Unicorn: 2" in text
    assert main(["check", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "dirtylog/check/1"
    assert {port["port"]: port["generic"] for port in document["ports"]} == {
        **dict.fromkeys(("x86", "x86-pml", "arm", "arm64", "mips", "riscv", "loongarch"), "get_dirty_log_protect"),
        **dict.fromkeys(("ppc-hv", "ppc-pv", "s390", "ia64"), "get_dirty_log"),
    }


WITHOUT_UNICORN = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "unicorn":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from dirtylog.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_without_unicorn_check_says_so_run_exits_3_and_trace_guests_run() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", WITHOUT_UNICORN, *arguments], capture_output=True, text=True, check=False, timeout=60
        )

    check = run("check")
    assert check.returncode == 0
    assert "Unicorn: not installed" in check.stdout
    assert check.stdout.count("pip install 'dirtylog[emu]'") == len(PORTS) - 2
    refused = run("run", "emu:arm64", "--rounds", "1")
    assert refused.returncode == 3
    assert "pip install 'dirtylog[emu]'" in refused.stderr
    assert run("run", "emu:ia64", "--size", "1MiB", "--rounds", "1").returncode == 0


def test_the_demo_copies_a_running_guest_on_every_port(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    result = dirtylog("demo", "-o", "heat.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    ports = [*PORTS, *(() if missing_kvm() else (port.name for port in KVM_PORTS.values()))]
    lines = {line.split()[0]: line.split()[-1] for line in result.stdout.splitlines() if line and line.split()[0] in ports}
    assert lines == dict.fromkeys(ports, "yes")
    assert (tmp_path / "heat.png").stat().st_size > 10_000


def test_every_command_has_help_with_an_example_that_works(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One after the other in one folder: some read what others have written.
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        with pytest.raises(SystemExit) as leave:
            parser().parse_args([command.__name__.lower(), "--help"])
        assert leave.value.code == 0
        text = capsys.readouterr().out
        assert command.example in text
    for example in (command.example for command in COMMANDS if "demo" not in command.example):
        assert main(shlex.split(example)[1:]) == 0, example


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DirtyLogError, 1),
        (InvalidArgumentError, 2),
        (UnsupportedError, 3),
        (AccessDeniedError, 4),
        (TargetGoneError, 5),
        (CoverageLostError, 6),
        (CorruptDataError, 7),
    ],
)
def test_each_error_has_its_exit_status(error: type[DirtyLogError], code: int) -> None:
    assert exit_code_of(error("what")) == code
    assert int(ExitCode.INTERRUPTED) == 130


def test_help_needs_no_terminal_and_no_unicorn() -> None:
    result = dirtylog("--help", env={**os.environ, "COLUMNS": "80"})
    assert result.returncode == 0
    assert "130 interrupted" in result.stdout

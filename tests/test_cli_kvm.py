"""KVM guests on the command line, run as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from dirtylog.cli import main
from kvm_here import needs_kvm

if TYPE_CHECKING:
    from pathlib import Path

LOGS = ("bitmap", "manual", "ring")

STORES = bytes.fromhex("bf00001000 b90a000000 48890f 4881c700300000 ffc9 75f2 f4")
"""mov edi, 0x100000; mov ecx, 10; next: mov [rdi], rcx; add rdi, 0x3000; dec ecx; jnz next; hlt."""


def json_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


@needs_kvm
@pytest.mark.parametrize("log", LOGS)
def test_run_logs_a_guest_that_runs_freely(log: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "kvm:hotset", "--log", log, "--vcpus", "2", "--size", "4MiB", "--rounds", "3", "--interval", "0.03"]
    document = json_of(arguments, capsys)
    assert (document["target"], document["port"], document["exactness"]) == ("kvm:hotset", f"kvm-{log}", "superset")
    assert document["page_size"] == 4096
    assert document["vcpus"] == 2
    assert document["complete"] is True
    assert len(document["blind_spots"]) == 3
    assert document["slots"][0] == {"id": 0, "base_gfn": 0, "npages": 1024, "readonly": False}
    assert document["slots"][1]["readonly"] is True
    assert len(document["rounds"]) == 3
    assert document["exits"] >= 2
    assert ("ring_entries" in document) is (log == "ring")
    for found in document["rounds"]:
        assert found["dirty_pages"] == sum(npages for _, npages in found["runs"]) > 0
        assert all(first + npages <= 1024 for first, npages in found["runs"])


@needs_kvm
@pytest.mark.parametrize("log", LOGS)
def test_run_reports_exactly_what_the_guest_stored(log: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "image"
    image.write_bytes(STORES)
    arguments = ["run", "kvm", "--log", log, "--size", "2MiB", "--rounds", "2", "--interval", "0.1"]
    document = json_of([*arguments, "--image", str(image), "--load", "0x1000"], capsys)
    first, second = document["rounds"]
    assert first["runs"] == [[0x100 + 3 * page, 1] for page in range(10)]
    assert second["runs"] == []


@needs_kvm
def test_run_prints_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "kvm", "--log", "ring", "--ring-entries", "4096", "--size", "2MiB", "--rounds", "1", "--interval", "0.02"]
    assert main(arguments) == 0
    head, columns, *_, counters, first, second, third = capsys.readouterr().out.splitlines()
    assert head == "kvm: port kvm-ring (superset), page size 4096, 2 MiB, 1 vCPU"
    assert columns.split()[:3] == ["round", "seconds", "dirty"]
    assert counters.startswith("exits ")
    assert "ring overflows " in counters
    assert all(line.startswith("blind spot: ") for line in (first, second, third))


@needs_kvm
def test_a_guest_that_faults_exits_1_and_keeps_what_was_gathered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "image"
    image.write_bytes(STORES[:-1] + bytes.fromhex("0f0b"))  # ud2 instead of hlt
    arguments = ["run", "kvm", "--size", "2MiB", "--rounds", "5", "--interval", "0.1", "--image", str(image), "--json"]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["complete"] is False
    assert len(document["rounds"][0]["runs"]) == 10
    assert "triple fault" in captured.err
    assert "0x18" in captured.err, "the address of the instruction"
    assert "Traceback" not in captured.err


@needs_kvm
def test_an_interrupt_exits_130_and_keeps_what_was_gathered() -> None:
    command = [sys.executable, "-m", "dirtylog", "run", "kvm", "--log", "ring", "--rounds", "1000", "--interval", "0.05", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    document = json.loads(out)
    assert document["complete"] is False
    assert 0 < len(document["rounds"]) < 1000
    assert "Traceback" not in err


USAGE = [
    (["run", "kvm:nap"], "'nap'"),
    (["run", "kvm", "--log", "paper"], "'paper'"),
    (["run", "kvm", "--backing", "gold"], "'gold'"),
    (["run", "kvm", "--size", "5000"], "5000 bytes"),
    (["run", "kvm", "--size", "900GiB"], "this host has"),
    (["run", "kvm", "--vcpus", "9"], "9 vCPUs"),
    (["run", "kvm", "--log", "ring", "--ring-entries", "1000"], "1000 entries"),
    (["run", "kvm", "--log", "ring", "--ring-entries", "64"], "1024 bytes"),
    (["run", "kvm", "--log", "ring", "--ring-entries", "131072"], "E2BIG"),
    (["run", "kvm", "--ring-entries", "4096"], "goes with log ring"),
    (["run", "kvm", "--halt", "0"], "--image"),
    (["run", "emu:x86", "--log", "ring"], "choices of KVM guests"),
    (["run", "qvm"], "'qvm'"),
]


@needs_kvm
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


@needs_kvm
def test_check_says_what_kvm_can_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    text = capsys.readouterr().out
    assert "KVM: /dev/kvm, interface version 12" in text
    assert all(f"kvm --log {log}" in text for log in LOGS)
    assert main(["check", "--json"]) == 0
    kvm = json.loads(capsys.readouterr().out)["kvm"]
    assert kvm["available"] is True
    assert {log["port"]: log["available"] for log in kvm["logs"]}["kvm-bitmap"] is True
    names = {cap["name"]: cap for cap in kvm["capabilities"]}
    assert names["USER_MEMORY"]["value"] == 1
    assert all(cap["value"] or cap["remedy"] or cap["name"].startswith(("NR_", "MAX_", "XSAVE2")) for cap in names.values())


def test_without_a_device_run_exits_3_and_check_says_what_helps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    really_open = os.open

    def no_device(path: Any, *arguments: Any, **options: Any) -> int:
        if path == "/dev/kvm":
            raise FileNotFoundError(2, "No such file or directory", path)
        return really_open(path, *arguments, **options)

    monkeypatch.setattr(os, "open", no_device)
    assert main(["run", "kvm"]) == 3
    assert "this host has no /dev/kvm" in capsys.readouterr().err
    assert main(["check"]) == 0, "emulated guests work"
    text = capsys.readouterr().out
    assert "KVM: no: " in text
    assert "kvm_intel, kvm_amd" in text
    assert text.count("kvm_intel, kvm_amd") == 1, "said once, not for each log again"
    assert [line.split()[-1] for line in text.splitlines() if "kvm --log" in line] == ["no"] * 3


def test_without_permission_run_exits_4_and_says_what_helps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_permission(path: Any, *_arguments: Any, **_options: Any) -> int:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "open", no_permission)
    assert main(["run", "kvm"]) == 4
    assert "usermod -aG kvm" in capsys.readouterr().err

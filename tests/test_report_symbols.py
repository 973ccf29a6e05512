"""Names of variables: of a real process's program and libraries, of a guest's program; and whatever the file is, never an error."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

import dirtylog
from dirtylog import DirtyLog, MemorySlot, Recorder, Recording
from dirtylog.observe.rounds import rounds
from dirtylog.report.axis import lay_out
from dirtylog.report.hottest import hottest
from dirtylog.report.symbols import Symbols, read_table
from victims import needs_victims

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("elftools", reason="pyelftools is not installed")

SOURCE = """
#include <unistd.h>
char in_data[8 * 4096] __attribute__((aligned(4096))) = {1};
char in_bss[64 * 4096] __attribute__((aligned(4096)));
int main(void) {
    for (int round = 0; round < 60; round++) {
        for (int page = 0; page < 8; page++) ((volatile char *)in_data)[page * 4096 + 9] = round;
        for (int page = 0; page < 64; page++) ((volatile char *)in_bss)[page * 4096 + 9] = round;
        usleep(10000);
    }
    return 0;
}
"""


def compiled(folder: Path, *options: str) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, program = folder / "writer.c", folder / "writer"
    source.write_text(SOURCE)
    subprocess.run([compiler, "-O1", *options, "-o", program, source], check=True)
    # Older than any recording of it.
    os.utime(program, (time.time() - 60,) * 2)
    return program


@needs_victims
@pytest.mark.parametrize("options", [("-pie", "-fPIE"), ("-no-pie",)])
def test_the_hottest_memory_of_a_process_has_the_names_of_its_variables(tmp_path: Path, options: tuple[str, ...]) -> None:
    program = compiled(tmp_path, *options)
    path = tmp_path / "run.dlog"
    with dirtylog.open([str(program)]) as memory, DirtyLog(memory) as log, Recorder(path, memory) as recorder:
        memory.resume()
        for found in rounds(log, 5, 0.05):
            recorder.add(found)
    with Recording(path) as recording:
        axis = lay_out(recording.slots, recording.runs())
        symbols = Symbols(recording.slots, started=recording.facts["started"])
        named = {
            name: axis.region_of(stretch.first).label
            for stretch in hottest(axis, len(recording.rounds))
            if stretch.heat > 0
            for name in symbols.find(
                axis.address_of(stretch.first), axis.address_of(stretch.first) + stretch.npages * axis.page_size
            )
        }
    assert named["in_data"] == "writer"
    assert named["in_bss"] == "anonymous"


def test_a_guests_program_names_guest_physical_memory(tmp_path: Path) -> None:
    program = compiled(tmp_path, "-no-pie")
    table = read_table(str(program))
    assert table is not None
    places = {table._name(index): int(address) for index, address in enumerate(table.addresses.tolist())}
    symbols = Symbols([MemorySlot(0, 0, 1 << 20)], image=str(program))
    address = places["in_bss"]
    assert symbols.find(address, address + 4096) == ["in_bss"]
    assert symbols.find(address + 63 * 4096, address + 64 * 4096)[0] == "in_bss"
    assert "in_bss" not in symbols.find(address + 64 * 4096, address + 65 * 4096)
    assert symbols.find(1 << 46, (1 << 46) + 4096) == []
    assert symbols.find(0, 1 << 64, limit=2)[2].startswith("and ")


def test_a_file_that_is_newer_than_the_recording_gives_no_names(tmp_path: Path) -> None:
    program = compiled(tmp_path)
    modified = program.stat().st_mtime
    assert read_table(str(program), modified + 1) is not None
    assert read_table(str(program), modified - 1) is None


def test_what_is_no_file_gives_no_names_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("no ELF")
    for name in ("pipe", "empty", "text", "missing", "", "nul\0"):
        assert read_table(str(tmp_path / name)) is None
    assert read_table("/dev/zero") is None


def test_a_damaged_file_is_no_error(tmp_path: Path) -> None:
    data = bytearray(compiled(tmp_path, "-s" if shutil.which("strip") is None else "-g0").read_bytes())
    random = np.random.default_rng(7)
    path = tmp_path / "damaged"
    head = 64 + 56 * 13
    for number in range(150):
        damaged = data.copy()
        # The header, the table of sections, or anything.
        low, high = ((0, head), (len(data) - 31 * 64, len(data)), (0, len(data)))[number % 3]
        for place in random.integers(low, high, 1 + number % 9).tolist():
            damaged[place] = int(random.integers(0, 256))
        path.write_bytes(damaged[: len(data) - number * 40 if number % 4 == 0 else None])
        slots = [MemorySlot(0, 0x400, 16, name=str(path), permissions="rw-p", file_offset=0x2000)]
        symbols = Symbols(slots, image=str(path))
        for address in (0, 0x400000, 0x404000, (1 << 64) - 4096):
            assert all(isinstance(name, str) for name in symbols.find(address, address + 4096))

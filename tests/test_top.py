"""``dirtylog top`` in a real terminal of 80 by 24, which tmux keeps and shows: what is seen, what keys do, and how it ends."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

from kvm_here import needs_kvm
from victims import needs_victims
from writers import ARENA, ARENA_MAP, SHARED_MAP, Writer, dirtylog, finish, start, writer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

pytestmark = [
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("textual") is None, reason="Textual is not installed"),
]

PROGRAM = (sys.executable, "-m", "dirtylog", "top")
GUEST = ("emu:arm64:hotset", "--size", "16MiB", "--interval", "0.1")
PLAIN = {"NO_COLOR": "1", "PYTHONIOENCODING": "ascii"}
COLOUR = re.compile(r"\x1b\[(?:[0-9]+;)*(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]")
# Lines of a terminal of 24.
MAP, CURVE, AXIS, HEAD, FIRST = slice(5, 12), slice(12, 15), 15, 16, 17
SECONDS = 60.0
_numbers = itertools.count()


class Pane:
    """A terminal in which a command runs; the server of its own ends with it."""

    def __init__(self, *words: str, program: tuple[str, ...] = PROGRAM, environment: Mapping[str, str] = PLAIN) -> None:
        self._server = f"dirtylog-{os.getpid()}-{next(_numbers)}"
        settings = {"TERM": "xterm-256color", **environment}
        # COLUMNS and LINES would tell the size that pytest's terminal had, and go on to.
        unset = [word for name in ("NO_COLOR", "COLUMNS", "LINES") for word in ("-u", name)]
        command = shlex.join(["env", *unset, *(f"{name}={value}" for name, value in settings.items()), *program, *words])
        # At the end the terminal tells how it was left, and stays to be looked at.
        shell = f'{command}; echo "exit status $?"; stty -a; exec sleep 600'
        self._tmux("-f", os.devnull, "new-session", "-d", "-x", "80", "-y", "24", "sh", "-c", shell)

    def _tmux(self, *words: str) -> str:
        done = subprocess.run(["tmux", "-L", self._server, *words], capture_output=True, text=True, timeout=SECONDS, check=True)
        return done.stdout

    def press(self, *keys: str) -> None:
        self._tmux("send-keys", *keys)

    def resize(self, width: int, height: int) -> None:
        self._tmux("resize-window", "-x", str(width), "-y", str(height))

    def screen(self) -> list[str]:
        return self._tmux("capture-pane", "-p").split("\n")[:-1]

    def said(self) -> str:
        """Return all that was printed, long lines whole."""
        return self._tmux("capture-pane", "-p", "-J", "-S", "-")

    def escapes(self) -> str:
        return self._tmux("capture-pane", "-p", "-e")

    def shows_the_view(self) -> bool:
        return self._tmux("display-message", "-p", "#{alternate_on}").strip() == "1"

    def until(self, true: Callable[[list[str]], object]) -> list[str]:
        """Return the screen as soon as it is so."""
        deadline = time.monotonic() + SECONDS
        while not true(screen := self.screen()):
            assert time.monotonic() < deadline, "never seen:\n" + "\n".join(screen)
            time.sleep(0.02)
        return screen

    def until_says(self, text: str) -> list[str]:
        return self.until(lambda screen: text in "\n".join(screen))

    def until_hot(self) -> list[str]:
        return self.until(lambda screen: hot(screen) and "memory" in screen[FIRST])

    def end(self, *keys: str) -> int:
        """Return the exit status, after these keys; the terminal must be as it was."""
        if keys:
            self.press(*keys)
        self.until(lambda _: "iexten" in self.said())
        assert not self.shows_the_view()
        said = self.said()
        assert re.search(r"(?<!-)icanon\b", said)
        assert re.search(r"(?<!-)echo\b", said)
        assert "Traceback" not in said
        found = re.search(r"^exit status (\d+)$", said, re.MULTILINE)
        assert found is not None, said
        return int(found[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        socket = Path(self._tmux("display-message", "-p", "#{socket_path}").strip())
        self._tmux("kill-server")
        socket.unlink(missing_ok=True)


def hot(screen: list[str]) -> list[tuple[int, int]]:
    """Return row and column of each cell of the map that is hotter than a sixteenth."""
    return [(row, column) for row, line in enumerate(screen[MAP]) for column, char in enumerate(line[16:]) if char in "*#%@"]


# --- what is seen


def test_the_hot_pages_of_a_guest_are_hot_and_its_slots_are_listed() -> None:
    with Pane(*GUEST) as pane:
        screen = pane.until_hot()
        cells = hot(screen)
        # Of 16 MiB a 32nd is hot, in the middle; a cell is a 448th.
        assert 12 <= len(cells) <= 18, "\n".join(screen)
        assert {row for row, _ in cells} == {3}
        assert len(screen) == 24
        assert screen[0].startswith(" dirtylog top  emu:arm64:hotset ")
        assert screen[1] == " port arm64 (exact), 4 KiB pages, 16 MiB in 2 slots"
        assert screen[3] == " coverage complete, but for the blind spots under ?"
        row = screen[FIRST].split()
        assert row[:5] == [">", "0x0", "memory", "16", "MiB"]
        assert float(row[5]) > 0
        assert screen[FIRST + 1].split()[:2] == ["0x1000000", "read-only"]
        assert pane.end("q") == 0
        assert "pages reported" in pane.said()
        assert "blind spot: " in pane.said()


@needs_kvm
def test_a_kvm_guest() -> None:
    with Pane("kvm:hotset", "--size", "16MiB", "--log", "ring") as pane:
        screen = pane.until_hot()
        assert screen[1].startswith(" port kvm-ring (superset), ")
        assert pane.end("q") == 0


@needs_victims
def test_a_process_and_a_slot_of_it_that_goes_while_it_is_looked_at() -> None:
    with Writer("spin", "3", "4", "200", "obey") as target, Pane(f"pid:{target.pid}", "--map", ARENA_MAP) as pane:
        screen = pane.until(lambda screen: f"> {ARENA:#x} anonymous" in screen[FIRST])
        assert screen[1].startswith(" port ")
        pane.press("z")
        screen = pane.until(lambda screen: "pages 0-255" in screen[4] and hot(screen))
        # Of 256 pages each has a cell, and a row 64.
        assert hot(screen) == [(0, 3), (0, 4), (3, 200 - 3 * 64)]
        target.say("exec spin 7 obey")
        pane.until_says("that slot has gone")
        pane.until(lambda screen: hot(screen) == [(0, 7)])
        assert pane.end("q") == 0


def test_without_colours_none_is_sent() -> None:
    kinds: tuple[dict[str, str], ...] = ({"NO_COLOR": "1"}, {"TERM": "vt100"}, {}, {"TERM": "xterm"})
    for environment, coloured in zip(kinds, (False, False, True, True), strict=True):
        with Pane(*GUEST, environment=environment) as pane:
            screen = pane.until(lambda screen: "memory" in screen[FIRST])
            assert bool(COLOUR.search(pane.escapes())) is coloured, environment
            assert ("░░▒▒▓▓██" in screen[4]) is bool(environment), "where there are few colours, or none, shades tell"
            assert pane.end("q") == 0


def test_where_the_encoding_is_not_utf_8_all_is_ascii() -> None:
    with Pane(*GUEST) as pane:
        pane.until_hot()
        pane.press("m", "z", "?")
        assert "\n".join(pane.until_says("blind spot")).isascii()
        pane.press("?")
        assert "\n".join(pane.until_says(" hot, halves")).isascii()
        assert pane.end("q") == 0


# --- keys


def test_pause_freezes_the_view_and_the_log_goes_on() -> None:
    with Pane(*GUEST) as pane:
        pane.until_hot()
        pane.press("p")
        frozen = pane.until_says("PAUSED at ")
        paused = float(re.findall(r"PAUSED at ([\d.]+) s", frozen[0])[0])

        def second_later(screen: list[str]) -> bool:
            # A mark says what time it is.
            pane.press("m")
            marked = re.findall(r"mark \d+ at ([\d.]+) s", screen[3])
            return bool(marked) and float(marked[0]) > paused + 1

        later = pane.until(second_later)
        assert [later[0], later[2], *later[4:]] == [frozen[0], frozen[2], *frozen[4:]]
        pane.press("p")
        screen = pane.until_says("running ")
        pages = [int(re.findall(r"pages (\d+)", shown[2])[0]) for shown in (frozen, screen)]
        assert pages[1] >= pages[0] + 5 * 128, "ten rounds of 128 hot pages, or some less"
        assert pane.end("q") == 0


def test_zoom_goes_in_and_out() -> None:
    with Pane(*GUEST) as pane:
        pane.until_hot()
        pane.press("z")
        pane.until(lambda screen: "pages 0-4095" in screen[4])
        pane.press("Right", "Right", "Right")
        screen = pane.until(lambda screen: screen[8][15:16] == ">")
        first, after = (int(screen[row].split()[0], 16) // 4096 for row in (8, 9))
        pane.press("Enter")
        screen = pane.until(lambda screen: f"pages {first}-{after - 1}" in screen[4])
        assert len(hot(pane.until_hot())) > 50, "in a seventh of the memory the hot pages take seven times as much of the map"
        pane.press("Escape")
        pane.until(lambda screen: "pages 0-4095" in screen[4])
        pane.press("Escape")
        pane.until(lambda screen: "1 written slot" in screen[4])
        assert pane.end("q") == 0


def test_sort_select_time_cooling_and_help() -> None:
    with Pane(*GUEST) as pane:
        pane.until(lambda screen: "v MB/s" in screen[HEAD])
        for head in ("slot v", "v size", "v total", "v MB/s"):
            pane.press("s")
            pane.until(lambda screen, head=head: head in screen[HEAD])  # type: ignore[misc]  # a lambda's defaults have no types
        pane.press("Down")
        pane.until(lambda screen: screen[FIRST + 1].startswith("> 0x1000000"))
        pane.press("Up")
        pane.until(lambda screen: screen[FIRST].startswith("> 0x0"))
        pane.press("+")
        pane.until_says("halves in 4 s")
        pane.press("-", "-")
        pane.until_says("halves in 1 s")
        pane.press("t")
        pane.until_says("history: the whole")
        pane.press("?")
        pane.until_says("blind spot: ")
        pane.press("Escape")
        pane.until_says("halves in 1 s")
        assert pane.end("q") == 0


def test_a_mark_stands_in_the_history() -> None:
    with Pane(*GUEST) as pane:
        # The length of time is written where the curve begins.
        pane.until(lambda screen: re.search(r"the last +[2-9] s", screen[AXIS]))
        pane.press("m")
        pane.until_says("mark 1 at ")
        pane.until(lambda screen: re.search(r"1 {4,}$", screen[AXIS].ljust(80)) and "|" in screen[AXIS - 1])
        pane.press("m")
        screen = pane.until(lambda screen: re.search(r" 1 +2 *$", screen[AXIS]))
        found = re.search(r" (1) +(2) *$", screen[AXIS])
        assert found is not None
        columns = [found.start(1), found.start(2)]
        for line in screen[CURVE]:
            assert [column for column, char in enumerate(line) if char == "|"] == columns
        assert pane.end("q") == 0
        assert re.search(r"mark 2 at [\d.]+ s, \d\d:\d\d:\d\d", pane.said())


def test_a_terminal_may_change_its_size_and_be_too_small() -> None:
    with Pane(*GUEST) as pane:
        pane.until_hot()
        pane.resize(60, 10)
        pane.until_says("too small")
        pane.resize(120, 40)
        screen = pane.until(lambda screen: len(screen) == 40 and "quit" in screen[39] and "@@@@@" in "".join(screen))
        assert len(screen[15].rstrip()) <= 120
        assert pane.end("q") == 0


# --- ends


def test_control_c_exits_130_and_sigterm_as_such(tmp_path: Path) -> None:
    with Pane(*GUEST) as pane:
        pane.until(lambda screen: "memory" in screen[FIRST])
        assert pane.end("C-c") == 130
    file = tmp_path / "pid"
    shell = ("sh", "-c", f'echo $$ > {shlex.quote(str(file))}; exec "$@"', "sh", sys.executable, "-m", "dirtylog", "top")
    for number, status in ((signal.SIGTERM, 128 + 15), (signal.SIGINT, 130)):
        with Pane(*GUEST, program=shell) as pane:
            pane.until(lambda screen: "memory" in screen[FIRST])
            os.kill(int(file.read_text()), number)
            assert pane.end() == status


def test_after_its_rounds_it_ends_by_itself() -> None:
    with Pane(*GUEST, "--rounds", "5") as pane:
        assert pane.end() == 0
        assert "\n5 rounds in " in pane.said()


def test_q_does_not_wait_for_a_long_round() -> None:
    with Pane("emu:arm64:hotset", "--size", "1MiB", "--interval", "100000") as pane:
        pane.until_says("nothing written yet")
        assert pane.end("q") == 0
        assert "\n1 rounds in " in pane.said()


@needs_victims
def test_a_target_that_is_killed_is_told_and_exits_5() -> None:
    with Writer("spin", "5") as target, Pane(f"pid:{target.pid}") as pane:
        pane.until(lambda screen: f"{ARENA:#x}" in "\n".join(screen))
        target.process.kill()
        screen = pane.until_says("ENDED")
        assert f"process {target.pid} has ended" in screen[3]
        assert pane.end("q") == 5
        assert f"dirtylog: process {target.pid} has ended" in pane.said()


@needs_victims
def test_incomplete_coverage_is_told_and_exits_6() -> None:
    with Writer("share", "spin", "5") as target, Pane(f"pid:{target.pid}", "--map", SHARED_MAP) as pane:
        screen = pane.until_says("WRITES MAY HAVE BEEN MISSED: ")
        assert screen[3].startswith(" WRITES MAY HAVE BEEN MISSED: ")
        assert pane.end("q") == 6
        assert "dirtylog: writes may have been missed: " in pane.said()


@needs_victims
def test_coverage_that_was_incomplete_stays_so_when_the_mapping_has_gone() -> None:
    with Writer("share") as target, Pane(f"pid:{target.pid}", "--map", SHARED_MAP) as pane:
        pane.until_says("WRITES MAY HAVE BEEN MISSED: ")
        target.say("exec obey")
        screen = pane.until_says(" in 0 slots")
        assert screen[3].startswith(" WRITES MAY HAVE BEEN MISSED: ")
        assert pane.end("q") == 6
        assert "dirtylog: writes may have been missed: " in pane.said()


@needs_victims
def test_what_a_command_says_does_not_tear_the_screen() -> None:
    with Pane("--", "sh", "-c", "echo it said; sleep 1; echo it warned >&2; exit 3") as pane:
        screen = pane.until_says("ENDED, exit status 3")
        assert not any(line.startswith("it ") for line in screen)
        assert pane.shows_the_view()
        assert pane.end("q") == 0
        assert re.search(r"^it said\nit warned$", pane.said(), re.MULTILINE)
        assert "the command has ended, exit status 3" in pane.said()


@needs_victims
def test_a_command_is_ended_with_the_view() -> None:
    with Pane("--", writer(), "early", "say", "began", "sleep", "100000") as pane:
        pane.until(lambda screen: f"{ARENA:#x}" in "\n".join(screen))
        assert pane.end("q") == 0
        assert re.search(r"^began$", pane.said(), re.MULTILINE)


def test_an_error_at_the_start_is_as_in_run() -> None:
    with Pane("emu:vax") as pane:
        assert pane.end() == 2
        assert "dirtylog: " in pane.said()
    with Pane() as pane:
        assert pane.end() == 2


def test_without_textual_it_says_how_to_get_it() -> None:
    missing = "import sys; sys.modules['textual'] = None; from dirtylog.cli import main; sys.exit(main(sys.argv[1:]))"
    with Pane("top", *GUEST, program=(sys.executable, "-c", missing)) as pane:
        assert pane.end() == 3
        assert "pip install 'dirtylog[tui]'" in pane.said()


# --- without a screen


def test_piped_it_prints_plain_rounds() -> None:
    ran = dirtylog("top", *GUEST, "--rounds", "3")
    assert (ran.status, ran.err) == (0, "")
    head, columns, *rounds = ran.out.splitlines()
    assert head == "emu:arm64:hotset: port arm64 (exact), page size 4096, 16 MiB, 1 vCPU"
    assert columns.split() == ["round", "seconds", "dirty", "pages", "MB/s", "runs", "get", "ms"]
    assert [line.split()[0] for line in rounds[:4]] == ["1", "2", "3", "total"]
    assert ran.out.isprintable() or "\x1b" not in ran.out


def test_piped_it_goes_on_until_it_is_interrupted() -> None:
    with start("top", *GUEST) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(14)]
        process.send_signal(signal.SIGINT)
        ran = finish(process)
    assert lines[-1].split()[0] == "12", "more rounds than run has"
    assert (ran.status, ran.err) == (130, "")


def test_a_dumb_terminal_has_plain_rounds_too() -> None:
    with Pane(*GUEST, "--rounds", "2", environment={"TERM": "dumb"}) as pane:
        assert pane.end() == 0
        assert re.search(r"^ +round +seconds", pane.said(), re.MULTILINE)
        assert re.search(r"^ total ", pane.said(), re.MULTILINE)

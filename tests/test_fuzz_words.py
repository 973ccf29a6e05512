"""Words that people write: sizes, targets, choices, arguments and whole command lines. All are a value, or a typed refusal."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import threading
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dirtylog.cli import arguments, main
from dirtylog.emulated.arch import PORTS
from dirtylog.errors import DirtyLogError, InvalidArgumentError
from dirtylog.guests.programs import PROGRAMS
from dirtylog.options import KvmOptions, ProcessOptions
from dirtylog.size import parse_size
from dirtylog.target import open_guest, open_target
from test_fuzz_bounds import FUZZED, KIB, MIB, bounded

NO_PROCESS = 1 << 22
"""Above every process id that Linux gives."""


def is_harmless(word: str) -> bool:
    """Return whether no process can be attached to or started for a word."""
    return word != "--" and not word.startswith("pid:")


ODD = ("", " ", "\0", "\ud800", "%s%(x)d", "-1", "1e400", "nan", "9" * 5000, "\u0663", "0x", "1_0")
odd = st.text(max_size=12).filter(is_harmless) | st.sampled_from(ODD)
digits = st.text("0123456789", min_size=1, max_size=34) | st.sampled_from(["007", "9" * 30, "9" * 31])
units = st.sampled_from(["", "B", "K", "kb", "KiB", "MIB", "g", "TB", "PiB", "p", "XB", "\u212a", "b b"])
sizes = st.builds(
    lambda *parts: "".join(parts), st.sampled_from(["", " ", "\u2003"]), digits, st.sampled_from(["", ".", ".5", ".000"]), units
)
_SPACES = " \t\n\r\f\v"
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}


def number_of(text: str) -> int | None:
    """Return a size by another way; None if it is none."""
    if not text.isascii():
        return None
    word = text.strip(_SPACES).lower()
    number = word.rstrip("abcdefghijklmnopqrstuvwxyz" + _SPACES)
    unit = word[len(number) :].strip(_SPACES)
    base, letter = (1000, unit[:-1]) if len(unit) == 2 else (1024, unit.removesuffix("ib") if unit != "b" else "")
    whole, dot, part = number.partition(".")
    if letter not in _POWERS or not whole.isdigit() or len(whole) > 30 or (dot and not part.isdigit()) or len(part) > 30:
        return None
    value = Fraction(number) * base ** _POWERS[letter]
    return int(value) if value.denominator == 1 else None


@FUZZED
@given(text=sizes | odd)
def test_a_size_is_the_number_that_it_says_or_is_refused(text: str) -> None:
    """16 bytes a letter, for the refusal says the letters, and 64 KiB."""
    with bounded(16 * len(text) + 64 * KIB):
        try:
            found = parse_size(text)
        except InvalidArgumentError:
            found = None
    assert found == number_of(text)


# --- targets

programs = st.sampled_from(["", *PROGRAMS]) | odd
targets = (
    st.builds(lambda arch, program: f"emu:{arch}:{program}", st.sampled_from([*PORTS]) | odd, programs)
    | st.builds(
        lambda number: f"pid:{number}", st.integers(NO_PROCESS, 1 << 80) | st.sampled_from(["", "-1", "0", " 1", "1.", "\u0661"])
    )
    | st.sampled_from(["", ":", "emu", "emu:", "emu::", "pid", "pid:", "PID:1", "Kvm", "kvm2"])
    | odd
)


@settings(FUZZED, max_examples=100)
@given(
    target=targets,
    size=st.sampled_from([None, "64K", "64K", "0", "1", "4095", "999999PB", -4096]),
    vcpus=st.sampled_from([None, 1, 0, -1, 9, 1 << 70]),
)
def test_a_target_is_opened_or_refused(target: str, size: str | int | None, vcpus: int | None) -> None:
    """What is refused allocates nothing of the size that it asks for: 16 bytes a letter and 1 MiB at most."""
    opened = None
    try:
        with bounded(16 * len(target) + (4 * MIB if size in ("64K", None) else MIB)):
            opened = open_target(target, size=size or "64K", vcpus=vcpus) if not target.startswith("pid:") else open_target(target)
    except DirtyLogError:
        pass
    if opened is not None:
        opened.close()
        assert target.split(":")[1] in PORTS


def test_a_process_id_of_too_many_digits_is_refused() -> None:
    with contextlib.suppress(DirtyLogError):
        open_target("pid:" + "9" * 5000)


@pytest.mark.parametrize("word", ["\ud800", "z" * 200_000], ids=["no text", "too long"])
def test_a_command_that_cannot_be_executed_is_refused(word: str) -> None:
    with contextlib.suppress(DirtyLogError):
        open_target(["true", word]).close()


@FUZZED
@given(log=odd | st.none(), backing=odd | st.none(), entries=st.none() | st.integers(-(1 << 70), 1 << 70), port=odd | st.none())
def test_choices_are_made_or_refused(log: str | None, backing: str | None, entries: int | None, port: str | None) -> None:
    for choose in (lambda: KvmOptions.of(log, backing, entries), lambda: ProcessOptions.of(port, None)):
        with contextlib.suppress(InvalidArgumentError), bounded(32 * KIB):
            choose()


def test_a_guest_of_a_size_with_more_digits_than_python_prints_is_refused() -> None:
    with pytest.raises(InvalidArgumentError):
        open_guest("emu:x86", size="9" * 5000)


# --- arguments


@FUZZED
@given(text=odd | digits | st.floats().map(repr) | st.integers().map(hex))
def test_an_argument_is_a_value_within_its_rule_or_refused(text: str) -> None:
    for read, lowest in ((arguments.count, 1), (arguments.address, 0), (arguments.size, 0)):
        with contextlib.suppress(argparse.ArgumentTypeError), bounded(64 * len(text) + 64 * KIB):
            assert read(text) >= lowest
    with contextlib.suppress(argparse.ArgumentTypeError), bounded(64 * len(text) + 64 * KIB):
        assert 0 < arguments.seconds(text) < math.inf
    with contextlib.suppress(argparse.ArgumentTypeError), bounded(1024 * len(text) + 256 * KIB):
        assert arguments.selection(text) == text


@FUZZED
@given(value=st.floats(min_value=0, exclude_min=True, allow_infinity=False))
@example(value=1e10)
def test_seconds_can_be_waited_for(value: float) -> None:
    with contextlib.suppress(argparse.ArgumentTypeError):
        assert arguments.seconds(repr(value)) <= threading.TIMEOUT_MAX


@FUZZED
@given(name=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60), force=st.booleans())
def test_an_output_is_checked_or_refused(name: str, force: bool) -> None:
    with contextlib.suppress(InvalidArgumentError):
        arguments.check_output(Path(name), force=force)


def test_an_output_with_a_name_that_is_too_long_is_refused() -> None:
    with contextlib.suppress(InvalidArgumentError):
        arguments.check_output(Path("a" * 300), force=False)


options = st.sampled_from(
    [
        "--rounds",
        "--interval",
        "--size",
        "--vcpus",
        "--port",
        "--map",
        "--log",
        "--backing",
        "--ring-entries",
        "--load",
        "--entry",
        "--halt",
    ]
)
values = st.sampled_from(["1", "0.1", "64K", "auto", "heap", "ring", "thp", "4096", "0x1000"]) | odd
pairs = st.lists(st.tuples(options, values), max_size=4).map(lambda found: [word for pair in found for word in pair])
flags = st.lists(st.sampled_from(["--json", "--jsonl", "-f", "-h", "--help", "--rou", "-", "@x", "--size="]), max_size=2)
no_targets = st.sampled_from(["nothing", "emu:no", "pid:0", f"pid:{NO_PROCESS}", "", "kvm:no", "emu:x86:no"]) | odd.filter(
    lambda word: word not in PORTS
)


@settings(FUZZED, max_examples=150)
@given(flags=flags, pairs=pairs, target=no_targets, command=st.sampled_from(["run", "run", "run", "", "ru", "nothing"]))
@example(flags=["-h"], pairs=[], target="\0", command="run")
def test_any_command_line_has_an_exit_status(flags: list[str], pairs: list[str], target: str, command: str) -> None:
    """None of them names anything that could be run: 0 is for help. The parser itself takes the most of 4 MiB."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), bounded(4 * MIB):
        status: object
        try:
            status = main([command, target, *pairs, *flags])
        except SystemExit as ended:
            status = ended.code
    assert status in range(7)

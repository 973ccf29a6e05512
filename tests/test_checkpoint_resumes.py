"""The simulation of docs/checkpoint.md, killed at random again and again: it goes on from its last checkpoint each time."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import dirtylog
from dirtylog.checkpoint.retention import Keep, prune
from dirtylog.checkpoint.store import Store
from dirtylog.checkpoint.verify import verify

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = Path(__file__).parents[1] / "docs" / "checkpoint.md"
KILLS = 100
SECONDS = 0.1
"""A run is killed at some time before this has passed since its first word, or since its start."""


def program() -> str:
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def test_the_program_is_short() -> None:
    assert len(program().splitlines()) <= 20


def _forked(path: Path, speaks: int) -> int:
    """Start the program in a copy of this process, which has all that it imports; return the copy's number."""
    code = compile(program(), "docs/checkpoint.md", "exec")
    child = os.fork()
    if not child:
        try:
            os.dup2(speaks, 1)
            sys.stdout = os.fdopen(1, "w")
            sys.argv = ["program", str(path), "0.005"]
            exec(code, {"__name__": "__main__"})  # noqa: S102 - our own documentation
        except BaseException:  # noqa: BLE001 - nothing of this process may run on in the child
            traceback.print_exc()
        finally:
            os._exit(1)
    return child


def _started(path: Path, speaks: int) -> int:
    """Start the program as its reader would."""
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", program(), str(path), "0.005"],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, speaks, 1)],
    )


def _killed(start: Callable[[Path, int], int], path: Path, seconds: float, *, after_a_word: bool) -> list[str]:
    """Start the program, kill it, and return the lines that it said."""
    hears, speaks = os.pipe()
    child = start(path, speaks)
    os.close(speaks)
    try:
        if after_a_word:
            assert select.select([hears], [], [], 60)[0], "it says nothing"
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "it ended by itself"
        with os.fdopen(hears, closefd=False) as said:
            # The last line may be cut off.
            return re.findall(r"(.*)\n", said.read())
    finally:
        os.close(hears)


@pytest.mark.parametrize(("start", "kills"), [(_forked, KILLS), (_started, 5)], ids=["forked", "started"])
def test_it_goes_on_from_its_last_checkpoint_whenever_it_is_killed(
    tmp_path: Path, start: Callable[[Path, int], int], kills: int
) -> None:
    path = tmp_path / "state"
    random = np.random.default_rng(kills)
    saved = 0
    resumed = saves = 0
    for number in range(kills):
        lines = _killed(start, path, float(random.random() * SECONDS), after_a_word=start is _started or bool(random.integers(4)))
        for line in lines:
            word, step = re.match(r"(resumed|saved).* step (\d+)", line).groups()  # type: ignore[union-attr]  # it does match
            # One may have been saved and not told of.
            assert int(step) >= saved
            saved = int(step)
            resumed += word == "resumed"
            saves += word == "saved"
        if path.exists() and (path / "index.sqlite").exists() and number % 5 == 4:
            with Store(path, write=True) as store:
                assert verify(store) == []
                if store.checkpoints():
                    prune(store, Keep(last=3))
    assert saves > kills / 2
    assert resumed > kills / 2
    arrays = dirtylog.restore(path)
    assert int(arrays["step"][0]) >= saved
    print(f"{kills} kills, {resumed} resumed, {saves} checkpoints, {saved} steps")


def test_the_command_line_verifies_what_it_saved(tmp_path: Path) -> None:
    path = tmp_path / "state"
    _killed(_started, path, 0.1, after_a_word=True)
    done = subprocess.run([sys.executable, "-m", "dirtylog", "verify", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

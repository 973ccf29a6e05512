"""SIGKILL at every system call that changes a store: every checkpoint that was committed is there, whole, and the store goes on."""

from __future__ import annotations

import os
import shutil
import signal
from typing import TYPE_CHECKING

import pytest

from dirtylog.checkpoint.store import Store
from store_scenarios import SCENARIOS, Expected, Scenario
from store_worlds import build, check, folder_in_memory, make_small
from traced import Action, missing, traced

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture
def folder() -> Iterator[Path]:
    with folder_in_memory() as path:
        yield path


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_store_survives_its_writer_killed_at_every_call_that_changes_it(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small(monkeypatch)
    scenario = SCENARIOS[name]
    template, path = folder / "template", folder / "work" / "store"
    path.parent.mkdir()
    if scenario.had:
        build(template, scenario.had, scenario.compression)
        shutil.copytree(template, path)
    whole = traced(lambda tell: scenario.run(path, tell), path.parent)
    assert whole.status == 0
    assert {call.name for call in whole.calls} >= {"pwrite64", "fdatasync", "unlink"}
    for number, call in enumerate(whole.calls):
        _survives(template, path, scenario, number, Action(kill=True))
        if call.path.endswith(".seg") and call.data:
            _survives(template, path, scenario, number, Action(nbytes=len(call.data) // 2 + 1, kill=True))
    print(f"{name}: killed at {len(whole.calls)} calls")


def _survives(template: Path, path: Path, scenario: Scenario, number: int, action: Action) -> None:
    """Run it on a copy of the store, end it at a call, and look at what is left."""
    shutil.rmtree(path, ignore_errors=True)
    if template.exists():
        shutil.copytree(template, path)
    run = traced(lambda tell: scenario.run(path, tell), path.parent, lambda at, _call: action if at == number else None)
    assert os.WIFSIGNALED(run.status)
    assert os.WTERMSIG(run.status) == signal.SIGKILL
    expected = Expected(scenario.had, run.told)
    if not expected.certain:
        # Its making may have been cut off: the next writer goes on with it.
        with Store(path, write=True):
            pass
    check(path, expected.certain, expected.possible)

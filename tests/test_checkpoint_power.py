"""Power cuts: of what a store's writer did, all that was synced is there, and of the rest anything. No checkpoint is lost by it."""

from __future__ import annotations

import copy
import os
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dirtylog.checkpoint.store import Store
from power_cut import Disk
from store_scenarios import SCENARIOS, Expected, Scenario
from store_worlds import build, check, folder_in_memory, make_small, save
from traced import SYNCS, Action, Call, missing, traced

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

CUTS = 400 if os.environ.get("DIRTYLOG_LONG") else 40


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    make_small(monkeypatch)
    with folder_in_memory() as path:
        yield path


def _prepared(folder: Path, scenario: Scenario) -> tuple[Path, Disk]:
    path = folder / "work" / "store"
    path.parent.mkdir()
    if scenario.had:
        build(path, scenario.had, scenario.compression)
    return path, Disk(path.parent)


def _after_cut(folder: Path, disk: Disk, random: np.random.Generator) -> Path:
    left = folder / "left"
    shutil.rmtree(left, ignore_errors=True)
    disk.cut(left, random)
    if not (left / "store" / "index.sqlite").exists():
        # It was being made.
        with Store(left / "store", write=True):
            pass
    return left / "store"


def _cuts(
    folder: Path, disk: Disk, events: list[object], had: int, told: list[str], random: np.random.Generator, count: int
) -> None:
    """Cut the power at ``count`` random instants of a run, and look at what is left."""
    at = 0
    for end in np.sort(random.integers(0, len(events) + 1, count)).tolist():
        for event in events[at:end]:
            if isinstance(event, Call):
                disk.do([event])
            else:
                told.append(event.text)  # type: ignore[attr-defined]  # Told: a type that mypy cannot see in a list of both
        at = end
        expected = Expected(had, told)
        left = _after_cut(folder, copy.deepcopy(disk), random)
        if not expected.certain:
            with Store(left, write=True):
                pass
        check(left, expected.certain, expected.possible)


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_checkpoint_is_lost_by_a_power_cut(name: str, folder: Path) -> None:
    scenario = SCENARIOS[name]
    path, disk = _prepared(folder, scenario)
    run = traced(lambda tell: scenario.run(path, tell), path.parent)
    assert run.status == 0
    _cuts(folder, disk, list(run.events), scenario.had, [], np.random.default_rng(len(name)), CUTS)


@pytest.mark.parametrize("name", ["prune", "collect"])
def test_nor_by_one_after_a_writer_that_died_before_its_sync_was_followed_by_another(name: str, folder: Path) -> None:
    # The dead one's commit is in the kernel, where the next writer sees it, and not on the disk.
    scenario = SCENARIOS[name]
    path, disk = _prepared(folder, scenario)
    template = folder / "template"
    shutil.copytree(path, template)
    syncs = [
        number
        for number, call in enumerate(traced(lambda tell: scenario.run(path, tell), path.parent).calls)
        if call.name in SYNCS and call.path.endswith("-wal")
    ]
    random = np.random.default_rng(7)
    for number in syncs:
        shutil.rmtree(path)
        shutil.copytree(template, path)
        died = traced(
            lambda tell: scenario.run(path, tell),
            path.parent,
            lambda at, _call, number=number: Action(kill=True) if at == number else None,  # type: ignore[misc]  # bound here
        )
        followed = traced(lambda tell: _follow(path, tell), path.parent)
        assert followed.status == 0
        after = copy.deepcopy(disk)
        after.do(died.calls)
        _cuts(folder, after, list(followed.events), scenario.had, died.told, random, max(6, CUTS // 4))


def _follow(path: Path, tell: Callable[[str], None]) -> None:
    with Store(path, write=True) as store:
        tell("saves 9")
        save(store, 9)
        tell("has 9")

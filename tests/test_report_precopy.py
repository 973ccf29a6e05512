"""The page predicts what Python predicts, for what is entered."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

from chromium import Opened, chromium, needs_chromium, opened
from dirtylog import MemorySlot, Recording
from dirtylog.observe.precopy import predict
from recorded import reported

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from playwright.sync_api import Browser

    from dirtylog.observe.footprint import Curve

pytest.importorskip("plotly", reason="Plotly is not installed")
pytestmark = needs_chromium

SLOTS = (MemorySlot(0, 0, 3000),)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    random = np.random.default_rng(200)
    rounds = [{0: {*range(50), *(random.pareto(0.7, 60) * 20 % 3000).astype(int).tolist()}} for _ in range(200)]
    return reported(tmp_path_factory.mktemp("report"), SLOTS, rounds)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def shown(browser: Browser, files: tuple[Path, Path]) -> Iterator[Opened]:
    with opened(browser, files[1]) as opening:
        yield opening


@pytest.mark.parametrize("bandwidth", [1e4, 1e6, 3e6, 1e7, 1.25e8, 1.25e9, 1e12])
def test_the_prediction_is_pythons(shown: Opened, files: tuple[Path, Path], bandwidth: float) -> None:
    with Recording(files[0]) as recording:
        curve = recording.footprint()
    check_predictions(shown, curve, bandwidth)


@pytest.mark.parametrize("rounds", [[[5]], [[1], [2], range(3000)], [[], [1], [], range(9)]])
def test_the_prediction_is_pythons_for_odd_curves_too(tmp_path: Path, browser: Browser, rounds: list[Iterable[int]]) -> None:
    path, output = reported(tmp_path, SLOTS, [{0: pages} for pages in rounds])
    with Recording(path) as recording, opened(browser, output) as shown:
        for bandwidth in (1e4, 1e6, 3.5e6, 1e8):
            check_predictions(shown, recording.footprint(), bandwidth)


def check_predictions(shown: Opened, curve: Curve, bandwidth: float) -> None:
    for memory in (1 << 20, 15 << 20, 1 << 34):
        for downtime in (1e-5, 0.003, 0.3, 30.0):
            expected = predict(curve, memory, bandwidth, downtime)
            found = shown.page.evaluate(
                """async (asked) => {
                    const found = (await window.dirtylog).predict(...asked);
                    return [found.converges, found.rounds, ...["nbytes", "seconds", "downtime", "smallest_downtime"].map(
                        (name) => (Number.isFinite(found[name]) ? found[name] : -1))];
                }""",
                [memory, bandwidth, downtime],
            )
            assert found[:2] == [expected.converges, expected.rounds]
            numbers = (expected.nbytes, expected.seconds, expected.downtime, expected.smallest_downtime)
            assert found[2:] == pytest.approx([number if math.isfinite(number) else -1 for number in numbers], rel=1e-9)


def test_the_prediction_follows_what_is_entered(shown: Opened, files: tuple[Path, Path]) -> None:
    with Recording(files[0]) as recording:
        curve = recording.footprint()
    memory = sum(slot.nbytes for slot in SLOTS)
    shown.page.fill("#bandwidth", "0.008")
    shown.page.fill("#downtime", "1")
    expected = predict(curve, memory, 1e6, 0.001)
    assert not expected.converges
    assert (shown.page.locator("#verdict").text_content() or "").startswith("Does not converge; smallest pause that would: ")
    shown.page.fill("#bandwidth", "0.8")
    shown.page.fill("#downtime", "20")
    expected = predict(curve, memory, 1e8, 0.02)
    assert expected.converges
    assert shown.page.locator("#verdict").text_content() == "Converges."
    rows = shown.page.locator("#prediction td").all_text_contents()
    assert rows[0] == str(expected.rounds)
    assert rows[3] == f"{float(f'{expected.downtime * 1e3:.3g}'):g} ms"
    shown.page.fill("#bandwidth", "")
    assert shown.page.locator("#verdict").text_content() == "Enter numbers above 0."
    shown.page.fill("#bandwidth", "10")
    shown.page.fill("#downtime", "300")
    assert shown.said == []

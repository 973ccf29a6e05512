"""What a report costs: the page of a recording of a million runs, its size, and how long a browser takes to open it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dirtylog.bitmap import DirtyBitmap
from dirtylog.observe.rounds import Round
from dirtylog.recording.reader import Recording
from dirtylog.recording.recorder import Recorder
from dirtylog.report.page import page
from null import NullMemory
from report import Section, Spread, Target, alternate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser

_PAGES = 1 << 20
_ROUNDS = 200
_RUNS = {"no runs but one": 1, "10^5 runs": 100_000, "10^6 runs": 1_000_000}
_SECONDS = 0.1
_MIB = 1 << 20
_CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
_BLANK = "a page without anything"


def report_page(*, quick: bool = False) -> Section:
    """Measure the page's size, how long it takes to make, and how long until all of it is drawn."""
    rounds = 3 if quick else 11
    section = Section(
        "The page of a report",
        f"Random single pages of 4 GiB in {_ROUNDS} rounds, no two of a round adjacent. Opened: from the request until the page "
        f"says that all is drawn, in a headless Chromium at 1280x800 without a network; the anchor is {_BLANK}. {rounds} rounds.",
    )
    with tempfile.TemporaryDirectory() as folder, _browser() as browser:
        files = {_BLANK: Path(folder) / "blank.html"}
        files[_BLANK].write_text("<!DOCTYPE html><script>window.dirtylog = Promise.resolve()</script>")
        made = {_BLANK: 0.0}
        for number, (name, runs) in enumerate(_RUNS.items()):
            path, files[name] = Path(folder) / f"{number}.dlog", Path(folder) / f"{number}.html"
            _record(path, runs)
            begin = time.perf_counter()
            with Recording(path) as recording:
                assert len(recording.runs()) == runs
                files[name].write_text(page(recording))
            made[name] = time.perf_counter() - begin
        opened: dict[str, list[float]] = {name: [] for name in files}
        for number, name in alternate(tuple(files), rounds + 1):
            took = _open(browser, files[name])
            if number:  # round 0 fills the browser's caches
                opened[name].append(took)
        sizes = {name: path.stat().st_size / _MIB for name, path in files.items()}
    section.rows = [
        {"page": name, "size, MiB": f"{sizes[name]:.2f}", "made, s": f"{made[name]:.2f}", "opened, s": Spread.of(opened[name])}
        for name in files
    ]
    largest = "10^6 runs"
    times = section.values("page", "opened, s")
    section.targets.append(Target("a page of 10^6 runs opens in at most 3 s", 3, "s", {largest: times[largest]}))
    section.targets.append(Target("a page of 10^6 runs has at most 10 MiB", 10, "MiB", {largest: sizes[largest]}))
    return section


@contextlib.contextmanager
def _browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - who measures something else need not have it

    found = next(filter(None, map(shutil.which, _CHROMIUM)), None)
    # Chromium's sandbox is not to be had by root.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=options)
        try:
            yield browser
        finally:
            browser.close()


def _open(browser: Browser, path: Path) -> float:
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 800})
    try:
        shown = context.new_page()
        begin = time.perf_counter()
        shown.goto(path.as_uri())
        shown.evaluate("window.dirtylog.then(() => null)")
        return time.perf_counter() - begin
    finally:
        context.close()


def _record(path: Path, runs: int) -> None:
    memory = NullMemory(_PAGES)
    slot = memory.slots[0]
    generator = np.random.default_rng(runs)
    began = time.perf_counter()
    with Recorder(path, memory, target="random single pages") as recorder:
        for number in range(min(_ROUNDS, runs)):
            # Every second page, so that each is a run.
            pages = 2 * generator.choice(_PAGES // 2, runs // min(_ROUNDS, runs), replace=False)
            dirty = {slot: DirtyBitmap.from_pages(_PAGES, pages)}
            recorder.add(Round(number + 1, _SECONDS, 0.0, dirty, began + number * _SECONDS))

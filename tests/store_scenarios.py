"""What a store's writer does, for tests that end it: each says what the store has from then on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dirtylog.checkpoint.retention import Keep, collect, prune
from dirtylog.checkpoint.store import Store
from store_worlds import PAGE, save

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path


class Scenario(NamedTuple):
    """What is done to a store that has states 1 to ``had`` already."""

    run: Callable[[Path, Callable[[str], None]], None]
    had: int
    compression: str


class Expected:
    """Which states a store has for certain, and which it may have, by what its writer has said."""

    def __init__(self, had: int, told: Iterable[str]) -> None:
        self.certain = set(range(1, had + 1))
        self.possible: set[int] = set()
        for text in told:
            self._hear(text)

    def _hear(self, text: str) -> None:
        verb, *words = text.split()
        states = set(map(int, words))
        match verb:
            case "saves":
                self.possible |= states
            case "has":
                self.certain |= states
            case "drops":
                self.certain -= states
                self.possible |= states
            case "dropped":
                self.possible -= states


def _first(path: Path, tell: Callable[[str], None]) -> None:
    """Make a store."""
    tell("saves 1")
    with Store(path, write=True) as store:
        save(store, 1)
        tell("has 1")


def _next(path: Path, tell: Callable[[str], None]) -> None:
    """Save two more, compressed, after one that is given up half way."""
    with Store(path, write=True) as store:
        given_up = store.draft()
        given_up.write(0, np.arange(6), PAGE, lambda _pages, out: out.fill(7))
        given_up.abort()
        for number in (4, 5):
            tell(f"saves {number}")
            save(store, number, "lz4")
            tell(f"has {number}")


def _prune(path: Path, tell: Callable[[str], None]) -> None:
    """Drop all but the newest, and write anew what has dead pages."""
    with Store(path, write=True) as store:
        tell("drops 1 2")
        prune(store, Keep(), live_share=0.95)
        tell("dropped 1 2")


def _collect(path: Path, tell: Callable[[str], None]) -> None:
    """Write all segments anew, drop nothing, and save then."""
    with Store(path, write=True) as store:
        collect(store, live_share=1.1)
        tell("saves 4")
        save(store, 4)
        tell("has 4")


SCENARIOS = {
    "first": Scenario(_first, 0, "none"),
    "next": Scenario(_next, 3, "none"),
    "prune": Scenario(_prune, 3, "none"),
    "prune of compressed ones": Scenario(_prune, 3, "zstd"),
    "collect": Scenario(_collect, 3, "lz4"),
}

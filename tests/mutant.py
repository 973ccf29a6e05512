"""A mutant: one edit of the source that brings a real bug back, and the tests that must notice; and what became of it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class ListError(Exception):
    """The list of mutants does not fit the source or the tests, so that no mutant means anything."""


class Fate(enum.Enum):
    """What became of a mutant."""

    KILLED = "killed"
    SURVIVED = "survived"
    SKIPPED = "skipped"
    """This machine lacks what its tests need."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """An edit of one file. ``file`` is relative to the package, ``tests`` are node ids relative to tests/.

    ``like`` says where the mistake was made or could be: a commit of KVM's, a trap of userfaultfd's (L1 to L8 are those of
    test_caller_traps.py), or the rule of this project that it breaks.
    """

    name: str
    like: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def applied(self, package: Path) -> str:
        """Return the text of the file with the edit, or raise :class:`ListError`."""
        path = package / self.file
        if not path.is_file():
            raise ListError(f"{self.name}: there is no file {self.file}")
        text = path.read_text()
        found = text.count(self.old)
        if found != 1:
            raise ListError(f"{self.name}: the old text occurs {found} times in {self.file}, and must once:\n{self.old}")
        if self.old == self.new:
            raise ListError(f"{self.name}: the edit changes nothing")
        mutated = text.replace(self.old, self.new)
        try:
            compile(mutated, self.file, "exec")
        except SyntaxError as error:
            raise ListError(f"{self.name}: {self.file} is no Python any more: {error}") from error
        return mutated


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a mutant. ``by`` is the test that killed it, or why it was skipped."""

    mutant: Mutant
    fate: Fate
    by: str
    seconds: float

"""What a command is: a small class whose name is the command's, and whose docstring is its help."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import argparse

    from dirtylog.cli.exits import ExitCode


class Command(ABC):
    """One command."""

    example: ClassVar[str]

    @staticmethod
    @abstractmethod
    def prepare(parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments."""

    @abstractmethod
    def run(self, args: argparse.Namespace) -> ExitCode:
        """Do it, and return the exit status. Errors may be raised."""

"""What every command that logs does: rounds, each told to its listeners, and how that ends."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

from dirtylog.cli.exits import ExitCode, exit_code_of
from dirtylog.errors import DirtyLogError
from dirtylog.guests.machine import Machine
from dirtylog.observe.rounds import rounds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dirtylog.dirty_log import DirtyLog
    from dirtylog.observe.rounds import Round
    from dirtylog.target import AnyMemory


class Listener(Protocol):
    """Who is told of each round."""

    def add(self, found: Round) -> None:
        """Hear of a round, at its end."""


def log_in_rounds(log: DirtyLog, count: int | None, interval: float, listeners: Sequence[Listener]) -> ExitCode:
    """Log ``count`` rounds (None: until the source ends, or Ctrl-C), and say how that ended; an error is told on stderr.

    What a listener raises, of writing to a full disk for one, ends it too.
    """
    try:
        for found in rounds(log, count, interval):
            for listener in listeners:
                listener.add(found)
            if isinstance(log.memory, Machine):
                log.memory.check()
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except DirtyLogError as error:
        print(f"dirtylog: {error}", file=sys.stderr)
        return exit_code_of(error)
    return ExitCode.DONE


def conclude(memory: AnyMemory, status: ExitCode) -> ExitCode:
    """Bring the source to its end, and say so if writes may have been missed: never 0 then."""
    if isinstance(memory, Machine):
        memory.pause()
    elif status is ExitCode.DONE:
        memory.end()
    if status is ExitCode.DONE and memory.incomplete:
        print(f"dirtylog: writes may have been missed: {'; '.join(memory.incomplete)}", file=sys.stderr)
        status = ExitCode.INCOMPLETE
    return status

"""What every command that logs does: rounds, each told to its listeners, and how that ends."""

from __future__ import annotations

import math
import sys
import time
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


def log_in_rounds(
    log: DirtyLog, count: int | None, interval: float, listeners: Sequence[Listener], *, duration: float | None = None
) -> ExitCode:
    """Log ``count`` rounds (None: until the source ends, or Ctrl-C), and say how that ended; an error is told on stderr.

    With ``duration`` it ends with the first round that is over so many seconds after the start. What a listener raises, of writing
    to a full disk for one, ends it too.
    """
    gaps: dict[str, None] = {}
    end = math.inf if duration is None else time.perf_counter() + duration
    try:
        for found in rounds(log, count, interval):
            for listener in listeners:
                listener.add(found)
            # One that is over by the end was there all the same.
            gaps |= dict.fromkeys(log.memory.incomplete)
            if isinstance(log.memory, Machine):
                log.memory.check()
            # A round ends a little late, and the last one is none too many.
            if time.perf_counter() >= end - interval / 2:
                break
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except DirtyLogError as error:
        print(f"dirtylog: {error}", file=sys.stderr)
        return exit_code_of(error)
    return told_of(gaps)


def conclude(memory: AnyMemory, status: ExitCode) -> ExitCode:
    """Bring the source to its end, and say so if writes may have been missed: never 0 then."""
    if isinstance(memory, Machine):
        memory.pause()
    elif status in (ExitCode.DONE, ExitCode.INCOMPLETE):
        memory.end()
    return told_of(dict.fromkeys(memory.incomplete)) if status is ExitCode.DONE else status


def told_of(gaps: dict[str, None]) -> ExitCode:
    """Say on stderr why writes may have been missed, and return the exit status."""
    if not gaps:
        return ExitCode.DONE
    print(f"dirtylog: writes may have been missed: {'; '.join(gaps)}", file=sys.stderr)
    return ExitCode.INCOMPLETE

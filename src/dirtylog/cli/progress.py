"""How far a long job is: on stderr, and only where that is a terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Self

from dirtylog.size import format_seconds, format_size

if TYPE_CHECKING:
    from types import TracebackType

_SECONDS = 0.1
_WIDTH = 78


class Progress:
    """One line that is written over, with the rate and the time that is left; a context manager that removes it."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._shown = sys.stderr is not None and sys.stderr.isatty()
        self._began = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Show that so many bytes of so many are done."""
        now = time.monotonic()
        if not self._shown or now - self._last < _SECONDS:
            return
        self._last = now
        rate = done / (now - self._began)
        left = f", {format_seconds((total - done) / rate)} left" if rate and total > done else ""
        share = f"{100 * done / total:.0f} %" if total else ""
        text = f"{self._what}: {share} of {format_size(total)}, {format_size(rate)}/s{left}"
        sys.stderr.write(f"\r{text[:_WIDTH]:<{_WIDTH}}")
        sys.stderr.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._shown:
            sys.stderr.write(f"\r{'':<{_WIDTH}}\r")
            sys.stderr.flush()

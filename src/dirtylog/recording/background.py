"""``dirtylog.record``: a thread that records while the program goes on."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Self

from dirtylog.errors import DirtyLogError
from dirtylog.observe.rounds import rounds
from dirtylog.recording.recorder import Recorder
from dirtylog.size import parse_seconds

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from dirtylog.dirty_log import DirtyLog


def record(
    log: DirtyLog, path: str | Path, *, interval: str | float = 0.1, target: str = "", overwrite: bool = False
) -> BackgroundRecorder:
    """Record a log that is on, while this program goes on; use it as a context manager.

    For a buffer of this program, or whatever else is being logged::

        with dirtylog.track(array) as log, dirtylog.record(log, "run.dlog") as recorder:
            work()
            recorder.mark("second phase")

    ``interval`` is the length of a round, in seconds or with a unit. It takes no page from anybody: it is a consumer of the log.
    Raises :class:`InvalidArgumentError`, when the file exists and ``overwrite`` is not set for one.
    """
    return BackgroundRecorder(log, path, parse_seconds(interval), target=target, overwrite=overwrite)


class BackgroundRecorder:
    """Records on a thread of its own, from entry to exit; a context manager.

    Leaving it writes what came after the last whole round, and raises what went wrong on the thread: a full disk, for one.
    """

    def __init__(self, log: DirtyLog, path: str | Path, interval: float, *, target: str = "", overwrite: bool = False) -> None:
        self._interval = interval
        self._log = log
        self._consumer = log.consumer(f"record {path}")
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._recorder = Recorder(path, log.memory, target=target, overwrite=overwrite)
        self._thread = threading.Thread(target=self._run, name="record", daemon=True)

    def mark(self, text: str) -> None:
        """Set a mark at this instant."""
        self._recorder.mark(text)

    def _run(self) -> None:
        try:
            for found in rounds(self._log, None, self._interval, consumer=self._consumer, over=self._over):
                self._recorder.add(found)
        except BaseException as error:  # noqa: BLE001 - it is raised where the recording is left
            self._error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        self._consumer.close()
        try:
            self._recorder.close(0 if kind is None and self._error is None else 1)
        except DirtyLogError as failure:
            self._error = self._error or failure
        if self._error is not None and error is None:
            raise self._error

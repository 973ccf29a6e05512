"""The thread that logs while another one draws: no get waits for the screen."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from dirtylog.guests.machine import Machine
from dirtylog.observe.rounds import rounds

if TYPE_CHECKING:
    from dirtylog.dirty_log import DirtyLog
    from dirtylog.target import AnyMemory
    from dirtylog.top.model import Model


class Worker(threading.Thread):
    """Logs ``count`` rounds (None: until the source ends, or :meth:`leave`), and tells the model of each.

    ``ended`` is whether it has come to its end, and ``error`` what brought it there, if that was one; ``incomplete`` is why writes
    may have been missed, as of the last round in which that was so: what a slot that has gone had missed stays missed.
    """

    def __init__(self, log: DirtyLog, memory: AnyMemory, model: Model, count: int | None, interval: float) -> None:
        super().__init__(name="dirtylog-top", daemon=True)
        self.memory = memory
        self.model = model
        self.count = count
        self.ended = threading.Event()
        self.error: BaseException | None = None
        self.incomplete: tuple[str, ...] = ()
        self._log = log
        self._interval = interval
        self._left = threading.Event()

    def run(self) -> None:
        """Log."""
        try:
            self._follow()
        except BaseException as error:  # noqa: BLE001 - it is told, or raised again, where the screen has ended
            self.error = error
        self.ended.set()

    def leave(self) -> None:
        """End its round at once, and return when it has ended."""
        self._left.set()
        self.join()

    def _follow(self) -> None:
        for found in rounds(self._log, self.count, self._interval, over=self._left):
            self.incomplete = self.memory.incomplete or self.incomplete
            self.model.add(found, list(self.memory.slots), time.perf_counter())
            if isinstance(self.memory, Machine):
                self.memory.check()
        if self.count is None and not self._left.is_set() and not isinstance(self.memory, Machine):
            # A program that was started here stands still at its end: it need not wait for whoever looks at the screen.
            self.memory.end()

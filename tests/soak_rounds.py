"""One source soaked: writers that never stop, readers that take and fail at random, and stops at which all is compared."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack, contextmanager
from random import Random
from typing import TYPE_CHECKING

from dirtylog import DirtyLog, ProtectPort
from soak_failures import Failures, short_reads, signals
from soak_readers import ClearReader, EpochReader, GetReader, compare

if TYPE_CHECKING:
    from collections.abc import Iterator

    from soak_readers import Reader
    from soak_subjects import Subject
    from soak_tally import Tally

_LONGEST_SLEEP = 0.02
_BETWEEN_STOPS = (0.03, 0.6)
_FAILURES_AT_REST = 4
_STOPS_SHARE = 3.0
"""Between two stops passes so many times as long as the last one took, at the least."""


class Soaking:
    """A log of one subject, its readers, and what is done to them."""

    def __init__(self, subject: Subject, rng: Random, tally: Tally) -> None:
        self._subject = subject
        self._memory = subject.memory
        self._rng = rng
        self._tally = tally
        manual = isinstance(self._memory.port, ProtectPort) and rng.random() < 0.4
        all_set = manual and rng.random() < 0.5
        self._log = DirtyLog(self._memory, manual_protect=manual, initially_all_set=all_set)
        self._readers: list[Reader] = [(ClearReader if manual else GetReader)("get", self._memory, self._log, rng)]
        # Where slots come and go by themselves all readers take turns on one thread, and each of them takes long.
        consumers = ("a",) if subject.follows else ("a", "b")
        self._readers += [EpochReader(f"consumer {name}", self._memory, self._log, rng) for name in consumers]
        self._aside = None if subject.follows else EpochReader("consumer aside", self._memory, self._log, Random(rng.random()))
        self._turn = threading.Lock()
        """Held by the reader aside while it takes, and by whoever must not have it take meanwhile."""
        self._failures = Failures(subject, self._log, self._readers, rng, tally.failures)
        self._late = False

    def run(self, seconds: float, reports: int | None = None) -> None:
        """Soak for so long, or until so many pages have been reported."""
        until, rng = time.monotonic() + seconds, self._rng
        self._tally.port = self._memory.port.name
        try:
            with ExitStack() as stack:
                with self._subject.still():
                    stack.enter_context(self._log)
                    self._begin()
                if self._aside is not None:
                    stack.enter_context(self._another_thread(self._aside))
                stop_at = time.monotonic() + rng.uniform(*_BETWEEN_STOPS)
                while time.monotonic() < until and (reports is None or self._reports() < reports):
                    time.sleep(rng.random() ** 3 * _LONGEST_SLEEP)
                    self._round()
                    if time.monotonic() > stop_at:
                        began = time.monotonic()
                        self._stop()
                        ended = time.monotonic()
                        stop_at = ended + max(rng.uniform(*_BETWEEN_STOPS), _STOPS_SHARE * (ended - began))
                self._stop()
            self._tally.wrote(self._subject.writes())
        finally:
            self._tally.add(reader.copy for reader in self._everybody())

    def _everybody(self) -> list[Reader]:
        return self._readers if self._aside is None else [*self._readers, self._aside]

    def _reports(self) -> int:
        return self._tally.reports + sum(reader.copy.reports for reader in self._everybody())

    def _begin(self) -> None:
        for slot in self._memory.slots:
            for first, contents in self._subject.contents(slot):
                for reader in self._everybody():
                    reader.copy.begin(slot, contents, first)

    def _round(self) -> None:
        self._tally.rounds += 1
        chance = self._rng.random()
        if chance < 0.3:
            with self._turn:
                self._failures.inject()
        elif chance < 0.4:
            self._subject.scribble(self._rng)
        elif chance < 0.45 and not self._late and not self._subject.follows:
            self._come_late()
        else:
            self._rng.choice(self._readers).take()

    def _come_late(self) -> None:
        """Have one more consumer, while the writers run: what is written after it is made must be reported to it."""
        self._late = True
        reader = EpochReader("consumer late", self._memory, self._log, self._rng)
        reader.begin()
        self._readers.append(reader)

    def _stop(self) -> None:
        """Stop the writers, let every reader take what is left, and compare.

        Some failures come first: what one of them loses nobody stores to again, so that it stays lost.
        """
        with self._turn, self._subject.still():
            self._tally.stops += 1
            for _ in range(self._rng.randrange(_FAILURES_AT_REST)):
                self._failures.inject(at_rest=True)
            compare(self._memory, self._everybody(), self._subject.contents)
            self._subject.check()

    @contextmanager
    def _another_thread(self, reader: EpochReader) -> Iterator[None]:
        """Have one consumer take on a thread of its own."""
        over = threading.Event()
        errors: list[BaseException] = []
        rng = Random(self._rng.random())

        def follow() -> None:
            try:
                while not over.wait(rng.random() * _LONGEST_SLEEP):
                    with self._turn:
                        action = reader.take if rng.random() < 0.8 else reader.raises
                        action()
            except BaseException as error:  # noqa: BLE001 - raised again below
                errors.append(error)

        thread = threading.Thread(target=follow, name="soak-aside", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        if errors:
            raise errors[0]


@contextmanager
def trouble(rng: Random, tally: Tally) -> Iterator[None]:
    """Have signals and short reads meanwhile, most of the time."""
    with ExitStack() as stack:
        if rng.random() < 0.7:
            stack.enter_context(short_reads(rng, tally.failures))
        if rng.random() < 0.7:
            stack.enter_context(signals(rng, tally))
        yield

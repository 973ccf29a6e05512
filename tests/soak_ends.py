"""Targets that come to an end while they are logged: killed in the middle of anything, or at their own end with a last look."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import dirtylog
from dirtylog import DirtyLog, TargetGoneError
from dirtylog.linux.process import ProcessMemory
from soak_readers import EpochReader, GetReader, compare
from soak_subjects import Contents, Process
from writers import NPAGES, writer

if TYPE_CHECKING:
    from random import Random

    from soak_readers import Reader
    from soak_tally import Tally

_LONGEST_LIFE = 1.5
_TOLD_WITHIN = 20.0
_STORES = 100


class Ending:
    """A log of a target that will end, and readers of it, all on one thread."""

    def __init__(self, memory: ProcessMemory, log: DirtyLog, rng: Random, tally: Tally) -> None:
        self._memory = memory
        self._contents = Contents(memory)
        self._rng = rng
        self._tally = tally
        self.readers: list[Reader] = [GetReader("get", memory, log, rng)]
        self.readers.append(EpochReader("consumer", memory, log, rng))
        tally.port = memory.port.name

    def begin(self) -> None:
        """Read everything. The target stands still."""
        for slot in self._memory.slots:
            for first, contents in self._contents.pieces(slot):
                for reader in self.readers:
                    reader.copy.begin(slot, contents, first)

    def round(self) -> None:
        """Have one of them take, or fail."""
        self._tally.rounds += 1
        reader = self._rng.choice(self.readers)
        if isinstance(reader, EpochReader) and self._rng.random() < 0.3:
            reader.raises()
            self._tally.failures["consumer raises"] += 1
        else:
            reader.take()

    def compare(self) -> None:
        """Have all of them take, and compare. The target stands still."""
        self._tally.stops += 1
        compare(self._memory, self.readers, self._contents.pieces)


def soak_killed(rng: Random, tally: Tally, seconds: float) -> None:
    """Kill a target: until then nothing is lost, and whoever asks afterwards is told."""
    with Process("uffd", rng) as target, DirtyLog(target.memory) as log:
        ending = Ending(target.memory, log, rng, tally)
        try:
            with target.still():
                # What was written since the start is reported to a reader that begins now, too.
                ending.begin()
            until = time.monotonic() + rng.random() * min(seconds, _LONGEST_LIFE)
            while time.monotonic() < until:
                ending.round()
            with target.still():
                ending.compare()
            tally.wrote(target.churner.counts().stores)
            killer = threading.Timer(rng.random() ** 2 * min(seconds, _LONGEST_LIFE), os.kill, (target.churner.pid, signal.SIGKILL))
            killer.start()
            try:
                deadline = time.monotonic() + _LONGEST_LIFE + _TOLD_WITHIN
                while time.monotonic() < deadline:
                    ending.round()
                raise AssertionError("the target is gone, and nobody says so")
            except TargetGoneError:
                tally.failures["target killed"] += 1
            finally:
                killer.join()
        finally:
            tally.add(reader.copy for reader in ending.readers)


def soak_ended(rng: Random, tally: Tally, _seconds: float) -> None:
    """Follow a command from its first instruction to its end: the last look shows the last writes."""
    words = ["spin", *_pages(rng)]
    for _ in range(rng.randint(1, 3)):
        words += ["store", *_pages(rng), "sleep", str(rng.randint(0, 60))]
    words += ["store", *_pages(rng)]
    memory = dirtylog.open([writer(), *words])
    assert isinstance(memory, ProcessMemory)
    with memory, DirtyLog(memory) as log:
        ending = Ending(memory, log, rng, tally)
        try:
            ending.begin()
            memory.resume()
            deadline = time.monotonic() + _TOLD_WITHIN
            while not memory.ending(rng.random() * 0.02):
                assert time.monotonic() < deadline, "the command does not end"
                ending.round()
            ending.compare()
            memory.end()
            assert memory.status == 0, f"the command ended with {memory.status}"
            tally.failures["target ended"] += 1
        finally:
            tally.add(reader.copy for reader in ending.readers)


def _pages(rng: Random) -> list[str]:
    return [str(rng.randrange(NPAGES)) for _ in range(rng.randint(1, _STORES))]

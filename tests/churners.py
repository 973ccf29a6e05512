"""churn.c, and a log that follows it: free running, with stops at which the copy of the reports is held against the memory."""

from __future__ import annotations

import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, Self

import dirtylog
from built import built
from shadows import Shadow

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dirtylog.linux.process import ProcessMemory

WRITERS = 4
_DISK = "/var/tmp"  # noqa: S108 - for files without names, on a disk: /tmp may be in memory


class Counts(NamedTuple):
    """What a churner has done: changes of mappings, stores to pages one by one, and signals handled."""

    changes: int
    stores: int
    alarms: int


class Churner:
    """A running churn.c; a context manager."""

    def __init__(self, seed: int, pause_us: int = 500) -> None:
        self._process = subprocess.Popen(
            (built("churn.c"), str(WRITERS), str(seed), _DISK, str(pause_us)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self.pid = self._process.pid
        assert self._line() == "ready"

    def hold(self) -> None:
        """Return when every thread stands still."""
        assert self._ask("hold") == "held"

    def go(self) -> None:
        """Let them run."""
        assert self._ask("go") == "gone"

    def counts(self) -> Counts:
        """Return what it has done so far."""
        return Counts(*(int(number) for number in self._ask("count").split()))

    def _ask(self, text: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{text}\n".encode())
        return self._line()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode().strip()
        assert line, f"the churner has ended: {self._process.wait()}"
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def standing_still(churner: Churner, memory: ProcessMemory, how: str) -> Iterator[None]:
    """Stop it: from outside, or by its own doing."""
    if how == "pause":
        memory.pause()
    else:
        churner.hold()
    yield
    if how == "pause":
        memory.resume()
    else:
        churner.go()


class Churning:
    """One that is logged and compared until it has been enough. Nothing may be lost: :meth:`run` fails at the first page."""

    def __init__(self, seed: int, how: str, *, port: str = "uffd") -> None:
        self._seed = seed
        self._how = how
        self._port = port
        self.shadow: Shadow
        self.counts: Counts

    def run(self, seconds: float, reports: int = 0, *, between_stops: float = 1.0) -> None:
        """Log for so long, and until so many pages have been reported."""
        with Churner(self._seed) as churner:
            memory = dirtylog.open(f"pid:{churner.pid}", port=self._port)
            with memory, dirtylog.DirtyLog(memory) as log:
                with standing_still(churner, memory, self._how):  # type: ignore[arg-type]  # it is a process
                    self.shadow = shadow = Shadow(memory, log)  # type: ignore[arg-type]  # it is a process
                    shadow.follow()
                began = stopped = time.monotonic()
                while time.monotonic() - began < seconds or shadow.reports < reports:
                    shadow.follow()
                    if time.monotonic() - stopped > between_stops:
                        with standing_still(churner, memory, self._how):  # type: ignore[arg-type]  # it is a process
                            self._compare(shadow, memory)  # type: ignore[arg-type]  # it is a process
                        stopped = time.monotonic()
                with standing_still(churner, memory, self._how):  # type: ignore[arg-type]  # it is a process
                    self._compare(shadow, memory)  # type: ignore[arg-type]  # it is a process
            self.counts = churner.counts()

    def _compare(self, shadow: Shadow, memory: ProcessMemory) -> None:
        shadow.follow()
        assert not any("is not logged" in reason for reason in memory.incomplete), memory.incomplete
        lost = shadow.compare().lost
        details = "\n".join(map(str, lost[:20]))
        assert not lost, f"{len(lost)} pages lost after {shadow.rounds} rounds, seed {self._seed}:\n{details}"

    def __str__(self) -> str:
        shadow, counts = self.shadow, self.counts
        return (
            f"{shadow.reports} pages reported in {shadow.rounds} rounds, {shadow.slots_seen} new slots; {shadow.compares} stops "
            f"({self._how}), {shadow.compared} pages compared, {len(shadow.lost)} lost; {counts.changes} changes of mappings, "
            f"{counts.alarms} signals"
        )

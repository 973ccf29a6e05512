"""Commands that are started and logged, and what a test asks of them."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import dirtylog
from dirtylog import DirtyLog
from dirtylog.linux.process import ProcessMemory
from dirtylog.observe.rounds import rounds
from writers import pages_in_arena, writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

IN_TIME = 10.0


@contextmanager
def command(*words: str, program: Sequence[str] = (), port: str | None = None) -> Iterator[tuple[ProcessMemory, DirtyLog]]:
    """Start a program, a writer if no other is given, and its log; it stands at its first instruction."""
    memory = dirtylog.open([*(program or (writer(),)), *words], port=port)
    assert isinstance(memory, ProcessMemory)
    with memory, DirtyLog(memory) as log:
        yield memory, log


def rounds_of(log: DirtyLog, interval: float = 0.05) -> list[set[int]]:
    """Let a command run to its end, and return what each round reports of its arena."""
    log.memory.resume()
    return [pages_in_arena(found.dirty) for found in rounds(log, None, interval)]


def get_all(log: DirtyLog) -> set[int]:
    """Return what a get of every slot reports of the arena."""
    log.update()
    return pages_in_arena({slot: log.get(slot.id) for slot in log.memory.slots if slot.dirty_bitmap is not None})


def reports(log: DirtyLog, page: int) -> bool:
    """Return whether a page is reported within a little while."""
    for _ in range(500):
        if page in get_all(log):
            return True
        time.sleep(0.01)
    return False


def is_quiet(log: DirtyLog) -> bool:
    """Return whether nothing is written for a while."""
    get_all(log)
    time.sleep(0.05)
    return not get_all(log)


def in_time(act: Callable[[], object]) -> None:
    """Call in a thread, and require that it returns, or raise what it raises."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:  # noqa: BLE001 - it is raised below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(IN_TIME)
    assert not thread.is_alive(), "it does not return"
    if errors:
        raise errors[0]

"""A checkpoint that is saved in the background."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dirtylog.errors import InvalidArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dirtylog.checkpoint.store import Checkpoint


class Saving:
    """A checkpoint that is saved in the background: its rounds are written while the program goes on."""

    def __init__(self, save: Callable[[str, Callable[[], Any]], Checkpoint], note: str) -> None:
        self._cut = threading.Event()
        self._given_up = False
        self.under_way = True
        """Whether it is neither finished nor given up."""
        self._saved: Checkpoint | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(save, note), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, save: Callable[[str, Callable[[], Any]], Checkpoint], note: str) -> None:
        try:
            self._saved = save(note, self._still)
        except BaseException as error:  # noqa: BLE001 - it is raised where the saving is finished
            self._error = error

    @contextmanager
    def _still(self) -> Iterator[None]:
        self._cut.wait()
        if self._given_up:
            raise InvalidArgumentError("this checkpoint was given up")
        yield

    def finish(self) -> Checkpoint:
        """Save what was written until now, and return the checkpoint when it is safe. Nobody may write meanwhile.

        Raises what went wrong in the background: nothing is in the store then, and the next checkpoint has these pages too.
        """
        self._end()
        if self._error is not None:
            raise self._error
        assert self._saved is not None  # noqa: S101 - it ended without an error
        return self._saved

    def abandon(self) -> None:
        """Give it up: the next checkpoint has its pages too."""
        self._given_up = True
        self._end()

    def _end(self) -> None:
        self._cut.set()
        self._thread.join()
        self.under_way = False

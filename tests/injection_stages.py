"""The stages of an injection, each with a place before and after it where a test can do something."""

from __future__ import annotations

import os
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from dirtylog.linux import injection, ptrace

if TYPE_CHECKING:
    from collections.abc import Callable


_FOR_EVER = 100
FEWEST_STAGES = 25
"""No injection has less."""


class Stages:
    """Every request of ptrace, every access to the target's memory, and the copy of the descriptor.

    ``act`` is called before and after each, in the thread that traces, with the stage's number, its name, and whether it is done.
    ``patch`` is setattr, or monkeypatch's.
    """

    def __init__(self, act: Callable[[int, str, bool], None], patch: Callable[..., None] = setattr) -> None:
        self._act = act
        self.names: list[str] = []
        patch(ptrace, "ptrace", self._wrap(ptrace.ptrace, lambda request, *_: str(request.name)))
        for name in ("pread", "pwrite"):
            patch(os, name, self._wrap(getattr(os, name), lambda *_, name=name: name))
        patch(injection, "_libc", SimpleNamespace(syscall=self._wrap(injection._libc.syscall, lambda *_: "pidfd_getfd")))

    def _wrap(self, call: Callable[..., Any], name_of: Callable[..., str]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            if threading.current_thread().name != "dirtylog-ptrace":
                return call(*arguments)
            number, name = len(self.names), name_of(*arguments)
            self.names.append(name)
            if number > _FOR_EVER and len(set(self.names[-_FOR_EVER:])) == 1:
                raise RuntimeError(f"{name} is requested for ever")
            self._act(number, name, False)
            result = call(*arguments)
            self._act(number, name, True)
            return result

        return wrapped


def once(number: int, action: Callable[[], object], *, after: bool = False) -> Callable[[int, str, bool], None]:
    """Return what does something at the stage of that number."""

    def act(stage: int, _name: str, done: bool) -> None:
        if stage == number and done == after:
            action()

    return act

"""A userfaultfd of another process: from its agent if it runs one, else injected."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from dirtylog.linux.agents import ask_agent
from dirtylog.linux.injection import inject_userfaultfd

if TYPE_CHECKING:
    from dirtylog.linux.userfaultfd import Userfaultfd


class Attached(enum.Enum):
    """How a userfaultfd was had."""

    NOT = "not"
    AGENT = "agent"
    INJECTED = "injected"
    STARTED = "started"


def attach(pid: int) -> tuple[Userfaultfd, Attached]:
    """Return a userfaultfd of a process, enabled, and how it was had."""
    uffd = ask_agent(pid)
    if uffd is not None:
        return uffd, Attached.AGENT
    return inject_userfaultfd(pid), Attached.INJECTED

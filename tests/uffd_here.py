"""Whether tests can watch memory of this process here, and what is missing where they cannot; and short ways to do it."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import dirtylog

if TYPE_CHECKING:
    from collections.abc import Iterator

    from address_space import Area
    from dirtylog import DirtyLog


def missing_uffd_here() -> str | None:
    """Return what keeps this machine from watching memory, or None."""
    if sys.platform != "linux":
        return "no userfaultfd here: it is Linux's"
    from dirtylog.linux.userfaultfd import missing_uffd  # noqa: PLC0415 - it needs Linux

    missing = missing_uffd()
    return None if missing is None else f"no asynchronous userfaultfd here: {missing}"


needs_uffd = pytest.mark.skipif(missing_uffd_here() is not None, reason=missing_uffd_here() or "")

forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
"""For tests whose forked child does next to nothing: Python since 3.12 warns, and pytest has a thread of its own."""


def watched(area: Area) -> DirtyLog:
    """Return a log of an area, by userfaultfd."""
    return dirtylog.track(area.octets, port="uffd")


def written(log: DirtyLog) -> set[int]:
    """Return what a get reports."""
    return set(log.get(0).pages().tolist())


class OwnPort:
    """What a port of its own holds of this process."""

    def __init__(self) -> None:
        self._before = self._count()

    def descriptors(self) -> int:
        """Return how many userfaultfds and pagemaps have been opened since."""
        return self._count() - self._before

    @staticmethod
    def _count() -> int:
        names = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
        return sum(name.endswith("/pagemap") or "userfaultfd" in name for name in names)


@contextmanager
def port_of_its_own() -> Iterator[OwnPort]:
    """Let memory be tracked by a port of its own for a while: one that is broken on purpose must not be the next test's."""
    from dirtylog.linux.buffer_port import BufferPort  # noqa: PLC0415 - it needs Linux

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BufferPort, "_instance", None)
        try:
            yield OwnPort()
        finally:
            if BufferPort._instance is not None:
                BufferPort._instance.close()

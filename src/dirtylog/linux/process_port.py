"""Another process's writes, logged by a userfaultfd of its own that this process holds."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from dirtylog.errors import TargetGoneError
from dirtylog.linux.uffd_port import UffdPort

if TYPE_CHECKING:
    from collections.abc import Callable

    from dirtylog.errors import DirtyLogError
    from dirtylog.linux.pagemap import Pagemap
    from dirtylog.linux.userfaultfd import Userfaultfd
    from dirtylog.linux.watch import Watch


class ProcessPort(UffdPort):
    """As for a buffer, but what is watched comes and goes at any time: then all of it counts as written, and nothing fails."""

    def __init__(self, attach: Callable[[], tuple[Userfaultfd, Pagemap]], check_alive: Callable[[], None]) -> None:
        super().__init__(attach)
        self._check_alive = check_alive

    def refuses(self, start: int, nbytes: int) -> DirtyLogError | None:
        """Return why memory cannot be watched; :class:`TargetGoneError` when the process has ended or executes another program."""
        error = super().refuses(start, nbytes)
        if error is not None and error.errno in (errno.ENOMEM, errno.ESRCH):
            raise TargetGoneError("the address space is gone", errno=error.errno) from error
        return error

    def _cannot_arm(self, watch: Watch, error: DirtyLogError) -> None:  # noqa: ARG002 - it was unmapped or mapped anew just now
        self._check_alive()
        self.mark_all(watch)

    def _address_space_gone(self) -> None:
        self._check_alive()

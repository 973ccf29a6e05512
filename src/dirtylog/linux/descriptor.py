"""A file descriptor, owned: its ioctls raise typed errors, and closing it is its end."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import weakref
from typing import TYPE_CHECKING, ClassVar, Self

from dirtylog.errors import AccessDeniedError, DirtyLogError, InvalidArgumentError, TargetGoneError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from dirtylog.linux.layout import Struct


class Descriptor:
    """One file descriptor; a context manager."""

    errors: ClassVar[Mapping[int, type[DirtyLogError]]] = {
        errno.EINVAL: InvalidArgumentError,
        errno.ENXIO: UnsupportedError,
        errno.ENOTTY: UnsupportedError,
        errno.ENOSYS: UnsupportedError,
        errno.EACCES: AccessDeniedError,
        errno.EPERM: AccessDeniedError,
        errno.ESRCH: TargetGoneError,
    }
    who: ClassVar[str] = "the kernel"

    def __init__(self, fd: int) -> None:
        # FileIO closes it when it goes, with a ResourceWarning: a descriptor cannot leak in silence.
        self._file = io.FileIO(fd, "rb+")

    def fileno(self) -> int:
        """Return the descriptor, or raise :class:`DirtyLogError` when it is closed."""
        if self._file.closed:
            raise DirtyLogError(f"this {type(self).__name__} is closed", errno=errno.EBADF)
        return self._file.fileno()

    @property
    def closed(self) -> bool:
        """Whether it has been closed."""
        return self._file.closed

    def ioctl(
        self,
        request: int,
        argument: Struct | bytearray | int,
        what: str,
        *details: object,
        slot: int | None = None,
        remedy: str | None = None,
    ) -> int:
        """Call the kernel and return what it returns. ``what``, with ``details`` filled in (%), says in an error what was tried.

        Safe: every argument is an integer, or a buffer at least as long as the size in the request, alive during the call.
        """
        while True:
            try:
                return fcntl.ioctl(self.fileno(), request, argument)
            except InterruptedError:
                continue  # a signal, whose handler was called: the kernel wants to be asked again
            except OSError as error:
                raise self.error(error, what % details if details else what, slot=slot, remedy=remedy) from error

    @classmethod
    def error(
        cls, error: OSError, what: str, *, slot: int | None = None, pid: int | None = None, remedy: str | None = None
    ) -> DirtyLogError:
        """Return the typed error for what the kernel answered."""
        kind = cls.errors.get(error.errno or 0, DirtyLogError)
        name = errno.errorcode.get(error.errno or 0, "")
        return kind(what, errno=error.errno, slot=slot, pid=pid, reason=f"{cls.who} says {name}: {error.strerror}", remedy=remedy)

    def close(self) -> None:
        """Close it. A second call does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class UnsharedDescriptor(Descriptor):
    """One that a forked child must not have: there it is closed.

    A child would keep a userfaultfd's ranges registered; and a pagemap, which stays its parent's, would take its parent's bits.
    """

    _open: ClassVar[weakref.WeakSet[UnsharedDescriptor]] = weakref.WeakSet()
    left_to_parent = False

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._open.add(self)

    @classmethod
    def close_all(cls) -> None:
        """Close every one, in a child."""
        for descriptor in list(cls._open):
            descriptor.close()
            descriptor.left_to_parent = True

    def fileno(self) -> int:
        """Return the descriptor, or raise :class:`DirtyLogError` when it is closed or was left to the parent."""
        if self.left_to_parent:
            raise DirtyLogError(
                "this log is the parent process's", errno=errno.EBADF, remedy="a forked child starts one of its own"
            )
        return super().fileno()


os.register_at_fork(after_in_child=UnsharedDescriptor.close_all)

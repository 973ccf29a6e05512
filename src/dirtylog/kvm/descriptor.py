"""A descriptor of KVM's, owned: its ioctls raise typed errors, and closing it is its end."""

from __future__ import annotations

import errno
import fcntl
import io
from typing import TYPE_CHECKING, Self

from dirtylog.errors import (
    AccessDeniedError,
    BadSlotError,
    CopyFaultError,
    DirtyLogError,
    InvalidArgumentError,
    LoggingOffError,
    TargetGoneError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from types import TracebackType

    from dirtylog.kvm.layout import Struct

_BY_ERRNO: dict[int, type[DirtyLogError]] = {
    errno.EINVAL: InvalidArgumentError,
    errno.E2BIG: InvalidArgumentError,
    errno.EEXIST: BadSlotError,
    errno.ENOENT: LoggingOffError,
    errno.ENXIO: UnsupportedError,
    errno.ENOTTY: UnsupportedError,
    errno.EOPNOTSUPP: UnsupportedError,
    errno.EFAULT: CopyFaultError,
    errno.EACCES: AccessDeniedError,
    errno.EPERM: AccessDeniedError,
    # KVM's answer to whoever is not the process that made the VM, and to all once the VM is dead.
    errno.EIO: TargetGoneError,
}


class KvmDescriptor:
    """One file descriptor; a context manager."""

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
                raise kvm_error(error, what % details if details else what, slot=slot, remedy=remedy) from error

    def close(self) -> None:
        """Close it. A second call does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def kvm_error(error: OSError, what: str, *, slot: int | None = None, remedy: str | None = None) -> DirtyLogError:
    """Return the typed error for what the kernel answered."""
    kind = _BY_ERRNO.get(error.errno or 0, DirtyLogError)
    if kind is BadSlotError and slot is None:
        kind = InvalidArgumentError
    name = errno.errorcode.get(error.errno or 0, "")
    return kind(what, errno=error.errno, slot=slot, reason=f"KVM says {name}: {error.strerror}", remedy=remedy)

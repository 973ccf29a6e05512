"""A descriptor of KVM's, owned: its ioctls raise typed errors, and closing it is its end."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar

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
from dirtylog.linux.descriptor import Descriptor

if TYPE_CHECKING:
    from collections.abc import Mapping


class KvmDescriptor(Descriptor):
    """One file descriptor; a context manager."""

    errors: ClassVar[Mapping[int, type[DirtyLogError]]] = {
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
    who: ClassVar[str] = "KVM"

    @classmethod
    def error(
        cls, error: OSError, what: str, *, slot: int | None = None, pid: int | None = None, remedy: str | None = None
    ) -> DirtyLogError:
        """Return the typed error for what the kernel answered."""
        typed = super().error(error, what, slot=slot, pid=pid, remedy=remedy)
        if isinstance(typed, BadSlotError) and slot is None:
            return InvalidArgumentError(typed.message, errno=typed.errno, reason=typed.reason, remedy=remedy)
        return typed

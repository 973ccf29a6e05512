"""What can go wrong, and what each error carries.

::

    DirtyLogError
    ├── InvalidArgumentError   a value breaks a rule (EINVAL, EEXIST); also a ValueError
    │   └── BadSlotError       a slot id out of range (EINVAL), or slots that overlap (EEXIST)
    ├── LoggingOffError        no such slot, or it is not being logged (ENOENT)
    ├── CopyFaultError         the result could not be copied to the caller (EFAULT); the bits are kept
    ├── GuestFaultError        a guest stopped at an access that it may not make
    ├── UnsupportedError       this host, port or build cannot do it (ENXIO for a ring without a bitmap)
    ├── AccessDeniedError      permission is missing (EACCES)
    ├── TargetGoneError        the logged process or guest has gone (ESRCH)
    ├── CoverageLostError      writes may have been missed: the result is incomplete
    └── CorruptDataError       stored data does not verify

Every error pickles, keeps the ``OSError`` behind it as ``__cause__``, and has the same attributes;
those that do not apply are None.
"""

import errno as _errno
from typing import Any, ClassVar


class DirtyLogError(Exception):
    """The root of every error that dirtylog raises.

    ``errno`` is the number that KVM would return for it, ``slot`` the slot's id, ``pid`` the process, ``reason`` why, and
    ``remedy`` what would help.
    """

    default_errno: ClassVar[int | None] = None

    def __init__(
        self,
        message: str,
        *,
        errno: int | None = None,
        slot: int | None = None,
        pid: int | None = None,
        reason: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.errno = self.default_errno if errno is None else errno
        self.slot = slot
        self.pid = pid
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        parts = [self.message, self.reason, self.remedy]
        return "; ".join(part for part in parts if part)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.__dict__.copy())


def _rebuild(cls: type[DirtyLogError], message: str, state: dict[str, Any]) -> DirtyLogError:
    error = cls.__new__(cls, message)
    error.__dict__.update(state)
    return error


class InvalidArgumentError(DirtyLogError, ValueError):
    """A value breaks a rule; the message names both."""

    default_errno = _errno.EINVAL


class BadSlotError(InvalidArgumentError):
    """The slot id is out of range, or the slot cannot be placed where it is asked to be."""


class LoggingOffError(DirtyLogError):
    """There is no such slot, or its writes are not being logged."""

    default_errno = _errno.ENOENT


class CopyFaultError(DirtyLogError):
    """The snapshot could not be copied to the caller. Its bits are in the slot's bitmap again: the next get returns them."""

    default_errno = _errno.EFAULT


class GuestFaultError(DirtyLogError):
    """A guest CPU stopped at an access that nothing answers.

    ``pc`` is the address of the instruction (KVM may have gone on to the next one), ``address`` the guest-physical address that
    it tried (None when the fault was not an access), ``architecture`` the guest's.
    """

    default_errno = _errno.EFAULT

    def __init__(self, message: str, *, pc: int, address: int | None, architecture: str, **common: Any) -> None:  # noqa: ANN401 - passed on as they are
        super().__init__(message, **common)
        self.pc = pc
        self.address = address
        self.architecture = architecture


class UnsupportedError(DirtyLogError):
    """What was asked for does not exist here; ``reason`` says why and ``remedy`` what would help."""

    default_errno = _errno.ENXIO


class AccessDeniedError(DirtyLogError):
    """The user may not do this; ``remedy`` says what to ask for."""

    default_errno = _errno.EACCES


class TargetGoneError(DirtyLogError):
    """The logged process or guest went away."""

    default_errno = _errno.ESRCH


class CoverageLostError(DirtyLogError):
    """Writes may have been missed. What the error comes with is incomplete and must not be taken for the whole."""


class CorruptDataError(DirtyLogError):
    """Stored data does not verify."""

    default_errno = _errno.EBADMSG

"""Exit statuses. A run that may have missed writes never exits 0."""

from __future__ import annotations

import enum

from dirtylog.errors import (
    AccessDeniedError,
    CorruptDataError,
    CoverageLostError,
    DirtyLogError,
    InvalidArgumentError,
    TargetGoneError,
    UnsupportedError,
)


class ExitCode(enum.IntEnum):
    """What a command's exit status means."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    CANNOT = 3
    PERMISSION = 4
    TARGET_GONE = 5
    INCOMPLETE = 6
    DIFFERENT = 7
    INTERRUPTED = 130


_BY_ERROR: tuple[tuple[type[DirtyLogError], ExitCode], ...] = (
    (InvalidArgumentError, ExitCode.USAGE),
    (UnsupportedError, ExitCode.CANNOT),
    (AccessDeniedError, ExitCode.PERMISSION),
    (TargetGoneError, ExitCode.TARGET_GONE),
    (CoverageLostError, ExitCode.INCOMPLETE),
    (CorruptDataError, ExitCode.DIFFERENT),
)


def exit_code_of(error: DirtyLogError) -> ExitCode:
    """Return the exit status of an error."""
    for kind, code in _BY_ERROR:
        if isinstance(error, kind):
            return code
    return ExitCode.FAILED

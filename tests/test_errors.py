from __future__ import annotations

import copy
import errno
import pickle

import pytest

from dirtylog import errors
from dirtylog.errors import (
    AccessDeniedError,
    BadSlotError,
    CopyFaultError,
    CorruptDataError,
    CoverageLostError,
    DirtyLogError,
    GuestFaultError,
    InvalidArgumentError,
    LoggingOffError,
    TargetGoneError,
    UnsupportedError,
)

DEFAULT_ERRNO: dict[type[DirtyLogError], int | None] = {
    DirtyLogError: None,
    InvalidArgumentError: errno.EINVAL,
    BadSlotError: errno.EINVAL,
    LoggingOffError: errno.ENOENT,
    CopyFaultError: errno.EFAULT,
    GuestFaultError: errno.EFAULT,
    UnsupportedError: errno.ENXIO,
    AccessDeniedError: errno.EACCES,
    TargetGoneError: errno.ESRCH,
    CoverageLostError: None,
    CorruptDataError: errno.EBADMSG,
}


def make(kind: type[DirtyLogError]) -> DirtyLogError:
    """Make an error with nothing but what it needs."""
    if issubclass(kind, GuestFaultError):
        return kind("it broke", pc=0x1000, address=None, architecture="s390x")
    return kind("it broke")


def make_full(kind: type[DirtyLogError]) -> DirtyLogError:
    """Make an error with all its data."""
    if issubclass(kind, GuestFaultError):
        return kind(
            "it broke", errno=7, slot=3, pid=42, reason="a reason", remedy="a remedy", pc=0x1000, address=0x2008, architecture="arm"
        )
    return kind("it broke", errno=7, slot=3, pid=42, reason="a reason", remedy="a remedy")


every_kind = pytest.mark.parametrize("kind", DEFAULT_ERRNO, ids=lambda kind: kind.__name__)


def test_no_error_is_missing_here_nor_in_the_tree_that_the_module_draws() -> None:
    defined = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}

    assert defined == set(DEFAULT_ERRNO)
    for kind in defined:
        assert kind.__name__ in str(errors.__doc__)


@every_kind
def test_one_except_clause_catches_every_error(kind: type[DirtyLogError]) -> None:
    with pytest.raises(DirtyLogError) as caught:
        raise make(kind)
    assert type(caught.value) is kind


@every_kind
def test_default_errno(kind: type[DirtyLogError]) -> None:
    assert make(kind).errno == DEFAULT_ERRNO[kind]


@every_kind
def test_what_does_not_apply_is_none(kind: type[DirtyLogError]) -> None:
    error = make(kind)

    assert (error.slot, error.pid, error.reason, error.remedy) == (None, None, None, None)
    assert str(error) == "it broke"


@every_kind
def test_an_error_carries_its_data(kind: type[DirtyLogError]) -> None:
    error = make_full(kind)

    assert (error.message, error.errno, error.slot, error.pid) == ("it broke", 7, 3, 42)
    assert (error.reason, error.remedy) == ("a reason", "a remedy")
    assert str(error) == "it broke; a reason; a remedy"
    assert error.args == ("it broke",)


def test_a_guest_fault_carries_where_it_happened() -> None:
    error = GuestFaultError("it broke", pc=0x1000, address=0x2008, architecture="arm")

    assert (error.pc, error.address, error.architecture) == (0x1000, 0x2008, "arm")


def test_errno_zero_is_not_the_default() -> None:
    assert InvalidArgumentError("it broke", errno=0).errno == 0


@every_kind
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_pickles_with_all_its_data(kind: type[DirtyLogError], protocol: int) -> None:
    error = make_full(kind)
    error.add_note("a note")

    twin = pickle.loads(pickle.dumps(error, protocol))  # noqa: S301 - our own

    assert type(twin) is kind
    assert vars(twin) == vars(error)
    assert vars(twin)["message"] == "it broke"
    assert (twin.args, str(twin), twin.__notes__) == (error.args, str(error), ["a note"])


@every_kind
def test_an_error_copies_with_all_its_data(kind: type[DirtyLogError]) -> None:
    error = make_full(kind)

    assert vars(copy.copy(error)) == vars(error)
    assert str(copy.deepcopy(error)) == str(error)


@every_kind
def test_the_oserror_behind_it_is_its_cause(kind: type[DirtyLogError]) -> None:
    behind = PermissionError(errno.EPERM, "not you")

    def fail() -> None:
        try:
            raise behind
        except OSError as error:
            raise make(kind) from error

    with pytest.raises(kind) as caught:
        fail()

    assert caught.value.__cause__ is behind
    assert caught.value.__context__ is behind
    assert caught.value.__suppress_context__


def test_a_broken_rule_is_a_value_error() -> None:
    assert issubclass(InvalidArgumentError, ValueError)
    assert issubclass(BadSlotError, InvalidArgumentError)
    others = DEFAULT_ERRNO.keys() - {InvalidArgumentError, BadSlotError}
    assert not any(issubclass(kind, ValueError) for kind in others)


def test_unsupported_denied_and_gone_can_be_told_apart() -> None:
    leaves = [kind for kind in DEFAULT_ERRNO if kind not in (DirtyLogError, InvalidArgumentError)]

    for leaf in leaves:
        assert [other for other in leaves if issubclass(leaf, other)] == [leaf]

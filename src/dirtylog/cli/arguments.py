"""Argument types: each turns a word into a value, or says which rule it breaks."""

from __future__ import annotations

import argparse
import os
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from dirtylog.checkpoint.retention import Keep
from dirtylog.errors import DirtyLogError, InvalidArgumentError
from dirtylog.size import parse_bandwidth, parse_seconds, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


_PORTS = 1 << 16


def count(text: str) -> int:
    """Return a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return value


def selection(text: str) -> str:
    """Return a word that chooses mappings of a process."""
    try:
        from dirtylog.linux.mappings import Selection  # noqa: PLC0415 - Linux's; where there are no processes the target is refused

        Selection((text,))
    except ImportError:
        pass
    except DirtyLogError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def seconds(text: str) -> float:
    """Return a time in seconds, above 0."""
    try:
        return parse_seconds(text)
    except DirtyLogError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def bandwidth(text: str) -> float:
    """Return a bandwidth in bytes a second."""
    try:
        return parse_bandwidth(text)
    except DirtyLogError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def port(text: str) -> int:
    """Return the number of a TCP port."""
    value = int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(_PORTS)) else 0
    if not 1 <= value < _PORTS:
        raise argparse.ArgumentTypeError(f"{text!r} must be the number of a TCP port, 1 to {_PORTS - 1}")
    return value


def size(text: str) -> int:
    """Return a size in bytes."""
    try:
        return parse_size(text)
    except DirtyLogError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def address(text: str) -> int:
    """Return an address, decimal or with 0x."""
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be an address, such as 4096 or 0x1000")
    return value


def rule(text: str) -> str:
    """Return a rule of what to keep."""
    try:
        Keep.of([text])
    except DirtyLogError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def make_folder(path: Path) -> None:
    """Make a folder if it is not there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgumentError(f"{str(path)!r} cannot be made", errno=error.errno, reason=error.strerror) from error


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Yield a name beside ``path`` to write to, which becomes ``path`` when all is written; on an error nothing of it is left."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise DirtyLogError(f"{str(path)!r} cannot be written", errno=error.errno, reason=error.strerror) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def check_output(path: Path, *, force: bool) -> None:
    """Refuse a file that exists, unless it may be replaced, or that lies in no directory."""
    try:
        exists, in_directory = path.exists(), path.absolute().parent.is_dir()
    except OSError as error:
        raise InvalidArgumentError(f"{str(path)!r} cannot be written", reason=error.strerror) from error
    if exists and not force:
        raise InvalidArgumentError(f"{str(path)!r} exists", remedy="choose another name, or replace it with -f")
    if not in_directory:
        raise InvalidArgumentError(f"{str(path)!r} cannot be written: there is no directory {str(path.parent)!r}")

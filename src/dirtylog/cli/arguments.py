"""Argument types: each turns a word into a value, or says which rule it breaks."""

from __future__ import annotations

import argparse
import math
import threading
from typing import TYPE_CHECKING

from dirtylog.errors import DirtyLogError, InvalidArgumentError
from dirtylog.size import parse_size

if TYPE_CHECKING:
    from pathlib import Path


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
    """Return a number of seconds above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds above 0, and at most {threading.TIMEOUT_MAX:.0f}")
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

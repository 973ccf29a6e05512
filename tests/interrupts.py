"""Ctrl-C at every point where it can arrive, one after the other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import dirtylog

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_SOURCE = str(Path(dirtylog.__file__).parent)


class _InterruptError(BaseException):
    """As a Ctrl-C: no `except Exception` stops it."""


def interrupt(action: Callable[[], object], step: int) -> bool:
    """Run ``action`` and raise at point number ``step`` where a Ctrl-C could arrive in dirtylog; return whether it got that far.

    Python looks for signals where a function begins, and after each call. A with statement's ``__enter__`` is no such call.
    """
    left = step

    def profile(frame: FrameType, event: str, _arg: object) -> None:
        nonlocal left
        if event == "c_call" or (event == "return" and frame.f_code.co_name == "__enter__"):
            return
        if frame.f_code.co_filename.startswith(_SOURCE):
            left -= 1
            if left < 0:
                raise _InterruptError

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        action()
    except _InterruptError:
        return True
    finally:
        sys.setprofile(before)
    return False

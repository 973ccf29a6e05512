"""Programs and libraries in C that tests need, compiled when they are first wanted."""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

_SOURCES = Path(__file__).parent


def compiler() -> str | None:
    """Return the C compiler, or None."""
    return shutil.which("gcc") or shutil.which("cc")


@functools.cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="dirtylog-built-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    folder.chmod(0o755)
    return folder


@functools.cache
def built(source: str, *flags: str) -> Path:
    """Return what a source becomes; skip the test where there is no compiler."""
    found = compiler()
    if found is None:
        pytest.skip("no C compiler")
    target = _folder() / "-".join((Path(source).stem, *(flag.strip("-") for flag in flags)))
    subprocess.run([found, "-O2", "-Wall", "-Wextra", "-pthread", *flags, "-o", target, _SOURCES / source], check=True)
    return target

"""A target of each kind, as words of a command line."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from kvm_here import missing_kvm

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS = ("emulated", "kvm", "command", "pid", "buffer")
GUEST = ("--size", "2MiB")
SPIN = "a = bytearray(4 << 20)\nwhile True:\n for i in range(0, len(a), 4096): a[i] = (a[i] + 1) % 256"
"""A Python program that writes 4 MiB over and over."""


@contextmanager
def named(kind: str) -> Iterator[list[str]]:
    """Yield the words that name a target of a kind; a process runs until then. Skips the test where there is none."""
    if kind == "kvm" and (missing := missing_kvm()):
        pytest.skip(missing)
    if kind == "command":
        yield ["--", sys.executable, "-c", SPIN]
    elif kind == "pid":
        with subprocess.Popen([sys.executable, "-c", f"print(flush=True)\n{SPIN}"], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            yield [f"pid:{process.pid}"]
            process.kill()
    else:
        yield [{"emulated": "emu:arm64:random", "kvm": "kvm:random", "buffer": "buffer:random"}[kind], *GUEST]

"""Every source that can be soaked, what keeps it from being soaked here, and how long each part of its soak takes."""

from __future__ import annotations

import importlib.util
import time
import traceback
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import pytest

from built import compiler
from dirtylog import UnsupportedError
from dirtylog.emulated.arch import PORTS
from dirtylog.options import Log
from kvm_here import missing_kvm
from shadows import no_swap
from soak_buffers import soak_kinds
from soak_ends import soak_ended, soak_killed
from soak_rounds import Soaking, trouble
from soak_subjects import Buffer, Guest, Process
from soak_tally import Tally
from uffd_here import missing_uffd_here
from victims import missing_victims

if TYPE_CHECKING:
    from collections.abc import Callable

    from soak_subjects import Subject

_LONGEST_PART = 12.0
"""Seconds after which a source is made anew, with other sizes."""

_SUBJECTS: dict[str, Callable[[Random], Subject]] = {
    **{name: partial(Guest, name) for name in PORTS},
    **{f"kvm-{log.value}": partial(Guest, f"kvm-{log.value}") for log in Log},
    "buffer-uffd": partial(Buffer, "uffd"),
    "buffer-compare": partial(Buffer, "compare"),
    "process-uffd": partial(Process, "uffd"),
    "process-compare": partial(Process, "compare"),
}
_OTHERS: dict[str, Callable[[Random, Tally, float], None]] = {
    "buffers-of-all-kinds": soak_kinds,
    "process-killed": soak_killed,
    "process-ends": soak_ended,
}
SOURCES = (*_SUBJECTS, *_OTHERS)


def missing(source: str) -> str | None:
    """Return what keeps a source from being soaked here, or None."""
    if source in PORTS:
        return None if importlib.util.find_spec("unicorn") is not None else "Unicorn is not installed"
    if source.startswith("kvm-"):
        return missing_kvm()
    if source.startswith("buffer"):
        return "no C compiler" if compiler() is None else None if source == "buffer-compare" else missing_uffd_here()
    return missing_victims() or (None if no_swap() else "there is swap: what is swapped out would be taken for not there")


def soak(source: str, seed: int, seconds: float, reports: int | None = None) -> Tally:
    """Soak one source for so long, or until so many pages have been reported; tell what was counted, and what went wrong."""
    tally = Tally(source, seed)
    tally.skipped = missing(source)
    if tally.skipped is not None:
        return tally
    rng = Random(f"{source} {seed}")
    began = time.monotonic()
    try:
        while (left := began + seconds - time.monotonic()) > 0 and (reports is None or tally.reports < reports):
            with trouble(rng, tally):
                part = min(left, rng.uniform(1.0, _LONGEST_PART))
                if source in _OTHERS:
                    _OTHERS[source](rng, tally, part)
                else:
                    with _SUBJECTS[source](rng) as subject:
                        Soaking(subject, rng, tally).run(part, reports)
        if not tally.reports:
            tally.error = "nothing was reported"
    except (pytest.skip.Exception, UnsupportedError) as error:
        if tally.reports:
            raise
        tally.skipped = str(error)
    except Exception:  # noqa: BLE001 - whatever goes wrong is this source's result, and the others are soaked all the same
        tally.error = traceback.format_exc()
    tally.seconds = time.monotonic() - began
    return tally

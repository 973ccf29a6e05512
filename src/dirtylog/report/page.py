"""The page: one HTML file that needs nothing else, and may load nothing.

Its Content-Security-Policy allows no network, and no script but the two that are in it, each by its hash. Whatever a stranger may
have named, such as a mapping, is in the compressed data alone, never in HTML, and the script puts it on the page as text.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import math
import re
import string
import zlib
from dataclasses import asdict
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from dirtylog.errors import UnsupportedError
from dirtylog.report.axis import lay_out
from dirtylog.report.hottest import hottest
from dirtylog.report.payload import MAX_RUNS, coarsen, columns_of, pack
from dirtylog.report.symbols import Symbols

if TYPE_CHECKING:
    from dirtylog.observe.footprint import Curve
    from dirtylog.recording.reader import Recording
    from dirtylog.report.axis import Axis

_SCRIPTS = ("unpack.js", "words.js", "axis.js", "bins.js", "heat.js", "precopy.js", "footprint.js", "tables.js", "main.js")
_FACTS = (
    *("target", "port", "exactness", "page_size", "blind_spots", "incomplete", "started", "status", "dirtylog"),
    *("machine", "kernel", "faults", "image", "held"),
)
_BODY = re.compile(r"(.{,2000}?this, )(\(\) => \{.*\})(\)\);)", re.DOTALL)
"""Plotly's file: the middle is the function that makes all of it."""
_POLICY = "default-src 'none'; script-src {}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"


def page(recording: Recording, *, max_runs: int = MAX_RUNS) -> str:
    """Return the page for a recording; :class:`UnsupportedError` if Plotly is not installed."""
    script, plotly = _script(), _plotly()
    policy = _POLICY.format(" ".join(f"'sha256-{_base64(hashlib.sha256(text.encode()).digest())}'" for text in (script, plotly)))
    return string.Template(_web("page.html")).substitute(
        policy=policy,
        style=_web("page.css"),
        script=script,
        plotly=_base64(zlib.compress(plotly.encode(), 9)),
        data=_base64(_data(recording, max_runs)),
    )


def _plotly() -> str:
    try:
        text = str(importlib.import_module("plotly.offline").get_plotlyjs()).rstrip()
    except ImportError as error:
        raise UnsupportedError("a page needs Plotly", remedy="install it: pip install 'dirtylog[report]'") from error
    # Browsers read a function twice, unless parentheses say that it is called at once: this one has 5 MB.
    found = _BODY.fullmatch(text)
    return text if found is None else "{}({}){}".format(*found.groups())


def _script() -> str:
    return '(() => {\n"use strict";\n' + "\n".join(map(_web, _SCRIPTS)) + "})();\n"


def _data(recording: Recording, max_runs: int) -> bytes:
    rounds = recording.rounds
    axis = lay_out(recording.slots, recording.runs())
    coarse = coarsen(axis.writes, len(rounds), max_runs)
    head = {
        "facts": {name: _plain(recording.facts.get(name)) for name in _FACTS},
        "page_size": axis.page_size,
        "regions": [asdict(region) | {"address": hex(region.address)} for region in axis.regions],
        "marks": [[mark.seconds, mark.text] for mark in recording.marks],
        "curve": _curve(recording.footprint()),
        "hottest": _hottest(recording, axis),
        "runs": len(axis.writes.first),
        "merged_rounds": coarse.rounds,
        "merged_pages": coarse.pages,
    }
    columns = {
        "began": np.diff(_microseconds(rounds["began"]), prepend=0),
        "seconds": _microseconds(rounds["seconds"]),
        "get_seconds": _microseconds(rounds["get_seconds"]),
        "pages": rounds["pages"],
        "nbytes": rounds["nbytes"],
    }
    return pack(head, columns | columns_of(coarse.writes, -(-len(rounds) >> coarse.rounds)))


def _curve(curve: Curve) -> dict[str, Any]:
    return {
        "seconds": curve.seconds.tolist(),
        "nbytes": curve.nbytes.tolist(),
        "error": [None if math.isnan(error) else error for error in curve.error.tolist()],
        "tenths": None if curve.tenths is None else curve.tenths.tolist(),
        "shape": None if curve.shape is None else curve.shape.tolist(),
        "capacity": curve.capacity,
    }


def _hottest(recording: Recording, axis: Axis) -> list[dict[str, Any]]:
    image = recording.facts.get("image")
    symbols = Symbols(recording.slots, None if image is None else str(image), recording.facts.get("started"))
    rows = []
    for stretch in hottest(axis, len(recording.rounds)):
        address = axis.address_of(stretch.first)
        names = symbols.find(address, address + stretch.npages * axis.page_size)
        rows.append(asdict(stretch) | {"symbols": names})
    return rows


def _microseconds(seconds: np.ndarray[tuple[int], np.dtype[np.float64]]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    # In order whatever the clock said: they are told by their differences.
    return np.maximum(np.rint(seconds * 1e6), 0).astype(np.int64)


def _plain(fact: Any) -> Any:  # noqa: ANN401 - what JSON has
    return fact if fact is None or isinstance(fact, bool | int | float | str) else [str(part) for part in fact]


def _web(name: str) -> str:
    return (files(__package__) / "web" / name).read_text("utf-8")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()

"""The picture, for papers: pages against time, the rate below it, and D(t)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np

from dirtylog.errors import UnsupportedError
from dirtylog.report.axis import lay_out
from dirtylog.report.bins import COLUMNS, cells
from dirtylog.size import format_size

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from dirtylog.recording.reader import Recording
    from dirtylog.report.axis import Axis

_Drawing = Any
"""What is Matplotlib's: it has types only for those who install it."""

_DPI = 150
_SPARSE = 20
_RED, _BLUE, _GREY = "#a61b32", "#2b5fb3", "#8a929b"
_SCALE = ("#fff3c4", "#fdc466", "#f98043", "#d32f34", "#7a0a2e")
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.linewidth": 0.7,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "pdf.fonttype": 42,  # text stays text: Type 3 fonts are refused by many a publisher
    "svg.fonttype": "none",
    # A name between dollar signs is no formula.
    "text.parse_math": False,
}


def picture(recording: Recording, path: Path, kind: str) -> None:
    """Draw it into a file of a kind that Matplotlib knows: png, svg, pdf."""
    try:
        mpl, figures = importlib.import_module("matplotlib"), importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise UnsupportedError("a picture needs Matplotlib", remedy="install it: pip install 'dirtylog[plot]'") from error
    axis = lay_out(recording.slots, recording.runs())
    with mpl.rc_context(_STYLE):
        figure = figures.Figure(figsize=(11, 6), layout="constrained")
        left, right = figure.subfigures(1, 2, width_ratios=(2.6, 1))
        above, rate = left.subplots(2, 1, sharex=True, height_ratios=(2.8, 1))
        curve, facts = right.subplots(2, 1, height_ratios=(1.3, 1))
        edges = _edges(recording)
        _draw_pages(left, above, axis, edges)
        _draw_rate(rate, recording, edges)
        _draw_curve(curve, recording)
        _draw_marks(above, rate, recording, edges)
        _write_facts(facts, recording)
        for part in (above, rate, curve):
            part.tick_params(width=0.7, length=3)
        figure.savefig(path, dpi=_DPI, format=kind)


def _edges(recording: Recording) -> NDArray[np.float64]:
    """Return when each round began, and when the last ended."""
    return np.append(recording.rounds["began"], recording.duration) if len(recording.rounds) else np.array([0.0, 1.0])


def _draw_pages(figure: _Drawing, axes: _Drawing, axis: Axis, edges: NDArray[np.float64]) -> None:
    axes.set_xlim(edges[0], edges[-1])
    if not axis.npages:
        axes.text(0.5, 0.5, "no page was written", transform=axes.transAxes, ha="center")
        axes.set_yticks([])
        return
    found = cells(axis.writes, axis.npages, len(edges) - 1)
    written = found.shares[found.shares > 0]
    highest, lowest = float(written.max()), float(written.min())
    # Where most cells would be as good as white beside the fullest.
    colors = importlib.import_module("matplotlib.colors")
    sparse = np.median(written) < highest / _SPARSE
    norm = colors.LogNorm(min(lowest, highest / 10), highest) if sparse else colors.Normalize(0, highest)
    scale = colors.LinearSegmentedColormap.from_list("written", _SCALE)
    shares = np.ma.masked_equal(found.shares, 0)
    mesh = axes.pcolormesh(edges[found.rounds], found.pages, shares, cmap=scale, norm=norm, rasterized=True)
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, fraction=0.03, format=lambda share, _: f"{share * 100:.3g} %")
    bar.set_label("share of the pages written in a round")
    bar.outline.set_linewidth(0.5)
    axes.set_ylim(0, axis.npages)
    _name_regions(axes, axis)


_LABEL_SHARE = 1 / 32


def _name_regions(axes: _Drawing, axis: Axis) -> None:
    """Write the names of the regions, of the largest where they would be too close; addresses where there is one region alone."""
    if len(axis.regions) == 1:
        region = axis.regions[0]
        step = 1 << max(0, (axis.npages // 6).bit_length())
        first = -(-(region.address // axis.page_size) // step) * step - region.address // axis.page_size
        ticks = list(range(first, axis.npages + 1, step))
        axes.set_yticks(ticks, [f"{region.address + tick * axis.page_size:#x}" for tick in ticks])
        axes.set_ylabel(_short(region.label, 40))
        return
    labelled: list[tuple[float, str]] = []
    for region in sorted(axis.regions, key=lambda region: -region.npages):
        middle = region.start + region.npages / 2
        if all(abs(middle - other) > axis.npages * _LABEL_SHARE for other, _ in labelled):
            labelled.append((middle, _short(region.label, 24)))
    axes.set_yticks([middle for middle, _ in labelled], [label for _, label in labelled])
    for region in axis.regions[1:]:
        axes.axhline(region.start, color=_GREY, linewidth=0.5)


def _draw_rate(axes: _Drawing, recording: Recording, edges: NDArray[np.float64]) -> None:
    rounds = recording.rounds
    axes.set(xlabel="time (s)", ylabel="rate")
    axes.grid(color="#e6e8eb", linewidth=0.6)
    axes.set_axisbelow(True)
    if len(rounds):
        wide = -(-len(rounds) // COLUMNS)
        begins = np.arange(0, len(rounds), wide)
        rate = np.add.reduceat(rounds["nbytes"], begins) / np.maximum(np.add.reduceat(rounds["seconds"], begins), 1e-9)
        axes.stairs(rate, np.append(edges[begins], edges[-1]), fill=True, color=_RED, alpha=0.2)
        axes.stairs(rate, np.append(edges[begins], edges[-1]), color=_RED, linewidth=0.9)
        axes.set_ylim(bottom=0)
        _byte_ticks(axes, float(rate.max()), "/s")


def _byte_ticks(axes: _Drawing, top: float, per: str) -> None:
    step = 1 << max(0, int(top / 4).bit_length())
    ticks = np.arange(0, top * 1.05 + 1, step)
    axes.set_yticks(ticks, [f"{format_size(tick)}{per}" if tick else "0" for tick in ticks.tolist()])


def _draw_curve(axes: _Drawing, recording: Recording) -> None:
    curve = recording.footprint()
    axes.set(xlabel="t", ylabel="written within t")
    positive = curve.nbytes > 0
    if not positive.any():
        axes.set(xticks=[], yticks=[])
        return
    axes.set(xscale="log", yscale="log")
    axes.grid(color="#e6e8eb", linewidth=0.6)
    axes.set_axisbelow(True)
    if curve.tenths is not None:
        low, high = curve.tenths[:, positive]
        axes.fill_between(curve.seconds[positive], low, high, where=low > 0, color=_RED, alpha=0.13, linewidth=0)
    axes.errorbar(
        curve.seconds[positive],
        curve.nbytes[positive],
        np.nan_to_num(curve.error[positive]),
        color=_RED,
        marker="o",
        markersize=3.5,
        linewidth=1,
        capsize=2,
    )
    low, high = axes.get_ylim()
    powers = np.arange(np.ceil(np.log2(low)), np.floor(np.log2(high)) + 1)
    powers = powers[:: max(1, -(-len(powers) // 6))]
    axes.set_yticks(2**powers, [format_size(size) for size in (2**powers).tolist()])
    axes.xaxis.set_major_formatter(lambda seconds, _: _seconds(seconds))
    axes.minorticks_off()


def _write_facts(axes: _Drawing, recording: Recording) -> None:
    facts, rounds = recording.facts, recording.rounds
    duration = recording.duration
    gets = f"{rounds['get_seconds'].sum() / duration * 100:.2g} % of the time in gets" if duration else "no round"
    lines = (
        ("target", _short(str(facts["target"]), 40)),
        ("port", f"{facts['port']} ({facts['exactness']})"),
        ("page size", format_size(facts["page_size"])),
        ("time", f"{_seconds(duration)} in {len(rounds)} rounds"),
        ("written", f"{format_size(int(rounds['nbytes'].sum()))} in {rounds['pages'].sum()} pages"),
        ("overhead", gets),
        *(("incomplete", _short(str(gap), 40)) for gap in facts["incomplete"][:2]),
    )
    axes.set_axis_off()
    for number, (name, text) in enumerate(lines):
        height = 0.95 - number * 0.12
        axes.text(0.0, height, name, color="#5d6670", fontsize=8, va="top")
        axes.text(0.27, height, text, fontsize=8, va="top")


def _seconds(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit * (1 - 1e-9):
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.1g} s"


def _draw_marks(above: _Drawing, rate: _Drawing, recording: Recording, edges: NDArray[np.float64]) -> None:
    """Draw a line for each mark, and as many texts as have room."""
    length, free = edges[-1] - edges[0], -np.inf
    for mark in recording.marks:
        for axes in (above, rate):
            axes.axvline(mark.seconds, color=_BLUE, linewidth=0.8, linestyle=":")
        text = _short(mark.text, 28)
        if mark.seconds >= free:
            above.annotate(
                text,
                (mark.seconds, 1),
                (2, 2),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                color=_BLUE,
                fontsize=7.5,
            )
            free = mark.seconds + length * (len(text) + 2) / 110


def _short(text: str, length: int) -> str:
    """Return a stranger's text, not too long, without what breaks lines, turns them round, or is no text."""
    short = text if len(text) <= length else f"{text[: length - 1]}…"
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in short)

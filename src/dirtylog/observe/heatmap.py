"""A picture of which pages were written when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dirtylog.errors import UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from dirtylog.bitmap import DirtyBitmap

_MIB = 1 << 20


class HeatMap:
    """Round by round, what share of each stretch of a slot was written.

    A slot of ``npages`` pages is cut into at most ``rows`` stretches of equal length.
    """

    def __init__(self, npages: int, page_size: int, rows: int = 256) -> None:
        self.npages = npages
        self.page_size = page_size
        self._pages_per_row = -(-npages // rows)
        self._rows = -(-npages // self._pages_per_row)
        self._columns: list[NDArray[np.float64]] = []
        self._seconds = 0.0

    def add(self, dirty: DirtyBitmap, seconds: float) -> None:
        """Add a round that took this long."""
        self._columns.append(np.bincount(dirty.pages() // self._pages_per_row, minlength=self._rows).astype(np.float64))
        self._seconds += seconds

    def shares(self) -> NDArray[np.float64]:
        """Return float64[stretches, rounds]: the share of a stretch's pages that a round wrote, 0 to 1."""
        sizes = np.full(self._rows, float(self._pages_per_row))
        sizes[-1] = self.npages - self._pages_per_row * (self._rows - 1)
        columns = np.stack(self._columns, axis=1) if self._columns else np.empty((self._rows, 0))
        return np.asarray(columns / sizes[:, None])

    def save(self, path: Path, title: str) -> None:
        """Write the picture; the suffix of ``path`` chooses the format (png, svg, pdf)."""
        try:
            from matplotlib.figure import Figure  # noqa: PLC0415 - an extra, and slow to import
        except ImportError as error:
            raise UnsupportedError("a picture needs Matplotlib", remedy="install it: pip install 'dirtylog[plot]'") from error
        shares = self.shares()
        figure = Figure(figsize=(10, 6), dpi=120, layout="constrained")
        axes = figure.add_subplot()
        total = self.npages * self.page_size / _MIB
        # Cell edges, so that each round stands between its number and the next and each stretch at its offset.
        edges = np.minimum(np.arange(self._rows + 1) * self._pages_per_row, self.npages) * self.page_size / _MIB
        mesh = axes.pcolormesh(
            np.arange(shares.shape[1] + 1) + 0.5, edges, np.ma.masked_equal(shares * 100, 0), cmap="YlOrRd", vmin=0, vmax=100
        )
        axes.set(xlabel="round", ylabel="page offset in the slot (MiB)", ylim=(0, total), title=title)
        axes.set_facecolor("white")
        if self._seconds:
            length = self._seconds / len(self._columns)
            axes.secondary_xaxis(
                "top",
                functions=(
                    lambda edge: (np.asarray(edge, float) - 0.5) * length,
                    lambda seconds: np.asarray(seconds, float) / length + 0.5,
                ),
            ).set_xlabel("time (s)")
        bar = figure.colorbar(mesh, ax=axes)
        bar.set_label(f"pages written in the round (% of each {self._pages_per_row * self.page_size // 1024} KiB; white: none)")
        figure.savefig(path)

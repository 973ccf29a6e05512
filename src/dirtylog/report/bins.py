"""Runs into cells of a picture; the page does the same in web/bins.js."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dirtylog.report.axis import Writes

ROWS = 400
COLUMNS = 600


class Cells(NamedTuple):
    """Shares of the pages of a stretch that a round wrote, the mean over some rounds: float64[stretches, groups of rounds].

    ``pages`` and ``rounds`` are the edges of the cells, one more than there are.
    """

    shares: NDArray[np.float64]
    pages: NDArray[np.int64]
    rounds: NDArray[np.int64]


def cells(writes: Writes, npages: int, rounds: int, *, rows: int = ROWS, columns: int = COLUMNS) -> Cells:
    """Cut pages and rounds into at most so many rows and columns, and say how full each cell is."""
    tall, wide = -(-npages // rows), -(-rounds // columns)
    page_edges = np.minimum(np.arange(-(-npages // tall) + 1) * tall, npages)
    round_edges = np.minimum(np.arange(-(-rounds // wide) + 1) * wide, rounds)
    shape = len(page_edges), len(round_edges) - 1
    column = writes.rounds // wide
    low, high = writes.first // tall, (writes.end - 1) // tall
    # What is before a page is the sum of whole rows, and of what each run lacks of its first and has of its last.
    whole = _added(low, column, shape) - _added(high, column, shape)
    pages = np.cumsum(whole, axis=0) * tall
    pages += _added(high, column, shape, writes.end - high * tall) - _added(low, column, shape, writes.first - low * tall)
    sizes = np.diff(page_edges)[:, None] * np.diff(round_edges)[None, :]
    return Cells(pages[:-1] / sizes, page_edges, round_edges)


def _added(
    rows: NDArray[np.int64], columns: NDArray[np.int64], shape: tuple[int, int], weights: NDArray[np.int64] | None = None
) -> NDArray[np.float64]:
    flat = np.bincount(rows * shape[1] + columns, weights, minlength=shape[0] * shape[1])
    return flat.astype(np.float64).reshape(shape)

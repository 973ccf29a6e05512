"""The heat map: each share is that of its stretch's pages, and the picture is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from dirtylog import DirtyBitmap
from dirtylog.observe.heatmap import HeatMap

if TYPE_CHECKING:
    from pathlib import Path


def test_shares_are_of_each_stretch_the_last_of_which_may_be_shorter() -> None:
    heat = HeatMap(npages=10, page_size=4096, rows=3)
    heat.add(DirtyBitmap.from_pages(10, [0, 1, 8]), 0.1)
    heat.add(DirtyBitmap(10), 0.1)
    heat.add(DirtyBitmap.from_pages(10, range(10)), 0.1)
    assert heat.shares().tolist() == [[0.5, 0, 1], [0, 0, 1], [0.5, 0, 1]]


def test_a_slot_of_few_pages_has_a_row_a_page() -> None:
    heat = HeatMap(npages=3, page_size=4096)
    heat.add(DirtyBitmap.from_pages(3, [2]), 1.0)
    assert heat.shares().tolist() == [[0.0], [0.0], [1.0]]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_picture_is_of_its_suffix_s_kind(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    heat = HeatMap(npages=1000, page_size=4096)
    for number in range(5):
        heat.add(DirtyBitmap.from_pages(1000, np.arange(number * 100, number * 100 + 150)), 0.1)
    path = tmp_path / f"heat.{suffix}"
    heat.save(path, "title")
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml", b"%PDF-")


def test_a_picture_without_rounds_is_still_one(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    HeatMap(npages=10, page_size=4096).save(tmp_path / "empty.png", "nothing")
    assert (tmp_path / "empty.png").stat().st_size > 0

"""The page in a real browser, without a network: it draws, and zooms to what the recording has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from chromium import Opened, chromium, needs_chromium, opened
from dirtylog import MemorySlot
from recorded import SECONDS, reported

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from playwright.sync_api import Browser

pytest.importorskip("plotly", reason="Plotly is not installed")
pytestmark = needs_chromium

HOSTILE = "<b>&gt;</b><img src=x onerror=alert(1)><a href='https:example.org'>\u202e"
DASH = "\N{EN DASH}"
ROUNDS, HEAP, FILE = 900, 3000, 700
SLOTS = (
    MemorySlot(0, 0x1000, HEAP, name="[heap]", permissions="rw-p", anonymous=True),
    MemorySlot(1, 0x7F000, FILE, name=HOSTILE, permissions="rw-s"),
    MemorySlot(2, 0xFFFFFFFFFF000, 64, name="[stack]", permissions="rw-p", anonymous=True),
)


def scene() -> NDArray[np.bool_]:
    """Return bool[rounds, pages]: what is written, on the axis of the page. A hot stretch, a sweep, single pages."""
    random = np.random.default_rng(900)
    dense = random.random((ROUNDS, HEAP + FILE + 64)) < 0.004
    dense[:, 100:150] = True
    for number in range(ROUNDS):
        start = HEAP + number * 3 % (FILE - 40)
        dense[number, start : start + 40] = True
    # The first and the last of each slot, that all of it is shown.
    dense[0, [0, HEAP - 1, HEAP, HEAP + FILE - 1, HEAP + FILE, -1]] = True
    return dense


DENSE = scene()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    bounds = (0, HEAP, HEAP + FILE, HEAP + FILE + 64)
    rounds = ({place: np.flatnonzero(row[bounds[place] : bounds[place + 1]]).tolist() for place in range(3)} for row in DENSE)
    facts: dict[str, Any] = {"target": HOSTILE, "marks": {90: "warm", 450: HOSTILE}, "incomplete": (HOSTILE,), "faults": 1234}
    return reported(tmp_path_factory.mktemp("report"), SLOTS, rounds, **facts)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def once(browser: Browser, files: tuple[Path, Path]) -> Iterator[Opened]:
    with opened(browser, files[1]) as shown:
        yield shown


@pytest.fixture
def shown(once: Opened) -> Opened:
    """The page as it was when it was opened."""
    once.page.click("#whole")
    once.page.mouse.move(0, 0)
    return once


def bins(shown: Opened) -> dict[str, Any]:
    found = shown.page.evaluate(
        """async () => {
            const { heat } = await window.dirtylog;
            const { data, layout } = document.getElementById("heat");
            return { ...heat.bins, pages: Array.from(heat.bins.pages), z: data[0].z, drawn: [data[0].x, data[0].y],
                     logarithmic: heat.logarithmic, range: [layout.xaxis.range, layout.yaxis.range] };
        }"""
    )
    assert isinstance(found, dict)
    return found


def check_cells(found: dict[str, Any], dense: NDArray[np.bool_] = DENSE) -> None:
    """Compare every cell, as counted and as drawn, with what was written."""
    part = dense[found["round0"] : found["round1"], found["low"] : found["high"]]
    by_round = np.add.reduceat(part.astype(np.int64), np.arange(0, part.shape[0], found["wide"]), axis=0)
    pages = np.add.reduceat(by_round, np.arange(0, part.shape[1], found["tall"]), axis=1).T
    assert pages.shape == (found["rows"], found["columns"])
    assert np.array_equal(np.array(found["pages"]).reshape(pages.shape), pages)
    sizes = np.diff(found["y"])[:, None] * np.diff(np.append(np.arange(0, part.shape[0], found["wide"]), part.shape[0]))[None, :]
    drawn = np.array([[0 if cell is None else cell for cell in row] for row in found["z"]], float)
    empty = np.array([[cell is None for cell in row] for row in found["z"]])
    drawn = np.where(empty, 0, 10**drawn) if found["logarithmic"] else drawn
    assert np.allclose(drawn, pages / sizes)
    assert np.array_equal(empty, pages == 0)
    assert found["drawn"] == [found["x"], found["y"]]
    assert np.allclose(found["x"], np.append(np.arange(found["round0"], found["round1"], found["wide"]), found["round1"]) * SECONDS)


def test_it_draws_without_an_error_and_asks_for_nothing(shown: Opened, files: tuple[Path, Path]) -> None:
    for chart in ("heat", "curve"):
        box = shown.page.locator(f"#{chart} .main-svg").first.bounding_box()
        assert box is not None
        assert box["width"] > 400
        assert box["height"] > 200
    assert shown.page.locator("#heat .heatmaplayer image").count() == 1
    assert shown.page.locator("#heat .scatterlayer .trace").count() == 2
    assert shown.page.locator("#curve .errorbars").count() > 0
    assert not shown.page.locator("#trouble").is_visible()
    assert shown.said == []
    assert shown.requests == [files[1].as_uri()]


def test_no_button_sends_anything_away(shown: Opened) -> None:
    buttons = set(shown.page.eval_on_selector_all(".modebar-btn", "buttons => buttons.map(button => button.dataset.title)"))
    assert buttons == {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}


def test_names_of_strangers_are_text(shown: Opened) -> None:
    labels = shown.page.locator("#heat .ytick text").all_text_contents()
    assert sorted(labels) == ["<b>&gt;</b><img src…", "[heap]", "[stack]"]
    assert "<b>&gt;</b><img src=x onerr…" in shown.page.locator("#heat .annotation-text").all_text_contents()
    assert shown.page.locator("img").count() == 0
    assert shown.page.locator("a[href^=https]").count() == 0
    told = HOSTILE.replace("\u202e", "\ufffd")
    assert shown.page.locator("h1").text_content() == told
    assert told in (shown.page.locator("#warnings").text_content() or "")
    assert told in (shown.page.locator("#facts").text_content() or "")
    assert shown.said == []


def test_marks_and_facts_are_there(shown: Opened) -> None:
    assert "warm" in shown.page.locator("#heat .annotation-text").all_text_contents()
    facts = shown.page.locator("#facts").inner_text()
    for text in ("uffd (superset", "4 KiB", "writes of the moon", "900 rounds", "6.2 % of the time in gets", "1,234 (11 a second)"):
        assert text in facts


def test_all_of_the_recording_is_seen_at_first(shown: Opened) -> None:
    found = bins(shown)
    assert (found["round0"], found["round1"], found["low"], found["high"]) == (0, ROUNDS, 0, DENSE.shape[1])
    assert (found["wide"], found["tall"]) == (3, 16)
    check_cells(found)


def test_a_zoom_bins_anew_down_to_single_pages_and_rounds(shown: Opened) -> None:
    shown.page.evaluate("""Plotly.relayout("heat", { "xaxis.range": [10, 20], "yaxis.range": [90, 160] })""")
    found = bins(shown)
    assert (found["wide"], found["tall"]) == (1, 1)
    assert (found["round0"], found["round1"], found["low"], found["high"]) == (80, 160, 90, 160)
    check_cells(found)
    assert shown.page.locator("#heat .ytick text").first.text_content() == "0x1060000"


def test_a_drag_of_the_mouse_zooms(shown: Opened) -> None:
    box = shown.page.locator("#heat .nsewdrag[data-subplot=xy]").bounding_box()
    assert box is not None
    places = [(box["x"] + box["width"] * across, box["y"] + box["height"] * down) for across, down in ((0.25, 0.4), (0.3, 0.5))]
    shown.page.mouse.move(*places[0])
    shown.page.mouse.down()
    shown.page.mouse.move(*places[1], steps=8)
    shown.page.mouse.up()
    shown.page.wait_for_function("window.dirtylog.then(({ heat }) => heat.bins.wide === 1)")
    found = bins(shown)
    assert found["tall"] == 2
    (left, right), (bottom, top) = found["range"]
    assert left == pytest.approx(0.25 * ROUNDS * SECONDS, abs=1)
    assert right == pytest.approx(0.3 * ROUNDS * SECONDS, abs=1)
    assert bottom == pytest.approx(0.5 * DENSE.shape[1], abs=40)
    assert top == pytest.approx(0.6 * DENSE.shape[1], abs=40)
    check_cells(found)
    shown.page.mouse.dblclick(*places[0])
    shown.page.wait_for_function("window.dirtylog.then(({ heat }) => heat.bins.wide === 3)")
    check_cells(bins(shown))


def test_one_slot_may_be_chosen_and_the_rate_is_its_own(shown: Opened) -> None:
    shown.page.select_option("#region", "2")
    found = bins(shown)
    assert (found["low"], found["high"], found["tall"]) == (HEAP + FILE, HEAP + FILE + 64, 1)
    check_cells(found)
    rate = shown.page.evaluate("document.getElementById('heat').data.at(-1).y")
    part = DENSE[:, HEAP + FILE :].sum(axis=1).reshape(-1, 3).sum(axis=1) * 4096 / (3 * SECONDS)
    assert np.allclose(rate[:-1], part)
    shown.page.select_option("#region", "")
    rate = shown.page.evaluate("document.getElementById('heat').data.at(-1).y")
    assert np.allclose(rate[:-1], DENSE.sum(axis=1).reshape(-1, 3).sum(axis=1) * 4096 / (3 * SECONDS))


def test_what_is_pointed_at_is_told(shown: Opened) -> None:
    shown.page.evaluate("""Plotly.relayout("heat", { "xaxis.range": [10, 12.5], "yaxis.range": [100, 120] })""")
    box = shown.page.locator("#heat .nsewdrag[data-subplot=xy]").bounding_box()
    assert box is not None
    shown.page.mouse.move(box["x"] + box["width"] * 0.475, box["y"] + box["height"] * 0.525)
    shown.page.wait_for_function("document.getElementById('pointed').textContent.trim() !== ''")
    told = f"[heap], 1 page 0x106d000 {DASH} 0x106e000, round 90 (11.125 to 11.250 s): 100 % written"
    assert shown.page.locator("#pointed").text_content() == told


def test_the_hottest_memory_is_listed_and_a_click_shows_it(shown: Opened) -> None:
    first = shown.page.locator("#hottest tbody tr").first
    cells = first.locator("td").all_text_contents()
    assert cells[:4] == ["[heap]", f"0x1064000 {DASH} 0x1096000", "200 KiB", "900 of 900 (100 %)"]
    first.click()
    found = bins(shown)
    assert (found["low"], found["high"], found["tall"]) == (93, 157, 1)
    check_cells(found)


def test_colours_may_be_logarithmic(shown: Opened) -> None:
    for scale in ("log", "linear"):
        shown.page.select_option("#colours", scale)
        found = bins(shown)
        assert found["logarithmic"] is (scale == "log")
        check_cells(found)


def test_the_policy_lets_nothing_out_and_no_other_script_in(tmp_path: Path, browser: Browser) -> None:
    with opened(browser, reported(tmp_path, SLOTS, [{0: [1]}])[1]) as shown:
        out = "fetch('https://example.org/').then(() => 'went', () => 'refused')"
        assert shown.page.evaluate(out) == "refused"
        shown.page.evaluate(
            """() => {
                const script = document.createElement("script");
                script.textContent = "window.ran = true";
                document.head.append(script);
                document.body.insertAdjacentHTML("beforeend", "<b onclick='window.ran = true' id='clicked'>x</b>");
                document.getElementById("clicked").click();
            }"""
        )
        assert shown.page.evaluate("window.ran") is None
        assert shown.requests == [shown.page.url]
        assert len(shown.said) >= 3
        assert all("Content Security Policy" in said for said in shown.said)


@pytest.mark.parametrize("rounds", [[], [{}, {}]])
def test_a_recording_without_writes_says_so(tmp_path: Path, browser: Browser, rounds: list[dict[int, Iterable[int]]]) -> None:
    with opened(browser, reported(tmp_path, SLOTS, rounds, status=None)[1]) as shown:
        assert shown.page.locator("#trouble").text_content() == "No page was written while this was recorded."
        assert "was not ended" in (shown.page.locator("#warnings").text_content() or "")
        assert shown.page.locator("#facts").is_visible()
        assert not shown.page.locator("#heat").is_visible()
        assert shown.said == []


def test_one_round_of_one_page_is_drawn(tmp_path: Path, browser: Browser) -> None:
    with opened(browser, reported(tmp_path, SLOTS, [{2: [63]}])[1]) as shown:
        found = bins(shown)
        assert (found["rows"], found["columns"], sum(found["pages"])) == (found["high"], 1, 1)
        assert shown.page.locator("#hottest tbody td").all_text_contents()[1] == f"0xffffffffff03f000 {DASH} 0xffffffffff040000"
        assert shown.said == []


def test_large_numbers_are_told_as_they_are(tmp_path: Path, browser: Browser) -> None:
    slot = MemorySlot(0, 0, 1 << 21, 1 << 21)
    with opened(browser, reported(tmp_path, [slot], [{0: range(1 << 21)}, {0: range(7, 1 << 21)}])[1]) as shown:
        assert "8 TiB in 4,194,297 pages, 2 runs" in shown.page.locator("#facts").inner_text()
        assert shown.page.locator("#hottest tbody tr").count() == 1
        assert shown.said == []


def test_a_coarse_page_says_so_and_has_all_that_was_written(tmp_path: Path, browser: Browser) -> None:
    pages = [range(number % 7, 3000, 7) for number in range(20)]
    _, output = reported(tmp_path, SLOTS, [{0: chosen} for chosen in pages], max_runs=2000)
    with opened(browser, output) as shown:
        caption = shown.page.locator("#heat-caption").text_content() or ""
        assert "The recording has 8,572 runs" in caption
        assert "pages at a time" in caption
        found = bins(shown)
        assert sum(found["pages"]) >= 3000
        assert shown.said == []

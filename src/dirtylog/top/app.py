"""The screen of ``dirtylog top``, in Textual: keys, colours, and the lines of ``draw.py``."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.app import App
from textual.binding import Binding
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from dirtylog.size import format_size
from dirtylog.top.draw import Choices, Facts, Layout, screen
from dirtylog.top.model import HALF_LIVES, Area
from dirtylog.top.styles import STYLES, colours_of
from dirtylog.top.table import sorted_rows
from dirtylog.top.text import Colours, Line, Terminal, printable

if TYPE_CHECKING:
    from textual.app import ComposeResult

    from dirtylog.top.model import View
    from dirtylog.top.worker import Worker

_FRAMES_PER_SECOND = 8
_NOTICE_SECONDS = 5.0
_NO_STYLE = Style.null()


class Canvas(Widget):
    """The whole screen: lines, of which only those that change are sent."""

    def __init__(self, styles: dict[str, Style]) -> None:
        super().__init__()
        self._by_name = styles
        self._lines: list[Line] = []

    def show(self, lines: list[Line]) -> None:
        """Show other lines."""
        before, self._lines = self._lines, lines
        if len(before) != len(lines):
            self.refresh()
            return
        changed = [row for row, (old, new) in enumerate(zip(before, lines, strict=True)) if old != new]
        if changed:
            self.refresh(*(Region(0, row, self.size.width, 1) for row in changed))

    def render_line(self, y: int) -> Strip:
        """Return one line, as Textual asks for it."""
        if y >= len(self._lines):
            return Strip.blank(self.size.width)
        return Strip([Segment(text, self._by_name.get(style, _NO_STYLE)) for text, style in self._lines[y]], self.size.width)


class TopApp(App[signal.Signals]):
    """The application. It returns the signal that ended it; None if its user quit, or the rounds were over."""

    CSS: ClassVar[str] = "Screen { overflow: hidden; } Canvas { width: 100%; height: 100%; }"
    ENABLE_COMMAND_PALETTE: ClassVar[bool] = False
    BINDINGS: ClassVar = [
        Binding("q", "quit", priority=True),
        Binding("ctrl+c", "interrupt", priority=True),
        Binding("p", "pause"),
        Binding("z,enter", "zoom", priority=True),
        Binding("escape", "out", priority=True),
        Binding("s", "sort"),
        Binding("m", "mark"),
        Binding("t", "time"),
        Binding("plus,equals_sign", "cooling(1)"),
        Binding("minus", "cooling(-1)"),
        Binding("up,k", "select(-1)", priority=True),
        Binding("down,j", "select(1)", priority=True),
        Binding("pageup", "select(-10)", priority=True),
        Binding("pagedown", "select(10)", priority=True),
        Binding("left,h", "row(-1)", priority=True),
        Binding("right,l", "row(1)", priority=True),
        Binding("question_mark", "help"),
    ]

    def __init__(self, name: str, worker: Worker, *, colours: Colours | None = None, unicode: bool = True) -> None:
        super().__init__(ansi_color=True)
        self._target = name
        self._worker = worker
        self._model = worker.model
        self._unicode = unicode
        self._colours = colours_of(self.console, no_color=self.no_color) if colours is None else colours
        self._canvas = Canvas({name: Style.parse(words) for name, words in STYLES[self._colours].items()})
        self._choices = Choices()
        self._areas: list[Area] = []
        self._frozen: View | None = None
        self._silent_from = 0.0

    def compose(self) -> ComposeResult:
        """Return the one widget."""
        yield self._canvas

    def on_mount(self) -> None:
        """Begin to draw."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            # Where the loop is not the first thread's, signals are not ours.
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):
                loop.add_signal_handler(number, self.exit, number)
        self.set_interval(1 / _FRAMES_PER_SECOND, self.draw)
        self.draw()

    def on_resize(self) -> None:
        """Draw anew."""
        self.call_after_refresh(self.draw)

    @property
    def terminal(self) -> Terminal:
        """What the terminal can show now."""
        return Terminal(self.size.width, self.size.height, self._unicode, self._colours)

    def draw(self) -> None:
        """Show what there is now, or what there was when the view was paused."""
        if self._worker.ended.is_set() and self._worker.count is not None and self._worker.error is None:
            self.exit()
        if self._frozen is None and time.monotonic() > self._silent_from:
            self._choices = replace(self._choices, notice="")
        view = self._look()
        self._canvas.show(screen(view, self._facts(view), self._choices, self.terminal))

    def _look(self) -> View:
        if self._frozen is not None:
            return self._frozen
        while self._areas and not self._model.has(self._areas[-1].slot):
            self._areas.pop()
            self._say("that slot has gone")
        layout = Layout.of(self.terminal)
        area = self._areas[-1] if self._areas else None
        cells = max(1, layout.map * layout.columns)
        view = self._model.view(time.perf_counter(), cells, max(1, layout.columns), area, whole=self._choices.whole)
        if view.rows and all(row.slot is not self._choices.selected for row in view.rows):
            self._choices = replace(self._choices, selected=sorted_rows(view.rows, self._choices.sort)[0].slot)
        return view

    def _facts(self, view: View) -> Facts:
        worker, memory, terminal = self._worker, self._worker.memory, self.terminal
        alarm = ""
        if worker.error is not None:
            state, alarm = "ENDED", str(worker.error)
        elif worker.ended.is_set():
            status = getattr(memory, "status", None)
            state = f"ENDED{'' if status is None else f', exit status {status}'}"
        else:
            state = f"{'running' if self._frozen is None else 'PAUSED at'} {view.seconds:.1f} s"
        if worker.incomplete:
            alarm = "; ".join(filter(None, (alarm, f"WRITES MAY HAVE BEEN MISSED: {'; '.join(worker.incomplete)}")))
        size = format_size(sum(row.slot.nbytes for row in view.rows if not row.slot.readonly))
        pages = "/".join(format_size(size) for size in sorted({row.slot.page_size for row in view.rows}))
        count = f"{len(view.rows)} slot{'s' * (len(view.rows) != 1)}"
        about = f"port {memory.port.name} ({memory.exactness.value}), {pages or 'no'} pages, {size} in {count}"
        fallback = getattr(memory, "fallback", "")
        if fallback:
            about += f"; not the best port: {fallback}"
        return Facts(
            printable(self._target, terminal),
            printable(about, terminal),
            state,
            printable(alarm, terminal),
            tuple(printable(blind, terminal) for blind in memory.blind_spots),
        )

    def _say(self, notice: str) -> None:
        self._choices = replace(self._choices, notice=notice)
        self._silent_from = time.monotonic() + _NOTICE_SECONDS

    # --- keys

    def action_interrupt(self) -> None:
        """End as Ctrl-C does it."""
        self.exit(signal.SIGINT)

    def action_pause(self) -> None:
        """Freeze the view, or let it go on."""
        self._frozen = self._look() if self._frozen is None else None
        self._say("the view is paused, and logging goes on: p shows it again" if self._frozen is not None else "")
        self.draw()

    def action_zoom(self) -> None:
        """Show the selected slot alone, or of a slot that is shown alone the chosen row."""
        area = self._chosen_area()
        if self._frozen is not None:
            self._say("the view is paused: p first")
        elif area is None:
            self._say("no closer: a cell is a page")
        else:
            self._areas.append(area)
            self._choices = replace(self._choices, row=0, notice="")
        self.draw()

    def _chosen_area(self) -> Area | None:
        slot, view = self._choices.selected, self._look()
        if not self._areas:
            return None if slot is None else Area(slot, 0, slot.npages)
        columns, area = Layout.of(self.terminal).columns, self._areas[-1]
        start = self._choices.row * columns
        pages = view.map.page[start : start + columns + 1].tolist()
        if view.map.npages == 1 or not pages:
            return None
        end = pages[columns] if len(pages) > columns else area.first + area.npages
        return Area(area.slot, pages[0], end - pages[0])

    def action_out(self) -> None:
        """Show what was shown before the last zoom."""
        if self._choices.help:
            self.action_help()
        elif self._areas and self._frozen is None:
            self._areas.pop()
            self._choices = replace(self._choices, row=0, notice="")
            self.draw()

    def action_sort(self) -> None:
        """Sort by the next column."""
        sort = self._choices.sort.next()
        self._choices = replace(self._choices, sort=sort)
        self._say(f"sorted by {sort.value}")
        self.draw()

    def action_mark(self) -> None:
        """Mark this moment."""
        mark = self._model.mark(time.perf_counter())
        self._say(f"mark {mark.number} at {mark.seconds:.1f} s ({mark.clock})")
        self.draw()

    def action_time(self) -> None:
        """Show the last rounds, or the whole history."""
        self._choices = replace(self._choices, whole=not self._choices.whole)
        self._say("history: the whole" if self._choices.whole else "history: the last rounds")
        self.draw()

    def action_cooling(self, step: int) -> None:
        """Let heat last longer or less long."""
        place = HALF_LIVES.index(self._model.half_life) + step
        self._model.half_life = HALF_LIVES[min(max(0, place), len(HALF_LIVES) - 1)]
        self.draw()

    def action_select(self, step: int) -> None:
        """Select another slot."""
        slots = [row.slot for row in sorted_rows(self._look().rows, self._choices.sort)]
        if slots:
            place = slots.index(self._choices.selected) if self._choices.selected in slots else 0
            self._choices = replace(self._choices, selected=slots[min(max(0, place + step), len(slots) - 1)])
            self.draw()

    def action_row(self, step: int) -> None:
        """Choose another row of the map."""
        columns = Layout.of(self.terminal).columns
        last = max(0, -(-len(self._look().map.level) // columns) - 1)
        self._choices = replace(self._choices, row=min(max(0, self._choices.row + step), last))
        self.draw()

    def action_help(self) -> None:
        """Show what the keys do, or the memory again."""
        self._choices = replace(self._choices, help=not self._choices.help)
        self.draw()

"""Progress as a live panel at the bottom of a terminal."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import IO, SupportsFloat, TextIO, cast

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from forgejax.report.live.board import Board, View, strip_controls
from forgejax.report.live.outlet import Outlet
from forgejax.report.names import Shown, find_shown, format_duration, format_value

_BARS = "▁▂▃▄▅▆▇█"
_NARROW = 28


class PanelProgress:
    """A panel that a thread redraws ``refresh_hz`` times a second; notes and prints scroll above it; see Progress."""

    def __init__(
        self,
        stream: TextIO,
        *,
        steps: int,
        refresh_hz: float = 4.0,
        width: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._outlet = Outlet(stream)
        self._board = Board(steps, clock=clock)
        self._console = Console(file=cast("IO[str]", self._outlet), width=width, force_terminal=True)
        self._live = Live(
            console=self._console,
            get_renderable=lambda: draw_panel(self._board.view(), width=self._console.width),
            refresh_per_second=refresh_hz,
            vertical_overflow="crop",
        )
        self._closing = threading.Lock()
        self._closed = False
        self._live.start()

    @contextmanager
    def phase(self, name: str, detail: str = "") -> Iterator[None]:
        self._board.begin(name, detail)
        outcome = "failed"
        try:
            yield
            outcome = "done"
        finally:
            self._say(f"{name} {outcome} in {format_duration(self._board.end())}")

    def wait(self, describe: Callable[[], str]) -> AbstractContextManager[None]:
        return self._board.wait(describe)

    def step(self, row: Mapping[str, SupportsFloat]) -> None:
        self._board.add_step(row)

    def note(self, text: str) -> None:
        for line in text.splitlines():
            self._say(f"note: {line}")

    def _say(self, text: str) -> None:
        """Writes ``text`` above the panel, where it scrolls away like any output."""
        stamp = f"[{format_duration(self._board.elapsed_s):>7}] "
        self._console.print(Text.assemble((stamp, "dim"), strip_controls(text)), soft_wrap=True)

    def close(self) -> None:
        with self._closing:
            if not self._closed:
                self._closed = True
                self._live.stop()
                self._outlet.close()


def draw_sparkline(values: Sequence[float], width: int) -> str:
    """The last ``width`` values in [0, 1] as bars, a non-finite one as a space."""
    marks = []
    for value in values[-width:] if width > 0 else ():
        level = min(max(value, 0.0), 1.0) if math.isfinite(value) else None
        marks.append(" " if level is None else _BARS[round(level * (len(_BARS) - 1))])
    return "".join(marks)


def draw_panel(view: View, *, width: int) -> RenderableType:
    """The panel for a terminal of ``width`` columns; no line of it is wider."""
    figures = [_line(_figure(shown, view.row[shown.name])) for shown in find_shown(view.row)]
    parts: list[RenderableType] = [_line(Text(_headline(view), style="bold"))]
    if view.steps > 0 and width > _NARROW:
        parts.append(_line(_bar(view.step / view.steps, width - 4)))
    if view.rewards:
        parts.append(_line(Text.assemble(("reward ", "dim"), (draw_sparkline(view.rewards, width - 11), "green"))))
    if figures:
        parts.append(Columns(figures, equal=True, expand=True) if width > _NARROW else Group(*figures))
    if width <= _NARROW:
        return Group(*parts)
    title = Text(" · ".join(["forgejax", *([view.phase] if view.phase else []), format_duration(view.elapsed_s)]))
    return Panel(Group(*parts), title=title, title_align="left", border_style="cyan", width=width)


def _figure(shown: Shown, value: float) -> Text:
    color = "bold red" if shown.alarms(value) else "bold"
    return Text.assemble((f"{shown.label} ", "dim"), (format_value(value, shown.style), color))


def _headline(view: View) -> str:
    words = [f"step {view.step}/{view.steps}"]
    if view.eta_s is not None:
        words.append(f"eta {format_duration(view.eta_s)}")
    if view.phase:
        words.append(f"{view.phase} {format_duration(view.phase_s)}")
    if view.waiting or view.detail:
        words.append(view.waiting or view.detail)
    return strip_controls(" · ".join(words))


def _bar(share: float, width: int) -> Text:
    done = round(min(max(share, 0.0), 1.0) * width)
    return Text.assemble(("━" * done, "cyan"), ("─" * (width - done), "dim"))


def _line(text: Text) -> Text:
    text.no_wrap = True
    text.overflow = "ellipsis"
    return text

"""Figures of a run step by step, and the paper they are drawn on."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from forgejax.report.names import STEP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with any colour vision.
BLUE, ORANGE, GREEN, BLACK, PURPLE = "#0072B2", "#D55E00", "#009E73", "#222222", "#CC79A7"
SKY, AMBER, YELLOW = "#56B4E9", "#E69F00", "#F0E442"

MetricRows = Sequence[Mapping[str, float]]


def read_series(rows: MetricRows, name: str) -> tuple[list[float], list[float]]:
    """The steps at which ``name`` was measured, and its values; those that are not finite are left out."""
    found = [(row[STEP], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    return [step for step, _ in found], [value for _, value in found]


def smooth_values(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last ``window`` finite values up to each position; NaN where there is none."""
    means = []
    for end in range(1, len(values) + 1):
        recent = [value for value in values[max(0, end - window) : end] if math.isfinite(value)]
        means.append(sum(recent) / len(recent) if recent else math.nan)
    return means


def choose_window(steps: Sequence[float]) -> int:
    """Over how many steps a trailing mean is drawn."""
    return max(1, min(20, len(steps) // 8))


def draw_course(axes: Axes, rows: MetricRows, name: str, *, color: str, label: str) -> None:
    """A figure step by step, faint, and its trailing mean over it; where that says nothing new, one plain line."""
    steps, values = read_series(rows, name)
    window = choose_window(steps)
    if window == 1:
        axes.plot(steps, values, color=color, linewidth=1.8, marker=".", markersize=4, label=label)
        return
    axes.plot(steps, values, color=color, alpha=0.35, linewidth=1, marker=".", markersize=4)
    axes.plot(steps, smooth_values(values, window), color=color, linewidth=2.2, label=label)


def quote_label(text: str) -> str:
    """A name that others chose, as a plot's label that shows it as it is.

    matplotlib reads what stands between two dollars as mathematics, and fails where it is none; it leaves out of a
    legend what begins with an underscore, and cannot draw control characters and lone surrogates.
    """
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return ("\N{ZERO WIDTH SPACE}" if shown.startswith("_") else "") + shown.replace("$", r"\$")


def make_figure(width: float, height: float, *, dpi: int) -> Figure:
    """An empty figure of so many inches, without a display or any state shared between threads."""
    with _quiet_matplotlib():
        from matplotlib.figure import Figure  # noqa: PLC0415 - half a second, and only the end of a run needs it

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def finish_axes(axes: Axes) -> None:
    """Grid and frame as every plot of a report has them."""
    axes.grid(visible=True, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_steps(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - as above

    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))


def render_png(figure: Figure) -> bytes:
    """The figure as a PNG."""
    with _quiet_matplotlib():
        # Only the Agg canvas, never pyplot: no display, no global state, and threads do not meet.
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


@contextmanager
def _quiet_matplotlib() -> Iterator[None]:
    """Keeps matplotlib's first import silent: about its font cache, or a home directory it cannot write to."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

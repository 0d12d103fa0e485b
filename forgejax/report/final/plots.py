"""The reward curve of a run as a PNG."""

import io
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from forgejax.report.names import (
    EPISODE_TOKENS,
    EVAL_OUTCOME,
    EVAL_OUTCOME_SE,
    EVAL_TOOLS,
    OUTCOME,
    STEP,
    TOOLS,
    find_levels,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart with any colour vision; the markers differ too.
_BLUE, _ORANGE, _GREEN, _BLACK = "#0072B2", "#D55E00", "#009E73", "#222222"
_LEVEL_COLORS = (_GREEN, _ORANGE, "#CC79A7", "#56B4E9", "#E69F00", "#F0E442")
_LEVEL_MARKERS = "osD^vP"
_DPI = 150

_Rows = Sequence[Mapping[str, float]]
_Drawing = Callable[["Axes", _Rows], None]


def draw_curve(rows: _Rows) -> bytes | None:
    """A PNG of 1350 pixels' width, readable at 900, from the metrics rows of a run (see names).

    Above: the outcome of each training step, its trailing mean, and the evaluations with one standard error. Below: the
    share of episodes that used a tool, level by level; where none ever did, the tokens that an episode samples. What
    the rows do not hold is left out, and where they hold nothing there is no picture.
    """
    panels = [drawing for drawing, names in _panels(rows) if any(_series(rows, name)[0] for name in names)]
    if not panels:
        return None
    with _quiet_matplotlib():
        # Only the Agg canvas, never pyplot: no display, no global state, and threads do not meet.
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(9.0, 1.0 + 2.7 * len(panels)), dpi=_DPI, layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, height_ratios=(3, 2)[: len(panels)], squeeze=False)
    for drawing, axes in zip(panels, grid[:, 0], strict=True):
        drawing(axes, rows)
        axes.grid(visible=True, color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="best", fontsize=9, framealpha=0.85)
    grid[-1, 0].set_xlabel("training step")
    grid[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def _panels(rows: _Rows) -> list[tuple[_Drawing, list[str]]]:
    """What could be drawn, and the names of which one must be there for it."""
    levels = _levels(rows)
    names = [f"{prefix}{level}" for level in levels for prefix in (TOOLS, EVAL_TOOLS)]
    used = any(value > 0 for name in names for value in _series(rows, name)[1])
    lower: tuple[_Drawing, list[str]] = (_draw_tools, names) if used else (_draw_length, [EPISODE_TOKENS])
    return [(_draw_reward, [OUTCOME, EVAL_OUTCOME]), lower]


def _levels(rows: _Rows) -> list[str]:
    return sorted({level for row in rows for prefix in (TOOLS, EVAL_TOOLS) for level in find_levels(row, prefix)})


def smooth_values(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last ``window`` finite values up to each position; NaN where there is none."""
    means = []
    for end in range(1, len(values) + 1):
        recent = [value for value in values[max(0, end - window) : end] if math.isfinite(value)]
        means.append(sum(recent) / len(recent) if recent else math.nan)
    return means


def _draw_reward(axes: "Axes", rows: _Rows) -> None:
    steps, outcomes = _series(rows, OUTCOME)
    if steps:
        window = _window(steps)
        axes.plot(steps, outcomes, color=_BLUE, alpha=0.35, linewidth=1, marker=".", markersize=4, label="each step")
        if window > 1:
            label = f"mean of {window} steps"
            axes.plot(steps, smooth_values(outcomes, window), color=_BLUE, linewidth=2.2, label=label)
    steps, outcomes = _series(rows, EVAL_OUTCOME)
    if steps:
        errors = {row[STEP]: row[EVAL_OUTCOME_SE] for row in rows if math.isfinite(row.get(EVAL_OUTCOME_SE, math.nan))}
        axes.errorbar(
            steps,
            outcomes,
            yerr=[errors.get(step, 0.0) for step in steps],
            color=_BLACK,
            marker="D",
            markersize=6,
            linewidth=1.2,
            linestyle="--",
            capsize=4,
            label="evaluation ± 1 standard error",
        )
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("outcome reward")
    axes.set_title("Outcome reward", loc="left", fontsize=11, fontweight="bold")


def _draw_tools(axes: "Axes", rows: _Rows) -> None:
    looks = itertools.cycle(zip(_LEVEL_COLORS, _LEVEL_MARKERS, strict=True))
    for level, (color, marker) in zip(_levels(rows), looks, strict=False):
        steps, shares = _series(rows, f"{TOOLS}{level}")
        if steps:
            axes.plot(
                steps, smooth_values(shares, _window(steps)), color=color, linewidth=1.8, label=f"{level}, training"
            )
        steps, shares = _series(rows, f"{EVAL_TOOLS}{level}")
        if steps:
            axes.plot(
                steps, shares, color=color, linestyle="--", marker=marker, markersize=7, label=f"{level}, evaluation"
            )
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("episodes using a tool")
    axes.set_title("Tool use", loc="left", fontsize=11, fontweight="bold")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")


def _draw_length(axes: "Axes", rows: _Rows) -> None:
    steps, tokens = _series(rows, EPISODE_TOKENS)
    axes.plot(steps, tokens, color=_GREEN, alpha=0.35, linewidth=1, marker=".", markersize=4, label="each step")
    if _window(steps) > 1:
        label = f"mean of {_window(steps)} steps"
        axes.plot(steps, smooth_values(tokens, _window(steps)), color=_GREEN, linewidth=2.2, label=label)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens")
    axes.set_title("Tokens sampled in an episode", loc="left", fontsize=11, fontweight="bold")


def _window(steps: Sequence[float]) -> int:
    """Over how many steps a trailing mean is drawn."""
    return max(1, min(20, len(steps) // 8))


def _series(rows: _Rows, name: str) -> tuple[list[float], list[float]]:
    """The steps at which ``name`` was measured, and its values."""
    found = [(row[STEP], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    return [step for step, _ in found], [value for _, value in found]


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

"""The reward curve of a run as a PNG."""

import io
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from forgejax.report.names import (
    EVAL_OUTCOME,
    EVAL_OUTCOME_SE,
    EVAL_TOOLS_EASY,
    EVAL_TOOLS_HARD,
    OUTCOME,
    STEP,
    TOOLS_EASY,
    TOOLS_HARD,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart with any colour vision; the markers differ too.
_BLUE, _ORANGE, _GREEN, _BLACK = "#0072B2", "#D55E00", "#009E73", "#222222"
_DPI = 150


def reward_curve(rows: Sequence[Mapping[str, float]]) -> bytes:
    """A PNG of 1350 x 960 pixels, readable at 900, from the metrics rows of a run (see names).

    Above: the outcome of each training step, its trailing mean, and the evaluations with one standard error. Below: the
    share of episodes that used a tool, easy and hard. What the rows do not hold is left out.
    """
    with _quiet_matplotlib():
        # Only the Agg canvas, never pyplot: no display, no global state, and threads do not meet.
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(9.0, 6.4), dpi=_DPI, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_reward(upper, rows)
    _draw_tools(lower, rows)
    for axes in (upper, lower):
        axes.set_ylim(-0.03, 1.03)
        axes.grid(visible=True, color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best", fontsize=9, framealpha=0.85)
        else:
            axes.text(0.5, 0.5, "no figures", transform=axes.transAxes, ha="center", color="#777777")
    lower.xaxis.get_major_locator().set_params(integer=True)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean of the last ``window`` finite values up to each position; NaN where there is none."""
    means = []
    for end in range(1, len(values) + 1):
        recent = [value for value in values[max(0, end - window) : end] if math.isfinite(value)]
        means.append(sum(recent) / len(recent) if recent else math.nan)
    return means


def _draw_reward(axes: "Axes", rows: Sequence[Mapping[str, float]]) -> None:
    steps, outcomes = _series(rows, OUTCOME)
    if steps:
        window = max(1, min(20, len(steps) // 8))
        axes.plot(steps, outcomes, color=_BLUE, alpha=0.35, linewidth=1, marker=".", markersize=4, label="each step")
        if window > 1:
            label = f"mean of {window} steps"
            axes.plot(steps, smoothed(outcomes, window), color=_BLUE, linewidth=2.2, label=label)
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
    axes.set_ylabel("outcome reward")
    axes.set_title("Outcome reward", loc="left", fontsize=11, fontweight="bold")


def _draw_tools(axes: "Axes", rows: Sequence[Mapping[str, float]]) -> None:
    for label, trained, evaluated, color, marker in (
        ("easy tasks", TOOLS_EASY, EVAL_TOOLS_EASY, _GREEN, "o"),
        ("hard tasks", TOOLS_HARD, EVAL_TOOLS_HARD, _ORANGE, "s"),
    ):
        steps, shares = _series(rows, trained)
        if steps:
            window = max(1, min(20, len(steps) // 8))
            axes.plot(steps, smoothed(shares, window), color=color, linewidth=1.8, label=f"{label}, training")
        steps, shares = _series(rows, evaluated)
        if steps:
            axes.plot(
                steps, shares, color=color, linestyle="--", marker=marker, markersize=7, label=f"{label}, evaluation"
            )
    axes.set_ylabel("episodes using a tool")
    axes.set_xlabel("training step")
    axes.set_title("Tool use", loc="left", fontsize=11, fontweight="bold")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")


def _series(rows: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
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

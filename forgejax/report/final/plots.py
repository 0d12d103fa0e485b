"""The reward curve of a run as a PNG."""

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from forgejax.report.final.series import (
    AMBER,
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    YELLOW,
    MetricRows,
    choose_window,
    draw_course,
    finish_axes,
    label_steps,
    make_figure,
    quote_label,
    read_series,
    render_png,
    smooth_values,
)
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

_LEVEL_COLORS = (GREEN, ORANGE, PURPLE, SKY, AMBER, YELLOW)
_LEVEL_MARKERS = "osD^vP"  # the markers differ too
_DPI = 150

_Drawing = Callable[["Axes", MetricRows], None]


def draw_curve(rows: MetricRows) -> bytes | None:
    """A PNG of 1350 pixels' width, readable at 900, from the metrics rows of a run (see names).

    Above: the outcome of each training step, its trailing mean, and the evaluations with one standard error. Below: the
    share of episodes that used a tool, level by level; where none ever did, the tokens that an episode samples. What
    the rows do not hold is left out, and where they hold nothing there is no picture.
    """
    panels = [drawing for drawing, names in _panels(rows) if any(read_series(rows, name)[0] for name in names)]
    if not panels:
        return None
    figure = make_figure(9.0, 1.0 + 2.7 * len(panels), dpi=_DPI)
    grid = figure.subplots(len(panels), 1, sharex=True, height_ratios=(3, 2)[: len(panels)], squeeze=False)
    for drawing, axes in zip(panels, grid[:, 0], strict=True):
        drawing(axes, rows)
        finish_axes(axes)
        axes.legend(loc="best", fontsize=9, framealpha=0.85)
    label_steps(grid[-1, 0])
    return render_png(figure)


def _panels(rows: MetricRows) -> list[tuple[_Drawing, list[str]]]:
    """What could be drawn, and the names of which one must be there for it."""
    levels = _levels(rows)
    names = [f"{prefix}{level}" for level in levels for prefix in (TOOLS, EVAL_TOOLS)]
    used = any(value > 0 for name in names for value in read_series(rows, name)[1])
    lower: tuple[_Drawing, list[str]] = (_draw_tools, names) if used else (_draw_length, [EPISODE_TOKENS])
    return [(_draw_reward, [OUTCOME, EVAL_OUTCOME]), lower]


def _levels(rows: MetricRows) -> list[str]:
    return sorted({level for row in rows for prefix in (TOOLS, EVAL_TOOLS) for level in find_levels(row, prefix)})


def _draw_reward(axes: "Axes", rows: MetricRows) -> None:
    if read_series(rows, OUTCOME)[0]:
        window = choose_window(read_series(rows, OUTCOME)[0])
        draw_course(axes, rows, OUTCOME, color=BLUE, label=f"mean of {window} steps" if window > 1 else "each step")
    steps, outcomes = read_series(rows, EVAL_OUTCOME)
    if steps:
        errors = {row[STEP]: row[EVAL_OUTCOME_SE] for row in rows if math.isfinite(row.get(EVAL_OUTCOME_SE, math.nan))}
        axes.errorbar(
            steps,
            outcomes,
            yerr=[errors.get(step, 0.0) for step in steps],
            color=BLACK,
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


def _draw_tools(axes: "Axes", rows: MetricRows) -> None:
    looks = itertools.cycle(zip(_LEVEL_COLORS, _LEVEL_MARKERS, strict=True))
    for level, (color, marker) in zip(_levels(rows), looks, strict=False):
        steps, shares = read_series(rows, f"{TOOLS}{level}")
        if steps:
            axes.plot(
                steps,
                smooth_values(shares, choose_window(steps)),
                color=color,
                linewidth=1.8,
                label=quote_label(f"{level}, training"),
            )
        steps, shares = read_series(rows, f"{EVAL_TOOLS}{level}")
        if steps:
            label = quote_label(f"{level}, evaluation")
            axes.plot(steps, shares, color=color, linestyle="--", marker=marker, markersize=7, label=label)
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("episodes using a tool")
    axes.set_title("Tool use", loc="left", fontsize=11, fontweight="bold")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")


def _draw_length(axes: "Axes", rows: MetricRows) -> None:
    draw_course(axes, rows, EPISODE_TOKENS, color=GREEN, label="tokens of an episode")
    axes.set_ylim(0, 1.08 * max(read_series(rows, EPISODE_TOKENS)[1]) or 1.0)
    axes.set_ylabel("tokens")
    axes.set_title("Tokens sampled in an episode", loc="left", fontsize=11, fontweight="bold")

"""How training went, step by step: a small plot for each question a reader asks of it."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forgejax.report.figures import average_rates
from forgejax.report.final.series import (
    AMBER,
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    SKY,
    MetricRows,
    draw_course,
    finish_axes,
    label_steps,
    make_figure,
    read_series,
    render_png,
)
from forgejax.report.names import (
    ATTEMPT,
    CLIP_FRACTION,
    DROPPED_SHARE,
    ENTROPY,
    FAILED_SHARE,
    GAP_MAX,
    GAP_SUM,
    GAP_TOKENS,
    GRAD_NORM,
    LEARNING_RATE,
    PACKING_WAIT_S,
    RATES,
    REPLY_CUT,
    REPLY_TOKENS,
    REPLY_TOKENS_P95,
    STALENESS,
    STALENESS_MAX,
    STEP,
    STEP_S,
    STEPS_OF_A_RATE,
    TRAIN_S,
    WAIT_S,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (6.0, 3.1)
_DPI = 130
_WIDE = 30.0  # between the largest and the smallest of what is above 0: beyond it a scale is logarithmic
_BARS = 60  # steps that can be told apart as bars
_GAP_MEAN = "gap_mean"  # of a step, made from two of its figures


@dataclass(frozen=True, kw_only=True)
class Course:
    """One plot: what it shows, in words, and the picture."""

    title: str
    words: str
    png: bytes


@dataclass(frozen=True, kw_only=True)
class _Line:
    name: str
    label: str
    color: str


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A plot of lines. ``scale``: linear; log where the values are far apart; or shares from 0 to 1."""

    title: str
    words: str
    unit: str
    lines: Sequence[_Line]
    scale: str = "linear"


_PLANS = (
    _Plan(
        title="Entropy",
        words="Mean entropy of the policy over the trained tokens. A fall to 0 means it has stopped exploring.",
        unit="nats",
        lines=(_Line(name=ENTROPY, label="entropy", color=BLUE),),
    ),
    _Plan(
        title="Reply length",
        words="Tokens of one completion.",
        unit="tokens",
        lines=(
            _Line(name=REPLY_TOKENS, label="mean", color=GREEN),
            _Line(name=REPLY_TOKENS_P95, label="95th percentile", color=AMBER),
        ),
    ),
    _Plan(
        title="Gradient norm",
        words="Global norm of the gradient, before clipping.",
        unit="norm",
        lines=(_Line(name=GRAD_NORM, label="gradient norm", color=BLUE),),
        scale="log",
    ),
    _Plan(
        title="Clip fraction",
        words="Share of trained tokens whose importance ratio the loss clipped.",
        unit="share of tokens",
        lines=(_Line(name=CLIP_FRACTION, label="clipped", color=ORANGE),),
        scale="share",
    ),
    _Plan(
        title="Learning rate",
        words="As the schedule set it.",
        unit="learning rate",
        lines=(_Line(name=LEARNING_RATE, label="learning rate", color=BLACK),),
    ),
    _Plan(
        title="Log-prob gap",
        words="Trainer against sampler, on the trained tokens that the very weights of the step had drawn.",
        unit="nats",
        lines=(
            _Line(name=GAP_MAX, label="largest", color=ORANGE),
            _Line(name=_GAP_MEAN, label="mean", color=BLUE),
        ),
        scale="log",
    ),
    _Plan(
        title="Staleness",
        words="How many updates ahead of the version it began on a group was trained.",
        unit="updates",
        lines=(
            _Line(name=STALENESS_MAX, label="largest", color=ORANGE),
            _Line(name=STALENESS, label="mean", color=BLUE),
        ),
    ),
    _Plan(
        title="What was lost",
        words="Episodes that failed, of the last to end; groups dropped or failed; replies cut off by their length.",
        unit="share",
        lines=(
            _Line(name=FAILED_SHARE, label="episodes failed", color=ORANGE),
            _Line(name=DROPPED_SHARE, label="groups dropped", color=AMBER),
            _Line(name=REPLY_CUT, label="replies cut off", color=SKY),
        ),
        scale="share",
    ),
    _Plan(
        title="Tokens a second",
        words=f"Over {STEPS_OF_A_RATE} steps: sampled by the engine, and trained, in every sample that has them.",
        unit="tokens/s",
        lines=(
            _Line(name=f"{RATES}sampled", label="sampled", color=GREEN),
            _Line(name=f"{RATES}trained_unmerged", label="trained", color=BLUE),
        ),
    ),
)


def draw_courses(rows: MetricRows) -> tuple[Course, ...]:
    """A plot of 780 pixels' width for each figure that the metrics rows of a run hold; dotted lines are resumes."""
    rows = _average_rates([{**row, **_measure_gap(row)} for row in rows])
    found = []
    for plan in _PLANS:
        if any(read_series(rows, line.name)[0] for line in plan.lines):
            found.append(Course(title=plan.title, words=plan.words, png=_draw(rows, _draw_lines(plan))))
    timed = [row for row in rows if {STEP_S, WAIT_S, PACKING_WAIT_S, TRAIN_S} <= row.keys()]
    if timed:
        words = "Seconds of each step: waiting, training, and what lies between two steps."
        found.append(Course(title="Where time goes", words=words, png=_draw(timed, _draw_times)))
    return tuple(found)


def _draw(rows: MetricRows, drawing: Callable[[Axes, MetricRows], None]) -> bytes:
    figure = make_figure(*_SIZE, dpi=_DPI)
    axes = figure.subplots()
    drawing(axes, rows)
    for step in _find_resumes(rows):
        axes.axvline(step, color=BLACK, linewidth=1, linestyle=":")
    steps = [row[STEP] for row in rows]
    axes.set_xlim(min(steps) - 0.6, max(steps) + 0.6)  # all plots side by side show the same steps
    finish_axes(axes)
    label_steps(axes)
    return render_png(figure)


def _draw_lines(plan: _Plan) -> Callable[[Axes, MetricRows], None]:
    def drawing(axes: Axes, rows: MetricRows) -> None:
        shown = [line for line in plan.lines if read_series(rows, line.name)[0]]
        for line in shown:
            draw_course(axes, rows, line.name, color=line.color, label=line.label)
        values = [value for line in shown for value in read_series(rows, line.name)[1]]
        above = [value for value in values if value > 0]
        if plan.scale == "share":
            axes.set_ylim(-0.03, 1.03)
            axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        elif plan.scale == "log" and above and max(above) > _WIDE * min(above):
            axes.set_yscale("log", nonpositive="mask")
        else:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
            axes.set_ylim(min(0.0, 1.08 * min(values)), 1.08 * max(0.0, *values) or 1.0)
        axes.set_ylabel(plan.unit)
        if len(plan.lines) > 1:
            _add_legend(axes)

    return drawing


def _draw_times(axes: Axes, rows: MetricRows) -> None:
    steps = [row[STEP] for row in rows]
    parts = (
        ("waiting for agents", AMBER, [row[WAIT_S] - row[PACKING_WAIT_S] for row in rows]),
        ("waiting for packing", ORANGE, [row[PACKING_WAIT_S] for row in rows]),
        ("training", BLUE, [row[TRAIN_S] for row in rows]),
        ("probes, checkpoints", SKY, [max(0.0, row[STEP_S] - row[TRAIN_S] - row[WAIT_S]) for row in rows]),
    )
    labels = [label for label, _, _ in parts]
    colors = [color for _, color, _ in parts]
    if len(rows) > _BARS:
        axes.stackplot(steps, *(values for _, _, values in parts), labels=labels, colors=colors)
    else:
        bottom = [0.0] * len(rows)
        for label, color, values in parts:
            axes.bar(steps, values, bottom=bottom, color=color, label=label, width=0.9)
            bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axes.set_ylabel("seconds")
    _add_legend(axes)


def _add_legend(axes: Axes) -> None:
    """Above the plot, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, fontsize=8, frameon=False, columnspacing=1.2)


def _measure_gap(row: Mapping[str, float]) -> dict[str, float]:
    """The gap of a step as it is drawn: on no tokens it was not measured, which is not 0."""
    tokens = row.get(GAP_TOKENS, 0.0)
    return {_GAP_MEAN: row[GAP_SUM] / tokens} if tokens > 0 and GAP_SUM in row else {GAP_MAX: math.nan}


def _average_rates(rows: MetricRows) -> list[dict[str, float]]:
    """The rows with rates over the last few steps together."""
    spans: deque[tuple[float, dict[str, float]]] = deque(maxlen=STEPS_OF_A_RATE)
    averaged = []
    for row in rows:
        rates = {name: value for name, value in row.items() if name.startswith(RATES)}
        if rates:
            spans.append((row.get(STEP_S, 1.0), rates))
        averaged.append({**row, **(average_rates(spans) if rates else {})})
    return averaged


def _find_resumes(rows: MetricRows) -> list[float]:
    """The last steps before another attempt at the run went on."""
    steps, attempts = read_series(rows, ATTEMPT)
    pairs = zip(itertools.pairwise(steps), itertools.pairwise(attempts), strict=True)
    return [(before + after) / 2 for (before, after), (old, new) in pairs if new != old]

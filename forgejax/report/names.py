"""The metric names the reports know, and how a figure is written for people.

A metrics row is a mapping of names to numbers with ``step`` in it. Names that are not listed here are kept in
``metrics.jsonl`` and TensorBoard all the same; they are only not shown in the terminal.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from forgejax.types import StopReason

STEP = "step"
TIME = "time"  # when a row was made, in seconds of Unix time
OUTCOME = "reward/outcome"
TOOLS = "tools/"  # and a level
EPISODE_TOKENS = "episode/tokens"
BRANCHES = "branches/"  # and a reason: of an episode, mean
EVALUATION = "eval/"  # and a figure: all names of an evaluation's row begin so
EVAL_OUTCOME = "eval/outcome"
EVAL_OUTCOME_SE = "eval/outcome_se"
EVAL_TOOLS = "eval/tools_"  # and a level
EVAL_FAILED_SHARE = "eval/failed_share"
EPISODES = "episodes/"  # and a stop reason: training episodes that ended since the row before
MASKED = "masked/"  # and a reason: those of them that are masked
NOT_TRAINED = "groups/"  # and a reason: groups dropped or failed since the row before
COUNTED = (EPISODES, MASKED, NOT_TRAINED)
FAILED_SHARE = "share/failed_episodes"  # of the episodes that ended last
DROPPED_SHARE = "share/dropped_groups"  # dropped or failed, of the groups decided in the last steps
STALENESS = "staleness/mean"
STALENESS_MAX = "staleness/max"
REPLY_TOKENS = "reply/tokens"
REPLY_TOKENS_P95 = "reply/tokens_p95"
REPLY_CUT = "reply/cut_share"
ENTROPY = "learner/entropy"
CLIP_FRACTION = "learner/clip_fraction"
GRAD_NORM = "learner/grad_norm"
LEARNING_RATE = "learner/learning_rate"
GAP_MAX, GAP_SUM, GAP_TOKENS = "learner/gap_max", "learner/gap_sum", "learner/gap_tokens"
ATTEMPT = "process/attempt"  # at the run: each start or resume
RATES = "throughput/"  # and what a second sees of it
STEPS_OF_A_RATE = 8  # people are shown rates over so many steps
STEP_S, WAIT_S, PACKING_WAIT_S, TRAIN_S = "time/step_s", "time/wait_s", "time/packing_wait_s", "time/train_s"

Style = Literal["decimal", "share", "count", "tiny", "times", "digits"]


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A metric that the terminal shows: its name in the row, its label and how its value is written.

    ``alarm_at``: from this value on it stands out; None where none is too much.
    """

    name: str
    label: str
    style: Style
    alarm_at: float | None = None

    def alarms(self, value: float) -> bool:
        return self.alarm_at is not None and value >= self.alarm_at


_SHOWN = (
    Shown(name=OUTCOME, label="outcome", style="decimal"),
    Shown(name=FAILED_SHARE, label="episodes failed", style="share", alarm_at=0.5),
    Shown(name=DROPPED_SHARE, label="groups dropped", style="share"),
    Shown(name=ENTROPY, label="entropy", style="decimal"),
    Shown(name=GRAD_NORM, label="grad norm", style="digits"),
    Shown(name=f"{RATES}sampled", label="sampled tok/s", style="count"),
    Shown(name=f"{RATES}trained_unmerged", label="trained tok/s (unmerged)", style="count"),
    Shown(name="pool/head", label="window head", style="count"),
    Shown(name="pool/in_flight", label="in flight", style="count"),
    Shown(name=STALENESS_MAX, label="staleness", style="count"),
    Shown(name="engine/cache_hit", label="cache hits", style="share"),
    Shown(name="learner/tree_ratio", label="tree ratio", style="times"),
    Shown(name="learner/logprob_gap", label="logprob gap", style="tiny"),
    Shown(name=EVAL_OUTCOME, label="eval outcome", style="decimal"),
)


def find_shown(row: Mapping[str, float]) -> list[Shown]:
    """The metrics of a row that the terminal shows, in their order; a level's tool use behind the outcome,
    branches by their reason behind all that is always there."""
    outcome, *others = _SHOWN
    tools = [
        Shown(name=name, label=f"tools {name.removeprefix(TOOLS)}", style="share")
        for name in sorted(row)
        if name.startswith(TOOLS)
    ]
    branches = [
        Shown(name=name, label=f"branches {name.removeprefix(BRANCHES)}", style="digits")
        for name in sorted(row)
        if name.startswith(BRANCHES)
    ]
    return [shown for shown in (outcome, *tools, *others, *branches, *_find_counts(row)) if shown.name in row]


def _find_counts(row: Mapping[str, float]) -> list[Shown]:
    """What went wrong, by reason: how episodes ended but in good order, what else masks them, what groups come to."""
    reasons = [reason.value for reason in StopReason]
    bad = [reason for reason in reasons if reason not in (StopReason.COMPLETED, StopReason.CANCELLED)]
    labels = {f"{EPISODES}{reason}": f"episodes {reason}" for reason in bad}
    for prefix, label in ((MASKED, "masked"), (NOT_TRAINED, "groups")):
        found = [name.removeprefix(prefix) for name in sorted(row) if name.startswith(prefix)]
        labels |= {
            f"{prefix}{reason}": f"{label} {reason}" for reason in found if prefix != MASKED or reason not in reasons
        }
    return [Shown(name=name, label=label, style="count") for name, label in labels.items() if row.get(name)]


def find_levels(row: Mapping[str, float], prefix: str) -> set[str]:
    """The levels that a row has a figure of, under names that begin with ``prefix``."""
    return {name.removeprefix(prefix) for name in row if name.startswith(prefix)}


def format_value(value: float, style: Style) -> str:
    """``value`` as people read it: 0.53, 12%, 1,234, 3.1e-07, 4.5x, 0.0123; one that is not finite as nan or inf."""
    if not math.isfinite(value):
        return str(value)
    match style:
        case "decimal":
            return f"{value:.3f}"
        case "share":
            return f"{100 * value:.0f}%"
        case "count":
            return f"{value:,.0f}"
        case "tiny":
            return f"{value:.1e}"
        case "times":
            return f"{value:.2f}x"
        case "digits":
            return f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """``seconds`` as 4.2s, 3m05s or 2h07m."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"

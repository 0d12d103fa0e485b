"""The figures a reader looks for first, before and after training, in plain words."""

import math
from dataclasses import dataclass

from forgejax.report.final.summary import LevelChange, Summary
from forgejax.report.names import format_duration

TOLD_IN_WORDS = frozenset({"step_s", "wait_share", "packing_wait_share"})  # of Summary.figures, by describe_time
_BY_CHANCE = ("deadline", "agent_failed", "environment_failed")  # stop reasons
_BY_ACCIDENT = ("worker_died",)  # what episodes are masked for
_NOISE = 2.0  # standard errors below which a difference is called noise


@dataclass(frozen=True, kw_only=True)
class Headline:
    """One figure before and after, as text; ``words`` says what it means and what it does not show."""

    label: str
    before: str
    after: str
    words: str


def make_headlines(summary: Summary) -> tuple[Headline, ...]:
    """Outcome overall and per level, then tool use and episode time, as far as they were measured."""
    whole = LevelChange(
        outcome_before=summary.eval_reward_before,
        outcome_before_se=summary.eval_reward_before_se,
        outcome_after=summary.eval_reward_after,
        outcome_after_se=summary.eval_reward_after_se,
        tool_use_before=summary.tool_use_before,
        tool_use_after=summary.tool_use_after,
        episode_s_before=summary.episode_s_before,
        episode_s_after=summary.episode_s_after,
    )
    found = [_outcome("all", whole, _paired_words(summary))]
    found += [_outcome(level, change, None) for level, change in summary.levels.items()]
    apart = summary.levels or {"all": whole}
    found += [_tool_use(level, change) for level, change in apart.items()]
    found += [_episode_time(level, change) for level, change in apart.items()]
    return tuple(headline for headline in found if headline is not None)


def describe_time(summary: Summary) -> str | None:
    """Where the time of the training steps went, and which side is the slower; None where it was not measured."""
    steps_s, wait, packing = (summary.figures.get(name) for name in ("step_s", "wait_share", "packing_wait_share"))
    if not steps_s or wait is None or packing is None:
        return None
    agents = wait - packing
    if agents > 0.5:
        verdict = "The agents and the engine are the slower side: more groups in flight or engine slots may help."
    elif agents < 0.1:
        verdict = "The trainer is the slower side: groups were ready when it asked for them."
    else:
        verdict = "Neither side had to wait much for the other."
    whole = f"The training steps took {format_duration(steps_s)} of the run's {format_duration(summary.wall_s)}."
    waited = (
        f"The trainer spent {agents:.0%} of that waiting for groups that agents had not finished and {packing:.0%} "
        "waiting for their packing; in the rest it trained, probed and saved."
    )
    return f"{whole} {waited} {verdict}"


def describe_repeatability(summary: Summary) -> str:
    """Whether the run can be repeated bit by bit, and which of its episodes ended by a clock or an accident all the
    same: another run may differ from those on."""
    if not summary.deterministic:
        return "no"
    ended = {name: summary.episodes.get(name, 0) for name in _BY_CHANCE} | {
        name: summary.episodes_masked.get(name, 0) for name in _BY_ACCIDENT
    }
    told = ", ".join(f"{name} {count}" for name, count in ended.items() if count)
    return f"yes, but for episodes that something else than the policy ended: {told}" if told else "yes"


def _outcome(level: str, change: LevelChange, paired: str | None) -> Headline | None:
    before, after = change.outcome_before, change.outcome_after
    if before is None and after is None:
        return None
    return Headline(
        label=f"Outcome reward, {level} tasks",
        before=_with_error(before, change.outcome_before_se),
        after=_with_error(after, change.outcome_after_se),
        words=paired or _outcome_words(before, after, change.outcome_before_se, change.outcome_after_se),
    )


def _paired_words(summary: Summary) -> str | None:
    gain, low, high = summary.eval_gain, summary.eval_gain_low, summary.eval_gain_high
    if gain is None or low is None or high is None:
        return None
    verdict = "within the noise" if low <= 0 <= high else "better" if gain > 0 else "worse"
    return f"Task by task the outcome changed by {gain:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}: {verdict}."


def _outcome_words(before: float | None, after: float | None, before_se: float | None, after_se: float | None) -> str:
    if before is None or after is None:
        return "It was measured on one side only, so nothing can be said of the change."
    change = after - before
    moved = f"The mean outcome changed by {change:+.3f}"
    if before_se is None or after_se is None:
        return f"{moved}; too few tasks for an error bar."
    error = math.hypot(before_se, after_se)
    if abs(change) <= _NOISE * error or change == 0:
        return f"{moved}, which is within the noise (one standard error of the difference is {error:.3f})."
    direction = "better" if change > 0 else "worse"
    size = f"{abs(change) / error:.1f} standard errors" if error > 0 else "with no spread between tasks"
    return f"{moved}: {direction}, {size}."


def _tool_use(level: str, change: LevelChange) -> Headline | None:
    before, after = change.tool_use_before, change.tool_use_after
    if before is None and after is None:
        return None
    return Headline(
        label=f"Tool use, {level} tasks",
        before="—" if before is None else f"{before:.0%}",
        after="—" if after is None else f"{after:.0%}",
        words="Share of episodes in which the agent called at least one tool.",
    )


def _episode_time(level: str, change: LevelChange) -> Headline | None:
    before, after = change.episode_s_before, change.episode_s_after
    if before is None and after is None:
        return None
    return Headline(
        label=f"Episode time, {level} tasks",
        before="—" if before is None else format_duration(before),
        after="—" if after is None else format_duration(after),
        words="Median wall clock of an episode, tools included, without the time queued in our own engine.",
    )


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:.3f}" if error is None else f"{value:.3f} ± {error:.3f}"

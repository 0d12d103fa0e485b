"""What a batch of groups looks like, as figures of one metrics row."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from forgejax.report.names import (
    BRANCHES,
    EPISODE_TOKENS,
    OUTCOME,
    REPLY_CUT,
    REPLY_TOKENS,
    REPLY_TOKENS_P95,
    STALENESS,
    STALENESS_MAX,
    TOOLS,
)
from forgejax.types import Completion, FinishReason, Group, Trajectory

_CUT = (FinishReason.LENGTH, FinishReason.REPETITION)


def measure_groups(groups: Sequence[Group], *, step: int) -> dict[str, float]:
    """Mean outcome and reward, tool use and seconds per level, turns and tokens per episode; masked episodes left out.

    Tool use of level L is ``tools/L``: the share of its episodes with at least one tool call. The staleness of a group
    is how many updates ``step``, the number of the step that trains it, is ahead of the version it began on.
    """
    stale = [step - group.dispatch.version for group in groups]
    episodes = [
        (group.task.level, trajectory)
        for group in groups
        for trajectory in group.trajectories
        if trajectory.masked is None
    ]
    if not episodes:
        return {}
    figures = {
        STALENESS: statistics.fmean(stale),
        STALENESS_MAX: max(stale),
        OUTCOME: statistics.fmean(trajectory.outcome for _, trajectory in episodes),
        "reward/total": statistics.fmean(trajectory.total_reward for _, trajectory in episodes),
        "episode/turns": statistics.fmean(len(trajectory.turns) for _, trajectory in episodes),
        EPISODE_TOKENS: statistics.fmean(trajectory.sampled_tokens for _, trajectory in episodes),
        "episode/malformed_calls": statistics.fmean(
            sum(turn.malformed_tool_calls for turn in trajectory.turns) for _, trajectory in episodes
        ),
        **_measure_branches([trajectory for _, trajectory in episodes]),
        **_measure_replies([turn.completion for _, trajectory in episodes for turn in trajectory.turns]),
    }
    levels = defaultdict(list)
    for level, trajectory in episodes:
        levels[level].append(trajectory)
    for level, members in levels.items():
        figures[f"{TOOLS}{level}"] = statistics.fmean(trajectory.tool_calls > 0 for trajectory in members)
        figures[f"reward/outcome_{level}"] = statistics.fmean(trajectory.outcome for trajectory in members)
        figures[f"episode/seconds_{level}"] = statistics.median(trajectory.active_s for trajectory in members)
    return figures


def average_rates(steps: Iterable[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """Rates over several steps together, from the seconds of each and its own rates: what was done by how long it took.

    One step may be over before anything was sampled, and the next hold it all: rates of one step say little.
    """
    seconds: dict[str, float] = defaultdict(float)
    done: dict[str, float] = defaultdict(float)
    for step_s, rates in steps:
        for name, rate in rates.items():
            seconds[name] += step_s
            done[name] += rate * step_s
    return {name: done[name] / whole for name, whole in seconds.items() if whole > 0}


def _measure_branches(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Branches of an episode, mean, by their reason."""
    counts = Counter(turn.branch for trajectory in trajectories for turn in trajectory.turns if turn.branch is not None)
    return {f"{BRANCHES}{reason}": count / len(trajectories) for reason, count in counts.items()}


def _measure_replies(completions: Sequence[Completion]) -> dict[str, float]:
    """Tokens of a reply, mean and 95th percentile, and the share of replies that were cut off."""
    if not completions:
        return {}
    lengths = sorted(len(completion.token_ids) for completion in completions)
    return {
        REPLY_TOKENS: statistics.fmean(lengths),
        REPLY_TOKENS_P95: lengths[min(len(lengths) - 1, math.ceil(0.95 * len(lengths)) - 1)],
        REPLY_CUT: statistics.fmean(completion.finish_reason in _CUT for completion in completions),
    }

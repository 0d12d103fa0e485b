"""What a batch of groups looks like, as figures of one metrics row."""

import statistics
from collections import defaultdict
from collections.abc import Sequence

from forgejax.report.names import OUTCOME
from forgejax.types import Group


def measure_groups(groups: Sequence[Group]) -> dict[str, float]:
    """Mean outcome and reward, tool use and seconds per level, turns and tokens per episode; masked episodes left out.

    Tool use of level L is ``tools/L``: the share of its episodes with at least one tool call.
    """
    episodes = [
        (group.task.level, trajectory)
        for group in groups
        for trajectory in group.trajectories
        if trajectory.masked is None
    ]
    if not episodes:
        return {}
    figures = {
        OUTCOME: statistics.fmean(trajectory.outcome for _, trajectory in episodes),
        "reward/total": statistics.fmean(trajectory.total_reward for _, trajectory in episodes),
        "episode/turns": statistics.fmean(len(trajectory.turns) for _, trajectory in episodes),
        "episode/tokens": statistics.fmean(trajectory.sampled_tokens for _, trajectory in episodes),
        "episode/malformed_calls": statistics.fmean(
            sum(turn.malformed_tool_calls for turn in trajectory.turns) for _, trajectory in episodes
        ),
    }
    levels = defaultdict(list)
    for level, trajectory in episodes:
        levels[level].append(trajectory)
    for level, members in levels.items():
        figures[f"tools/{level}"] = statistics.fmean(trajectory.tool_calls > 0 for trajectory in members)
        figures[f"reward/outcome_{level}"] = statistics.fmean(trajectory.outcome for trajectory in members)
        figures[f"episode/seconds_{level}"] = statistics.median(trajectory.active_s for trajectory in members)
    return figures

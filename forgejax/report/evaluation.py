"""What a set of evaluation episodes says: mean outcome with its error, tool use and time, overall and per level."""

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from forgejax.report.names import EVAL_FAILED_SHARE, EVAL_OUTCOME, EVAL_OUTCOME_SE, EVAL_TOOLS, STEP
from forgejax.types import StopReason, Task, Trajectory


@dataclass(frozen=True, kw_only=True)
class LevelResult:
    """Figures over ``episodes`` episodes of ``tasks`` tasks; None where there was nothing to measure.

    ``reward`` is the mean outcome in [0, 1] and ``reward_se`` its standard error (None for fewer than two tasks),
    ``tool_use`` the share of episodes with a tool call, ``episode_s`` the median of Trajectory.active_s. Masked
    episodes (a failed environment) are left out of all of these and counted in ``masked``.
    """

    episodes: int
    tasks: int
    masked: int
    reward: float | None
    reward_se: float | None
    tool_use: float | None
    episode_s: float | None


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """One evaluation: all episodes together, by Task.level, and the mean outcome of each task that has one.

    ``ended`` counts its episodes by stop reason.
    """

    overall: LevelResult
    levels: Mapping[str, LevelResult]
    tasks: Mapping[str, float] = field(default_factory=dict)
    ended: Mapping[str, int] = field(default_factory=dict)


NOT_MEASURED = EvaluationResult(
    overall=LevelResult(episodes=0, tasks=0, masked=0, reward=None, reward_se=None, tool_use=None, episode_s=None),
    levels={},
)


def sum_up_evaluation(trajectories: Sequence[Trajectory], tasks: Sequence[Task]) -> EvaluationResult:
    """Sums up ``trajectories`` of ``tasks``; every level of ``tasks`` has an entry, with or without episodes.

    Raises ValueError for a trajectory whose task is not among ``tasks``.
    """
    levels = {task.id: task.level for task in tasks}
    by_level: dict[str, list[Trajectory]] = {task.level: [] for task in tasks}
    for trajectory in trajectories:
        if trajectory.task_id not in levels:
            raise ValueError(
                f"session {trajectory.session_id}: its task {trajectory.task_id!r} is not of this evaluation"
            )
        by_level[levels[trajectory.task_id]].append(trajectory)
    return EvaluationResult(
        overall=_result(trajectories),
        levels={level: _result(members) for level, members in by_level.items()},
        tasks={task: statistics.fmean(outcomes) for task, outcomes in _outcomes(trajectories).items()},
        ended=dict(Counter(trajectory.stop_reason.value for trajectory in trajectories)),
    )


def make_evaluation_row(result: EvaluationResult, *, step: int) -> dict[str, float]:
    """The metrics row of an evaluation after ``step`` training steps, under the names that the curve is drawn from."""
    figures = {
        EVAL_OUTCOME: result.overall.reward,
        EVAL_OUTCOME_SE: result.overall.reward_se,
        EVAL_FAILED_SHARE: find_failed_share(result.ended),
        **{f"{EVAL_TOOLS}{level}": figures.tool_use for level, figures in result.levels.items()},
    }
    return {STEP: step, **{name: value for name, value in figures.items() if value is not None}}


def find_failed_share(ended: Mapping[str, int]) -> float | None:
    """The share of episodes that failed among those that ended by themselves, by stop reason; None for no episodes."""
    counts = {reason: ended.get(reason.value, 0) for reason in StopReason if reason is not StopReason.CANCELLED}
    episodes = sum(counts.values())
    return sum(count for reason, count in counts.items() if reason.failed) / episodes if episodes else None


def _result(trajectories: Sequence[Trajectory]) -> LevelResult:
    counted = [trajectory for trajectory in trajectories if trajectory.masked is None]
    outcomes = _outcomes(counted)
    return LevelResult(
        episodes=len(counted),
        tasks=len(outcomes),
        masked=len(trajectories) - len(counted),
        reward=statistics.fmean(trajectory.outcome for trajectory in counted) if counted else None,
        reward_se=_standard_error(list(outcomes.values())),
        tool_use=statistics.fmean(trajectory.tool_calls > 0 for trajectory in counted) if counted else None,
        episode_s=statistics.median(trajectory.active_s for trajectory in counted) if counted else None,
    )


def _outcomes(trajectories: Sequence[Trajectory]) -> Mapping[str, list[float]]:
    """The outcomes of each task's episodes, masked ones left out."""
    outcomes: dict[str, list[float]] = defaultdict(list)
    for trajectory in trajectories:
        if trajectory.masked is None:
            outcomes[trajectory.task_id].append(trajectory.outcome)
    return outcomes


def _standard_error(clusters: Sequence[Sequence[float]]) -> float | None:
    """The cluster-robust standard error of the mean over all values: episodes of one task are not independent.

    With one value a cluster it is s / sqrt(n), s with n - 1 degrees of freedom.
    """
    k = len(clusters)
    if k < 2:
        return None
    n = sum(len(cluster) for cluster in clusters)
    mean = sum(sum(cluster) for cluster in clusters) / n
    squares = sum(sum(value - mean for value in cluster) ** 2 for cluster in clusters)
    return math.sqrt(k / (k - 1) * squares) / n

"""Rewards of an episode: r = r_outcome + alpha * r_process + beta * r_speed (MiniMax M2 report, section 6). Pure."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from dataclasses import dataclass

from forgejax.errors import ConfigError
from forgejax.types import Group, Reward, Trajectory


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Coefficients of the reward terms.

    ``process_weight`` (alpha) is taken off for each malformed tool call. ``speed_weight`` (beta) multiplies
    clip(1 - T / T_baseline, -1, 1) of a success, that is an outcome of at least ``success_at``; it is at most what the
    least success earns by its outcome, for a slow one would else be worth less than none.
    """

    outcome_weight: float = 1.0
    process_weight: float = 0.0
    speed_weight: float = 0.0
    success_at: float = 1.0

    def __post_init__(self) -> None:
        for name in ("outcome_weight", "process_weight", "speed_weight"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"rewards {name} is {getattr(self, name)}; expected a finite weight of 0 or more")
        if not 0.0 < self.success_at <= 1.0:
            raise ConfigError(f"rewards success_at is {self.success_at}; expected an outcome in (0, 1]")
        least = self.outcome_weight * self.success_at
        if self.speed_weight > least:
            raise ConfigError(
                f"rewards speed_weight is {self.speed_weight:g} and the outcome of the least success counts {least:g}: "
                f"a slow success could earn less than a failure; set speed_weight to {least:g} at most, or raise "
                "outcome_weight"
            )


def compute_rewards(config: RewardConfig, trajectory: Trajectory, baseline_s: float | None) -> tuple[Reward, ...]:
    """The rewards of a trajectory whose outcome, turns and times are known: its own, which the environment granted, and
    those of outcome, process and speed.

    A malformed tool call is punished at the end of its turn; outcome and speed are granted at the end of the episode,
    no earlier than the last turn. Without a baseline there is no speed reward.
    """
    ended_at = max((trajectory.finished_at, *(turn.finished_at for turn in trajectory.turns)))
    granted = [
        *trajectory.rewards,
        *(
            Reward(kind="process", value=-config.process_weight * turn.malformed_tool_calls, at=turn.finished_at)
            for turn in trajectory.turns
            if turn.malformed_tool_calls and config.process_weight
        ),
    ]
    granted.append(Reward(kind="outcome", value=config.outcome_weight * trajectory.outcome, at=ended_at))
    if config.speed_weight and baseline_s is not None and trajectory.outcome >= config.success_at:
        speed = min(1.0, max(-1.0, 1.0 - trajectory.active_s / baseline_s))
        granted.append(Reward(kind="speed", value=config.speed_weight * speed, at=ended_at))
    return tuple(granted)


class SpeedBaseline:
    """T_baseline: the running median of the active seconds of earlier successful episodes, per task family.

    It is read when a group is dispatched and observes that group only after its end, so it always comes from outside
    the group. Feeding it the finished groups of a run in the order they finished rebuilds it.
    """

    def __init__(self, *, success_at: float = 1.0, history: int = 256) -> None:
        self._success_at = success_at
        self._seconds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=history))

    def observe(self, group: Group) -> None:
        """Takes in the successes of a group that has ended; masked episodes say nothing."""
        for trajectory in group.trajectories:
            if trajectory.masked is None and trajectory.outcome >= self._success_at and trajectory.active_s > 0.0:
                self._seconds[group.task.family].append(trajectory.active_s)

    def read(self, family: str) -> float | None:
        """The median in seconds (always above 0), or None before any success."""
        seconds = self._seconds.get(family)
        return statistics.median(seconds) if seconds else None

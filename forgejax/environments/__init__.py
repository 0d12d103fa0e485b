"""Where tasks come from and how a result is scored: one file a source, all behind ``Environment``."""

from forgejax.environments.base import Environment, Score, Workspace
from forgejax.environments.reasoning_gym import DatasetConfig, ReasoningGym, TasksConfig
from forgejax.environments.rewards import RewardConfig, SpeedBaseline

__all__ = [
    "DatasetConfig",
    "Environment",
    "ReasoningGym",
    "RewardConfig",
    "Score",
    "SpeedBaseline",
    "TasksConfig",
    "Workspace",
    "make_environment",
]


def make_environment(config: TasksConfig) -> Environment:
    """The environment of a configuration. Raises ConfigError where its tasks cannot be had."""
    match config.kind:
        case "reasoning_gym":
            return ReasoningGym(config)

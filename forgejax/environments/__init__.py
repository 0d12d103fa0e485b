"""Where tasks come from and how a result is scored."""

from forgejax.environments.reasoning_gym import DatasetConfig, ReasoningGymTasks, TasksConfig
from forgejax.environments.rewards import RewardConfig, SpeedBaseline

__all__ = ["DatasetConfig", "ReasoningGymTasks", "RewardConfig", "SpeedBaseline", "TasksConfig"]

"""Where tasks come from and how a result is scored: one file a source, all behind ``Environment``."""

from forgejax.environments.base import Environment, Game, Score, Workspace, WorkTool
from forgejax.environments.harbor import Harbor
from forgejax.environments.openenv import OpenEnv
from forgejax.environments.reasoning_gym import DatasetConfig, ReasoningGym, TasksConfig
from forgejax.environments.rewards import RewardConfig, SpeedBaseline
from forgejax.environments.write_file import WriteFile, WriteFileConfig

__all__ = [
    "DatasetConfig",
    "Environment",
    "Game",
    "ReasoningGym",
    "RewardConfig",
    "Score",
    "SpeedBaseline",
    "TasksConfig",
    "WorkTool",
    "Workspace",
    "WriteFile",
    "WriteFileConfig",
    "make_environment",
]


def make_environment(config: TasksConfig) -> Environment:
    """The environment of a configuration. Raises ConfigError where its tasks cannot be had."""
    match config.kind:
        case "reasoning_gym":
            return ReasoningGym(config)
        case "write_file":
            return WriteFile(config.write_file, config.sandbox, eval_tasks=config.eval_tasks, seed=config.seed)
        case "harbor":
            return Harbor(
                config.harbor,
                config.sandbox,
                eval_tasks=config.eval_tasks,
                seed=config.seed,
                score_s=config.score_s,
            )
        case "openenv":
            return OpenEnv(config.openenv, eval_tasks=config.eval_tasks, seed=config.seed)

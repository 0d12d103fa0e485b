"""Agents: scaffolds that run unmodified agent programs, tasks and rewards, and the runner of episodes and groups."""

from forgejax.agents.coroutine import CoroutineScaffold, load_function
from forgejax.agents.episode import EpisodeRunner, StopPolicy
from forgejax.agents.process import ProcessScaffold
from forgejax.agents.rewards import RewardConfig, SpeedBaseline
from forgejax.agents.runner import GroupRunner, run_tasks
from forgejax.agents.scaffold import AgentConfig, AgentResult, EpisodeSpec, Scaffold
from forgejax.agents.tasks import DatasetConfig, ReasoningGymTasks, TasksConfig
from forgejax.agents.worker import WorkerScaffold

__all__ = [
    "AgentConfig",
    "AgentResult",
    "CoroutineScaffold",
    "DatasetConfig",
    "EpisodeRunner",
    "EpisodeSpec",
    "GroupRunner",
    "ProcessScaffold",
    "ReasoningGymTasks",
    "RewardConfig",
    "Scaffold",
    "SpeedBaseline",
    "StopPolicy",
    "TasksConfig",
    "WorkerScaffold",
    "make_scaffold",
    "run_tasks",
]


def make_scaffold(config: AgentConfig) -> Scaffold:
    """The scaffold for a configuration, not yet started. Raises ConfigError where its function cannot be imported."""
    if config.kind == "process":
        return ProcessScaffold(config)
    if config.kind == "worker":
        return WorkerScaffold(config)
    return CoroutineScaffold(load_function(config.function))

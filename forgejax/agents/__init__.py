"""Agents: scaffolds that run unmodified agent programs, tasks and rewards, and the runner of episodes and groups."""

from forgejax.agents.episode import EpisodeRunner, StopPolicy
from forgejax.agents.groups import GroupRunner, run_tasks
from forgejax.agents.scaffolds.base import AgentConfig, AgentResult, EpisodeSpec, Scaffold
from forgejax.agents.scaffolds.coroutine import CoroutineScaffold, load_function
from forgejax.agents.scaffolds.process import ProcessScaffold
from forgejax.agents.scaffolds.worker import WorkerScaffold

__all__ = [
    "AgentConfig",
    "AgentResult",
    "CoroutineScaffold",
    "EpisodeRunner",
    "EpisodeSpec",
    "GroupRunner",
    "ProcessScaffold",
    "Scaffold",
    "StopPolicy",
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

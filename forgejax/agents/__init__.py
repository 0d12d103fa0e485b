"""Agents: scaffolds that run unmodified agent programs, and the runners of episodes and groups."""

from forgejax.agents.episode import EpisodeRunner, StopPolicy
from forgejax.agents.groups import GroupRunner, run_tasks
from forgejax.agents.scaffolds import CoroutineScaffold, ProcessScaffold, WorkerScaffold, make_scaffold
from forgejax.agents.scaffolds.base import AgentConfig, AgentResult, EpisodeSpec, Scaffold
from forgejax.agents.tally import EpisodeCounts, EpisodeTally

__all__ = [
    "AgentConfig",
    "AgentResult",
    "CoroutineScaffold",
    "EpisodeCounts",
    "EpisodeRunner",
    "EpisodeSpec",
    "EpisodeTally",
    "GroupRunner",
    "ProcessScaffold",
    "Scaffold",
    "StopPolicy",
    "WorkerScaffold",
    "make_scaffold",
    "run_tasks",
]

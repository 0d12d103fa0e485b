"""Ways to run an agent program, all behind ``forgejax.agents.scaffolds.base.Scaffold``."""

from forgejax.agents.scaffolds.base import AgentConfig, Scaffold
from forgejax.agents.scaffolds.coroutine import CoroutineScaffold, load_function
from forgejax.agents.scaffolds.process import ProcessScaffold
from forgejax.agents.scaffolds.worker import WorkerScaffold

__all__ = ["CoroutineScaffold", "ProcessScaffold", "WorkerScaffold", "make_scaffold"]


def make_scaffold(config: AgentConfig) -> Scaffold:
    """The scaffold for a configuration, not yet started. Raises ConfigError where its function cannot be imported."""
    if config.kind == "process":
        return ProcessScaffold(config)
    if config.kind == "worker":
        return WorkerScaffold(config)
    return CoroutineScaffold(load_function(config.function), config.context)

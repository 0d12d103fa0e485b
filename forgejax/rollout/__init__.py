"""The inference side: every request gets its tokens, their exact log-probs and the policy version that drew each."""

from forgejax.rollout.driver.counters import DriverMetrics
from forgejax.rollout.driver.driver import Driver
from forgejax.rollout.driver.request_log import LoggedRequest, RequestLog
from forgejax.rollout.driver.warm_up import make_warm_ups
from forgejax.rollout.engine.config import EngineConfig
from forgejax.rollout.engine.engine import PolicyEngine
from forgejax.rollout.fleet.archive import Archive
from forgejax.rollout.fleet.base import DrawnRequest, EngineAccount, Engines
from forgejax.rollout.fleet.config import RolloutConfig
from forgejax.rollout.fleet.local import LocalEngines, LocalSampler
from forgejax.rollout.fleet.process import Launch, list_logs, make_environment_of_server
from forgejax.rollout.fleet.remote import RemoteSampler
from forgejax.rollout.fleet.servers import ServerEngines

__all__ = [
    "Archive",
    "DrawnRequest",
    "Driver",
    "DriverMetrics",
    "EngineAccount",
    "EngineConfig",
    "Engines",
    "Launch",
    "LocalEngines",
    "LocalSampler",
    "LoggedRequest",
    "PolicyEngine",
    "RemoteSampler",
    "RequestLog",
    "RolloutConfig",
    "ServerEngines",
    "list_logs",
    "make_environment_of_server",
    "make_warm_ups",
]

"""The inference side: every request gets its tokens, their exact log-probs and the policy version that drew each.

What is named here is imported when it is asked for: a client of an engine elsewhere needs no jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "Archive": "fleet.archive",
    "DrawnRequest": "fleet.base",
    "Driver": "driver.driver",
    "DriverMetrics": "driver.counters",
    "EngineAccount": "fleet.base",
    "EngineConfig": "engine.config",
    "Engines": "fleet.base",
    "Launch": "fleet.process",
    "LocalEngines": "fleet.local",
    "LocalSampler": "fleet.local",
    "LoggedRequest": "driver.request_log",
    "PolicyEngine": "engine.engine",
    "RemoteSampler": "fleet.remote",
    "RequestLog": "driver.request_log",
    "RolloutConfig": "fleet.config",
    "ServerEngines": "fleet.servers",
    "list_logs": "fleet.process",
    "make_environment_of_server": "fleet.process",
    "make_warm_ups": "driver.warm_up",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

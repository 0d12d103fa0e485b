"""The inference side: every request gets its tokens, their exact log-probs and the policy version that drew each."""

from forgejax.rollout.config import EngineConfig
from forgejax.rollout.counters import DriverMetrics
from forgejax.rollout.driver import Driver
from forgejax.rollout.engine import PolicyEngine
from forgejax.rollout.local import LocalSampler
from forgejax.rollout.remote import RemoteSampler
from forgejax.rollout.request_log import LoggedRequest, RequestLog

__all__ = [
    "Driver",
    "DriverMetrics",
    "EngineConfig",
    "LocalSampler",
    "LoggedRequest",
    "PolicyEngine",
    "RemoteSampler",
    "RequestLog",
]

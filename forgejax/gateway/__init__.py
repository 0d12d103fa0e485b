"""The gateway: unmodified agents call it as if it were a model vendor; it records what the model saw and sampled."""

from forgejax.gateway.config import GatewayConfig
from forgejax.gateway.server import Gateway

__all__ = ["Gateway", "GatewayConfig"]

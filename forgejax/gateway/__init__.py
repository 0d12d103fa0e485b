"""The gateway: unmodified agents call it as if it were a model vendor; it records what the model saw and sampled."""

from forgejax.gateway.chat_format import ChatFormat
from forgejax.gateway.config import GatewayConfig
from forgejax.gateway.server import Gateway

__all__ = ["ChatFormat", "Gateway", "GatewayConfig"]

"""The gateway's settings."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field

from forgejax.chat.tool_calls import TOOL_CALL_FORMATS, ToolFormatName
from forgejax.errors import ConfigError
from forgejax.gateway.limits import LimitsConfig
from forgejax.gateway.side_calls.rules import SideCall, SideCallRules


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Where the gateway listens and what it allows. Times are in seconds.

    ``port`` 0 picks a free one, and so does a taken one. ``public_host`` is the name agents reach this machine by,
    where it differs from ``host``. ``max_tokens_default`` holds where an agent asks for no limit; None means the rest
    of the context. ``max_tokens_limit`` bounds every reply, whatever the agent asks for. ``body_timeout_s`` is how long
    an agent may take to send its request or to read a piece of a stream; ``cancel_grace_s`` how long a cancelled
    request may take to hand back the tokens it has drawn; ``heartbeat_s`` how long a stream may be silent before a
    comment is sent, for agents that give up on one. ``limits`` bounds what agents may ask for. ``allow_anonymous``
    serves requests without a key, in sessions that nothing is kept of; on this machine only. ``tool_format`` is how the
    policy writes tool calls; ``auto`` takes the format its chat template writes. ``record`` is a folder in which
    sessions are kept, each in a file of its own; ``side_calls`` are the rules for requests that are no part of a task.
    """

    host: str = "127.0.0.1"
    port: int = 8801
    public_host: str | None = None
    model_name: str = "policy"
    tool_format: ToolFormatName = "auto"
    max_tokens_default: int | None = None
    max_tokens_limit: int | None = None
    request_timeout_s: float = 600.0
    body_timeout_s: float = 30.0
    cancel_grace_s: float = 2.0
    heartbeat_s: float = 10.0
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    allow_anonymous: bool = False
    record: str | None = None
    side_calls: tuple[SideCall, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"gateway.port is {self.port}; give a port from 1 to 65535, or 0 for any free one")
        if self.tool_format != "auto" and self.tool_format not in TOOL_CALL_FORMATS:
            known = ", ".join(sorted(TOOL_CALL_FORMATS))
            raise ConfigError(f"gateway.tool_format is {self.tool_format!r}; give auto or one of: {known}")
        for name in ("max_tokens_default", "max_tokens_limit"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise ConfigError(f"gateway.{name} is {given}; give at least 1, or leave it out")
        for name in ("request_timeout_s", "body_timeout_s", "cancel_grace_s", "heartbeat_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"gateway.{name} is {getattr(self, name)}; give a positive, finite number")
        SideCallRules(self.side_calls)
        if not self.host or not self.model_name:
            raise ConfigError("gateway.host and gateway.model_name must not be empty")
        self.check_host(self.host)

    def check_host(self, host: str) -> None:
        """Raises ConfigError where whoever reaches ``host`` from another machine would be served without a key."""
        if self.allow_anonymous and not is_loopback(host):
            raise ConfigError(
                f"gateway.allow_anonymous would serve whoever reaches {host!r}; listen on 127.0.0.1, or ask for keys"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

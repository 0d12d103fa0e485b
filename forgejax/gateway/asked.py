"""A request as it reaches its session, whatever way it came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forgejax.chat.messages import ChatRequest
from forgejax.gateway.dialects.base import Dialect, ParsedRequest
from forgejax.gateway.history.retries import RetryHints
from forgejax.gateway.side_calls.rules import SideCall, SideCallRules


@dataclass(frozen=True, kw_only=True)
class AskedRequest:
    """``dialect`` understood ``body`` as ``chat``; ``side_call`` is the rule that holds for it."""

    dialect: str
    body: Mapping[str, Any]
    chat: ChatRequest
    stream: bool
    hints: RetryHints
    side_call: SideCall | None = None


def make_asked(rules: SideCallRules, dialect: Dialect, request: ParsedRequest, hints: RetryHints) -> AskedRequest:
    """``request``, which ``dialect`` has read, with the rule that holds for it."""
    return AskedRequest(
        dialect=dialect.name,
        body=request.body,
        chat=request.chat,
        stream=request.stream,
        hints=hints,
        side_call=rules.find(dialect.routes[0].path, request.body.get("model"), request.chat),
    )

"""What the policy answered, before any wire format words it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from forgejax.chat.messages import Message

WireFinish = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A well-formed call. ``arguments`` is the object the policy wrote; ``id`` is unique in its session."""

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A drawn token as text (bytes that are no whole character show as U+FFFD) and its log-probability."""

    text: str
    logprob: float


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The policy's whole answer. Malformed tool calls are part of ``content``."""

    content: str
    tool_calls: tuple[ToolCall, ...]
    finish: WireFinish
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def message(self) -> Message:
        """The answer as a message of the history."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message

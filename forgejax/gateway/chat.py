"""The neutral nouns between wire formats and the policy: what was asked and what was answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from forgejax.types import SamplingLaw

Message = Mapping[str, Any]
"""A message as chat templates read it.

``role`` and ``content`` (always a string) are present; an assistant's ``tool_calls`` are
``{"id", "type": "function", "function": {"name", "arguments"}}`` with the arguments as an object (a string only where
they were not JSON); a tool's message may carry ``tool_call_id`` and ``name``.
"""

Tool = Mapping[str, Any]
"""A function tool: ``{"type": "function", "function": {"name", "description", "parameters"}}``."""

WireFinish = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """What an agent asks of the policy, whatever wire format it spoke. ``tools`` is empty where none may be called."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    law: SamplingLaw = field(default_factory=SamplingLaw)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False


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


@dataclass(frozen=True, kw_only=True)
class ReplyHead:
    """What is known of an answer before its first token."""

    id: str
    created: int
    model: str

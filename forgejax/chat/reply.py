"""What the policy answered, as parts in the order they were drawn, before any wire format words it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from forgejax.chat.messages import Message

ReplyFinish = Literal["stop", "length", "tool_calls"]
"""Why a reply ends: the policy (or a stop string) ended it, a limit did, or it waits for the results of its calls."""


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """What the agent is told; malformed tool calls are part of it, as they were written."""

    text: str


@dataclass(frozen=True, kw_only=True)
class ReasoningPart:
    """What the policy thought before it spoke."""

    text: str


@dataclass(frozen=True, kw_only=True)
class ToolCallPart:
    """A well-formed call. ``arguments`` is the object the policy wrote and ``raw`` the call as it spelled it, without
    tags; ``id`` is unique in its session."""

    id: str
    name: str
    arguments: Mapping[str, Any]
    raw: str


ReplyPart = TextPart | ReasoningPart | ToolCallPart


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """More of a text part; ``part`` is its index in the reply, and so it is in every delta."""

    part: int
    text: str


@dataclass(frozen=True, kw_only=True)
class ReasoningDelta:
    """More of a reasoning part."""

    part: int
    text: str


@dataclass(frozen=True, kw_only=True)
class ToolCallDelta:
    """A whole tool call: it is known to be well-formed only when it is complete."""

    part: int
    call: ToolCallPart


Delta = TextDelta | ReasoningDelta | ToolCallDelta
"""What came next of a reply. The deltas of one part follow one another, and joined they are the part."""


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
    """The policy's whole answer. Neighbouring parts of text are one part, and so are those of reasoning."""

    parts: tuple[ReplyPart, ...]
    finish: ReplyFinish
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None = None

    @property
    def content(self) -> str:
        """All text parts, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def reasoning(self) -> str:
        """All reasoning parts, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, ReasoningPart))

    @property
    def tool_calls(self) -> tuple[ToolCallPart, ...]:
        return tuple(part for part in self.parts if isinstance(part, ToolCallPart))

    @property
    def message(self) -> Message:
        """The answer as a message of the history."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message

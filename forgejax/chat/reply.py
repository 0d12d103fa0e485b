"""What the policy answered, as parts in the order they were drawn, before any wire format words it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from forgejax.chat.messages import Message, ReasoningPart, ToolCallPart

ReplyFinish = Literal["stop", "length", "tool_calls"]
"""Why a reply ends: the policy (or a stop string) ended it, a limit did, or it waits for the results of its calls."""


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
class ToolCallStart:
    """A call has begun: what it calls is known, its arguments follow."""

    part: int
    id: str
    name: str


@dataclass(frozen=True, kw_only=True)
class ToolCallDelta:
    """More of a call's arguments, as JSON text."""

    part: int
    text: str


@dataclass(frozen=True, kw_only=True)
class PartEnd:
    """The part is complete: the whole of it if it is a call, its signature if it is reasoning."""

    part: int
    call: ToolCallPart | None = None
    signature: str | None = None


Delta = TextDelta | ReasoningDelta | ToolCallStart | ToolCallDelta | PartEnd
"""What came next of a reply. The deltas of one part follow one another, its end is the last of them, and joined they
are the part."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A drawn token as bytes and its log-probability. Bytes of all tokens, joined, are the text's."""

    data: bytes
    logprob: float

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "replace")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The policy's whole answer. Neighbouring parts of text are one part, and so are those of reasoning.

    ``stop`` is the stop string that ended it, or None. ``signature`` names the turn.
    """

    message: Message
    finish: ReplyFinish
    usage: Usage
    signature: str
    stop: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


def list_deltas(reply: Reply) -> list[Delta]:
    """A whole reply as deltas, one for each part beside its beginning and end."""
    deltas: list[Delta] = []
    for index, part in enumerate(reply.message.parts):
        if isinstance(part, ToolCallPart):
            deltas.append(ToolCallStart(part=index, id=part.id or "", name=part.name))
            deltas += [ToolCallDelta(part=index, text=part.raw)] if part.raw else []
            deltas.append(PartEnd(part=index, call=part))
        else:
            signature = part.signature if isinstance(part, ReasoningPart) else None
            kind = ReasoningDelta if isinstance(part, ReasoningPart) else TextDelta
            deltas += [kind(part=index, text=part.text), PartEnd(part=index, signature=signature)]
    return deltas

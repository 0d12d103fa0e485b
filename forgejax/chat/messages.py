"""What is said in a chat, as parts in the order they were said, whatever wire format or chat template words it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from forgejax.types import SamplingLaw

Role = Literal["system", "user", "assistant", "tool"]
CallRule = Literal["auto", "none", "required"]


@dataclass(frozen=True, kw_only=True)
class TextPart:
    """What is said to the other side; of a reply, attempts at calls that named no tool are part of it, as written."""

    text: str


@dataclass(frozen=True, kw_only=True)
class ReasoningPart:
    """What the policy thought before it spoke. ``signature`` names the turn it was thought in, where that is known; an
    agent may send back the signature alone."""

    text: str
    signature: str | None = None


@dataclass(frozen=True, kw_only=True)
class ToolCallPart:
    """A call. ``raw`` is its arguments as JSON text, as they were drawn or sent; ``arguments`` the object they spell,
    or None where they spell none. ``problem`` says what is wrong with it, where it cannot be made as it stands."""

    id: str | None = None
    name: str
    raw: str
    arguments: Mapping[str, Any] | None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class RefusalPart:
    """An assistant's refusal, from a history that another model began; the policy itself never makes one."""

    text: str


MessagePart = TextPart | ReasoningPart | ToolCallPart | RefusalPart


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message. Reasoning, refusals and calls are the assistant's alone; ``tool_call_id`` and ``name`` a tool's."""

    role: Role
    parts: tuple[MessagePart, ...]
    tool_call_id: str | None = None
    name: str | None = None

    @classmethod
    def of_text(cls, role: Role, text: str) -> Message:
        return cls(role=role, parts=(TextPart(text=text),))

    @property
    def text(self) -> str:
        """All text, refusals included, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart | RefusalPart))

    @property
    def reasoning(self) -> str:
        """All reasoning, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, ReasoningPart))

    @property
    def tool_calls(self) -> tuple[ToolCallPart, ...]:
        return tuple(part for part in self.parts if isinstance(part, ToolCallPart))

    @property
    def signatures(self) -> frozenset[str]:
        return frozenset(p.signature for p in self.parts if isinstance(p, ReasoningPart) and p.signature is not None)


TemplateMessage = Mapping[str, Any]
"""A message as chat templates read it.

``role`` and ``content`` are present; an assistant's ``tool_calls`` are ``{"id", "type": "function", "function":
{"name", "arguments"}}`` with the arguments as an object, or as the JSON text of one; what it thought is where the
template looks for it (``ThoughtFormat``); a tool's message may carry ``tool_call_id`` and ``name``.
"""

Tool = Mapping[str, Any]
"""A function tool: ``{"type": "function", "function": {"name", "description", "parameters"}}``."""


@dataclass(frozen=True, kw_only=True)
class ReplySchema:
    """The JSON schema that the text of a reply is to follow, as JSON text, and the field of the request it stood in."""

    text: str
    field: str


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """What an agent asks of the policy, whatever wire format it spoke.

    ``tools`` are all that the policy is shown, whatever ``calls`` says: with ``none`` what it writes as a call stays
    text, with ``required`` its reply begins with a call. ``allowed`` names the tools that may be called, None all.
    """

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    calls: CallRule = "auto"
    allowed: frozenset[str] | None = None
    law: SamplingLaw = field(default_factory=SamplingLaw)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: bool = False
    schema: ReplySchema | None = None

    @property
    def callable_tools(self) -> tuple[Tool, ...]:
        named = self.allowed
        return tuple(tool for tool in self.tools if named is None or tool["function"]["name"] in named)


def read_call(name: str, raw: str, id_: str | None = None) -> ToolCallPart:
    """A call of a history, from its arguments as text: an empty text is an empty object, half a surrogate pair U+FFFD.

    Arguments that are cut off, or no object, are kept as text.
    """
    arguments, problem = _read_object(raw)
    return ToolCallPart(id=id_, name=name, raw=raw, arguments=arguments, problem=problem)


def mend_surrogates(value: Any) -> Any:
    """``value``, any JSON, with halves of surrogate pairs, which are no characters, as U+FFFD."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, dict):
        return {mend_surrogates(key): mend_surrogates(item) for key, item in value.items()}
    if isinstance(value, list):
        return [mend_surrogates(item) for item in value]
    return value


def canonicalize_json(value: Any) -> Any:
    """Equal for JSON that means the same in every language: a number is a number (2.0 is 2, and beyond 2^53 what a
    double keeps of it), and objects have no order."""
    if isinstance(value, Mapping):
        return {key: canonicalize_json(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [canonicalize_json(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    try:
        number = float(value)
    except OverflowError:
        return value
    return int(number) if math.isfinite(number) and number.is_integer() else number


def _read_object(raw: str) -> tuple[Mapping[str, Any] | None, str | None]:
    if not raw.strip():
        return {}, None
    try:
        value = mend_surrogates(json.loads(raw))
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"
    return (value, None) if isinstance(value, dict) else (None, "arguments are not an object")

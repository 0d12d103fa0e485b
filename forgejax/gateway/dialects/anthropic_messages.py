"""Anthropic's Messages: requests in, messages and events out, and tokens counted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from forgejax.chat.messages import ChatRequest, MessagePart, ReasoningPart, TextPart, Tool, ToolCallPart
from forgejax.chat.reply import Delta, PartEnd, ReasoningDelta, Reply, TextDelta, ToolCallDelta, ToolCallStart, Usage
from forgejax.gateway.dialects.anthropic_blocks import (
    has_vendors_tools,
    read_dialogue,
    read_schemas,
    read_system,
    word_block,
)
from forgejax.gateway.dialects.base import (
    AskingSession,
    Event,
    Page,
    ParsedRequest,
    ReplyHead,
    Route,
    find_bearer,
)
from forgejax.gateway.dialects.fields import (
    CallChoice,
    choose_calls,
    list_ignored,
    read_boolean,
    read_law,
    read_limit,
    read_mapping,
    read_stops,
    read_text,
)
from forgejax.gateway.dialects.reply_schemas import choose_schema, read_reply_format
from forgejax.gateway.memory import ReplyMemory
from forgejax.gateway.refusals import OVERLOADED, OverflowRefusedError, RefusedError, refuse_field

_SERVED = frozenset(
    {
        "messages",
        "system",
        "model",
        "tools",
        "tool_choice",
        "max_tokens",
        "stop_sequences",
        "stream",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "output_config",
        "output_format",
        # these ask for nothing that has an effect on an answer
        "metadata",
        "service_tier",
        "cache_control",
    }
)
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    410: "permission_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_FINISHES = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class AnthropicMessages:
    """Fields it does not know are ignored and counted; those it cannot serve are refused.

    A thinking block's ``signature`` names the turn. ``cache_control`` may stand anywhere: every prefix is cached.
    """

    name = "messages"
    routes = (Route(path="/v1/messages"),)
    statuses: Mapping[str, int] = {OVERLOADED: 529}
    credential_form = "x-api-key: KEY"
    streamed_failures: frozenset[str] = frozenset()

    @property
    def pages(self) -> Sequence[Page]:
        return (Page(method="POST", path="/v1/messages/count_tokens", answer=self._count),)

    def credential(self, headers: Mapping[str, str]) -> str | None:
        return find_bearer(headers)

    def reply_id(self, request_id: str) -> str:
        return f"msg_{request_id.replace('-', '_')}"

    def parse(self, body: Mapping[str, Any], memory: ReplyMemory) -> ParsedRequest:
        if body.get("model") is not None:
            read_text(body["model"], "model")
        tools = read_schemas(body.get("tools"))
        choice = _read_choice(body.get("tool_choice"), tools)
        output = read_mapping(body.get("output_config") or {}, "output_config")
        chat = ChatRequest(
            messages=(*read_system(body.get("system")), *read_dialogue(body.get("messages"))),
            tools=tools,
            calls=choice.rule,
            allowed=choice.allowed,
            law=read_law(body),
            max_tokens=read_limit(body, "max_tokens"),
            stop=read_stops(body, "stop_sequences"),
            schema=choose_schema(
                [
                    read_reply_format(output.get("format"), "output_config.format"),
                    read_reply_format(body.get("output_format"), "output_format"),
                ]
            ),
        )
        rest = ("output_config",) if output.keys() - {"format"} else ()
        hosted = ("tools",) if has_vendors_tools(body.get("tools")) else ()
        ignored = (*list_ignored(body, _SERVED), *rest, *hosted)
        return ParsedRequest(chat=chat, stream=read_boolean(body, "stream"), body=body, ignored=ignored)

    def response(self, head: ReplyHead, request: ParsedRequest, reply: Reply) -> Mapping[str, Any]:
        content = [word_block(part, index) for index, part in enumerate(reply.message.parts)]
        return _word_message(head, content, _word_usage(reply.usage)) | _word_stop(reply)

    def stream(self, head: ReplyHead, request: ParsedRequest) -> AnthropicStream:
        return AnthropicStream(head)

    def error(self, refusal: RefusedError) -> Mapping[str, Any]:
        return _word_error(refusal)

    async def _count(
        self, session: AskingSession, body: Mapping[str, Any], names: Mapping[str, str]
    ) -> Mapping[str, Any]:
        return {"input_tokens": await session.count_tokens(self.parse(body, session.memory).chat)}


class AnthropicStream:
    """A message starts; its blocks start, grow and stop; then the message has a stop reason and its usage."""

    def __init__(self, head: ReplyHead) -> None:
        self._head = head
        self._open = False

    def start(self) -> Sequence[Event]:
        usage = {
            "input_tokens": self._head.prompt_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        }
        message = _word_message(self._head, [], usage) | {"stop_reason": None, "stop_sequence": None}
        return [_word("message_start", message=message), _word("ping")]

    def delta(self, delta: Delta) -> Sequence[Event]:
        index = delta.part
        if isinstance(delta, PartEnd):
            self._open = False
            stop = _word("content_block_stop", index=index)
            if delta.signature is None:
                return [stop]
            signed = {"type": "signature_delta", "signature": delta.signature}
            return [_word("content_block_delta", index=index, delta=signed), stop]
        if isinstance(delta, ToolCallStart):
            return self._open_block(index, ToolCallPart(id=delta.id, name=delta.name, raw="", arguments={}))
        if isinstance(delta, ToolCallDelta):
            return [_word_delta(index, "input_json_delta", "partial_json", delta.text)]
        if isinstance(delta, ReasoningDelta):
            begun = [] if self._open else self._open_block(index, ReasoningPart(text=""))
            return [*begun, _word_delta(index, "thinking_delta", "thinking", delta.text)]
        assert isinstance(delta, TextDelta)
        begun = [] if self._open else self._open_block(index, TextPart(text=""))
        return [*begun, _word_delta(index, "text_delta", "text", delta.text)]

    def end(self, reply: Reply) -> Sequence[Event]:
        return [
            _word("message_delta", delta=_word_stop(reply), usage=_word_usage(reply.usage)),
            _word("message_stop"),
        ]

    def error(self, refusal: RefusedError) -> Sequence[Event]:
        return [("error", json.dumps(_word_error(refusal)))]

    def _open_block(self, index: int, part: MessagePart) -> list[Event]:
        self._open = True
        return [_word("content_block_start", index=index, content_block=word_block(part, index))]


def _word(kind: str, **fields: Any) -> Event:
    return kind, json.dumps({"type": kind, **fields}, separators=(",", ":"))


def _word_delta(index: int, kind: str, field: str, text: str) -> Event:
    return _word("content_block_delta", index=index, delta={"type": kind, field: text})


def _word_message(head: ReplyHead, content: list[Any], usage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": head.id,
        "type": "message",
        "role": "assistant",
        "model": head.model,
        "content": content,
        "usage": usage,
    }


def _word_stop(reply: Reply) -> dict[str, Any]:
    reason = _FINISHES[reply.finish] if reply.stop is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": reply.stop}


def _word_usage(usage: Usage) -> dict[str, Any]:
    """Here the cached tokens are not among the input tokens."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }


def _word_error(refusal: RefusedError) -> dict[str, Any]:
    kind = _ERROR_TYPES.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "api_error")
    message = refusal.message
    if isinstance(refusal, OverflowRefusedError):
        message = f"prompt is too long: {refusal.prompt_tokens} tokens > {refusal.context_length} maximum"
    return {"type": "error", "error": {"type": kind, "message": message}}


def _read_choice(choice: object, tools: Sequence[Tool]) -> CallChoice:
    if choice is None:
        return choose_calls("auto", None, tools, "tool_choice")
    fields = read_mapping(choice, "tool_choice")
    kind = fields.get("type")
    if kind not in ("auto", "none", "any", "tool"):
        raise refuse_field("tool_choice.type", kind, "one of auto, any, tool, none")
    named = [fields.get("name")] if kind == "tool" else None
    return choose_calls({"any": "required", "tool": "required"}.get(kind, kind), named, tools, "tool_choice")

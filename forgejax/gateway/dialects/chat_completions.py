"""OpenAI's chat completions: requests in, responses and chunks out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from forgejax.chat.messages import ChatRequest, Tool, ToolCallPart
from forgejax.chat.reply import (
    Delta,
    PartEnd,
    ReasoningDelta,
    Reply,
    TextDelta,
    ToolCallDelta,
    Usage,
)
from forgejax.gateway.dialects.base import Event, Page, ParsedRequest, ReplyHead, Route, find_bearer
from forgejax.gateway.dialects.chat_messages import read_messages, read_tools
from forgejax.gateway.dialects.fields import (
    CallChoice,
    choose_calls,
    list_ignored,
    read_array,
    read_bias,
    read_boolean,
    read_integer,
    read_law,
    read_limit,
    read_mapping,
    read_stops,
    read_text,
)
from forgejax.gateway.dialects.reply_schemas import choose_schema, read_guided_json, read_reply_format
from forgejax.gateway.memory import ReplyMemory
from forgejax.gateway.refusals import RefusedError, refuse_field

_DONE: Event = (None, "[DONE]")

SERVED = frozenset(
    {
        "messages",
        "model",
        "tools",
        "functions",
        "tool_choice",
        "function_call",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "logit_bias",
        "max_tokens",
        "max_completion_tokens",
        "stop",
        "seed",
        "response_format",
        "guided_json",
        "logprobs",
        "top_logprobs",
        "n",
        "stream",
        "stream_options",
        # these ask for nothing that has an effect on an answer
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)


class ChatCompletions:
    """Fields it does not know are ignored and counted; those it cannot serve (``n`` above 1, say) are refused."""

    name = "chat_completions"
    routes = (Route(path="/v1/chat/completions"),)
    pages: Sequence[Page] = ()
    statuses: Mapping[str, int] = {}
    credential_form = "Authorization: Bearer KEY"
    streamed_failures: frozenset[str] = frozenset()

    def credential(self, headers: Mapping[str, str]) -> str | None:
        return find_bearer(headers)

    def reply_id(self, request_id: str) -> str:
        return f"chatcmpl-{request_id}"

    def parse(self, body: Mapping[str, Any], memory: ReplyMemory) -> ParsedRequest:
        _refuse_unserved(body)
        _read_include_usage(body)
        limit = read_limit(body, "max_completion_tokens")
        tools = read_tools(body)
        choice = _read_choice(body, tools)
        chat = ChatRequest(
            messages=read_messages(body.get("messages")),
            tools=tools,
            calls=choice.rule,
            allowed=choice.allowed,
            law=replace(read_law(body), logit_bias=read_bias(body, "logit_bias")),
            max_tokens=read_limit(body, "max_tokens") if limit is None else limit,
            stop=read_stops(body, "stop"),
            seed=read_integer(body, "seed", least=-(2**63), most=2**63 - 1),
            logprobs=read_boolean(body, "logprobs"),
            schema=choose_schema(
                [
                    read_reply_format(body.get("response_format"), "response_format", inside="json_schema"),
                    read_guided_json(body.get("guided_json")),
                ]
            ),
        )
        return ParsedRequest(
            chat=chat, stream=read_boolean(body, "stream"), body=body, ignored=list_ignored(body, SERVED)
        )

    def response(self, head: ReplyHead, request: ParsedRequest, reply: Reply) -> Mapping[str, Any]:
        said = reply.message
        message: dict[str, Any] = {"role": "assistant", "content": said.text, "refusal": None}
        if said.reasoning:
            message["reasoning_content"] = message["reasoning"] = said.reasoning
        if said.tool_calls:
            message["content"] = said.text or None
            message["tool_calls"] = [_word_call(call) for call in said.tool_calls]
        choice = {"index": 0, "message": message, "logprobs": _word_logprobs(reply), "finish_reason": reply.finish}
        return _word_body(head, "chat.completion", [choice]) | {"usage": _word_usage(reply.usage)}

    def stream(self, head: ReplyHead, request: ParsedRequest) -> ChatCompletionsStream:
        return ChatCompletionsStream(head, include_usage=_read_include_usage(request.body))

    def error(self, refusal: RefusedError) -> Mapping[str, Any]:
        return word_openai_error(refusal)


class ChatCompletionsStream:
    """Chunks of one reply: the role first, the finish reason (and log-probs) last, then the usage if asked for."""

    def __init__(self, head: ReplyHead, *, include_usage: bool) -> None:
        self._head = head
        self._include_usage = include_usage
        self._calls = 0

    def start(self) -> Sequence[Event]:
        return [self._word_chunk({"role": "assistant", "content": "", "refusal": None})]

    def delta(self, delta: Delta) -> Sequence[Event]:
        if isinstance(delta, TextDelta):
            return [self._word_chunk({"content": delta.text})]
        if isinstance(delta, ReasoningDelta):
            return [self._word_chunk({"reasoning_content": delta.text, "reasoning": delta.text})]
        if isinstance(delta, PartEnd):
            return []
        if isinstance(delta, ToolCallDelta):
            piece: dict[str, Any] = {"index": self._calls - 1, "function": {"arguments": delta.text}}
        else:
            piece = {"index": self._calls, "id": delta.id, "type": "function"}
            piece["function"] = {"name": delta.name, "arguments": ""}
            self._calls += 1
        return [self._word_chunk({"tool_calls": [piece]})]

    def end(self, reply: Reply) -> Sequence[Event]:
        events = [self._word_chunk({}, finish=reply.finish, logprobs=_word_logprobs(reply))]
        if self._include_usage:
            events.append(self._word_event([], usage=_word_usage(reply.usage)))
        return [*events, _DONE]

    def error(self, refusal: RefusedError) -> Sequence[Event]:
        return [(None, json.dumps(word_openai_error(refusal))), _DONE]

    def _word_chunk(self, delta: Mapping[str, Any], finish: str | None = None, logprobs: Any = None) -> Event:
        return self._word_event([{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}])

    def _word_event(self, choices: list[Any], usage: Mapping[str, Any] | None = None) -> Event:
        body = _word_body(self._head, "chat.completion.chunk", choices)
        if self._include_usage:
            body["usage"] = usage
        return None, json.dumps(body, separators=(",", ":"))


def word_openai_error(refusal: RefusedError) -> dict[str, Any]:
    """An error in the shape of OpenAI's API."""
    return {
        "error": {
            "message": refusal.message,
            "type": refusal.kind,
            "param": refusal.param,
            "code": refusal.code,
        }
    }


def _word_body(head: ReplyHead, kind: str, choices: list[Any]) -> dict[str, Any]:
    return {"id": head.id, "object": kind, "created": head.created, "model": head.model, "choices": choices}


def _word_call(call: ToolCallPart) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.raw}}


def _word_usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _word_logprobs(reply: Reply) -> dict[str, Any] | None:
    if reply.logprobs is None:
        return None
    return {
        "content": [
            {"token": item.text, "logprob": item.logprob, "bytes": list(item.data), "top_logprobs": []}
            for item in reply.logprobs
        ],
        "refusal": None,
    }


def _refuse_unserved(body: Mapping[str, Any]) -> None:
    if read_integer(body, "n", default=1) != 1:
        raise refuse_field("n", body["n"], "1; send the request again for another answer")
    if read_integer(body, "top_logprobs", default=0) != 0:
        raise refuse_field("top_logprobs", body["top_logprobs"], "0: only the drawn token's log-probability is known")
    if body.get("model") is not None:
        read_text(body["model"], "model")


def _read_choice(body: Mapping[str, Any], tools: Sequence[Tool]) -> CallChoice:
    name = "tool_choice" if body.get("tool_choice") is not None else "function_call"
    choice = body.get(name)
    if choice is None or isinstance(choice, str):
        return choose_calls(choice or "auto", None, tools, name)
    fields = read_mapping(choice, name)
    kind = fields.get("type", "function")
    inside = fields.get(kind) if isinstance(kind, str) else None
    if kind == "allowed_tools":
        allowed = read_mapping(inside, f"{name}.allowed_tools")
        named = [_read_name(item) for item in read_array(allowed.get("tools"), f"{name}.allowed_tools.tools")]
        return choose_calls(allowed.get("mode"), named, tools, name)
    return choose_calls("required", [_read_name(fields)], tools, name)


def _read_name(item: Any) -> Any:
    """The name in ``{"type": "function", "function": {"name"}}``, or in ``{"name"}`` as it once was."""
    fields = item if isinstance(item, dict) else {}
    inside = fields.get("function") or fields.get("custom") or fields
    return inside.get("name") if isinstance(inside, dict) else None


def _read_include_usage(body: Mapping[str, Any]) -> bool:
    return read_boolean(read_mapping(body.get("stream_options") or {}, "stream_options"), "include_usage")

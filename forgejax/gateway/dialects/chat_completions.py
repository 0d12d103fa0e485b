"""OpenAI's chat completions: ``POST /v1/chat/completions``, streamed or not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from forgejax.chat.messages import ChatRequest
from forgejax.chat.reply import Delta, ReasoningDelta, Reply, TextDelta, ToolCallPart, Usage
from forgejax.gateway.dialects.base import Event, ParsedRequest, ReplyHead, Route
from forgejax.gateway.dialects.chat_messages import read_messages, read_tools
from forgejax.gateway.dialects.fields import (
    read_array,
    read_boolean,
    read_integer,
    read_mapping,
    read_number,
    read_text,
)
from forgejax.gateway.memory import ReplyMemory
from forgejax.gateway.refusals import RefusedError, refuse_field
from forgejax.types import SamplingLaw

_DONE: Event = (None, "[DONE]")


class ChatCompletions:
    """Fields it does not know are ignored; those it cannot serve (``n`` above 1, say) are refused."""

    name = "chat_completions"
    routes = (Route(path="/v1/chat/completions"),)
    credential_form = "Authorization: Bearer KEY"

    def credential(self, headers: Mapping[str, str]) -> str | None:
        scheme, _, key = headers.get("Authorization", "").partition(" ")
        return key.strip() if scheme.lower() == "bearer" and key.strip() else None

    def reply_id(self, request_id: str) -> str:
        return f"chatcmpl-{request_id}"

    def parse(self, body: Mapping[str, Any], memory: ReplyMemory) -> ParsedRequest:
        _refuse_unserved(body)
        tools = read_tools(body.get("tools"))
        _read_include_usage(body)
        limit = read_integer(body, "max_tokens", least=1)
        chat = ChatRequest(
            messages=read_messages(body.get("messages")),
            tools=() if body.get("tool_choice") == "none" else tools,
            law=SamplingLaw(
                temperature=read_number(body, "temperature", least=0.0, most=2.0, default=1.0),
                top_p=_read_top_p(body),
                top_k=max(0, read_integer(body, "top_k", least=-1) or 0),
            ),
            max_tokens=read_integer(body, "max_completion_tokens", least=1, default=limit),
            stop=_read_stop(body.get("stop")),
            seed=read_integer(body, "seed", least=-(2**63), most=2**63 - 1),
            logprobs=read_boolean(body, "logprobs"),
        )
        return ParsedRequest(chat=chat, stream=read_boolean(body, "stream"), body=body)

    def response(self, head: ReplyHead, request: ParsedRequest, reply: Reply) -> Mapping[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": reply.content, "refusal": None}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if reply.tool_calls:
            message["content"] = reply.content or None
            message["tool_calls"] = [_word_call(call) for call in reply.tool_calls]
        choice = {"index": 0, "message": message, "logprobs": _word_logprobs(reply), "finish_reason": reply.finish}
        return _word_body(head, "chat.completion", [choice]) | {"usage": _word_usage(reply.usage)}

    def stream(self, head: ReplyHead, request: ParsedRequest) -> ChatCompletionsStream:
        return ChatCompletionsStream(head, include_usage=_read_include_usage(request.body))

    def error(self, refusal: RefusedError) -> Mapping[str, Any]:
        return {
            "error": {
                "message": refusal.message,
                "type": refusal.kind,
                "param": refusal.param,
                "code": refusal.code,
            }
        }


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
            return [self._word_chunk({"reasoning_content": delta.text})]
        index, self._calls = self._calls, self._calls + 1
        return [self._word_chunk({"tool_calls": [{"index": index} | _word_call(delta.call)]})]

    def end(self, reply: Reply) -> Sequence[Event]:
        events = [self._word_chunk({}, finish=reply.finish, logprobs=_word_logprobs(reply))]
        if self._include_usage:
            events.append(self._word_event([], usage=_word_usage(reply.usage)))
        return [*events, _DONE]

    def error(self, refusal: RefusedError) -> Sequence[Event]:
        return [(None, json.dumps(ChatCompletions().error(refusal))), _DONE]

    def _word_chunk(self, delta: Mapping[str, Any], finish: str | None = None, logprobs: Any = None) -> Event:
        return self._word_event([{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}])

    def _word_event(self, choices: list[Any], usage: Mapping[str, Any] | None = None) -> Event:
        body = _word_body(self._head, "chat.completion.chunk", choices)
        if self._include_usage:
            body["usage"] = usage
        return None, json.dumps(body, separators=(",", ":"))


def _word_body(head: ReplyHead, kind: str, choices: list[Any]) -> dict[str, Any]:
    return {"id": head.id, "object": kind, "created": head.created, "model": head.model, "choices": choices}


def _word_call(call: ToolCallPart) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _word_usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _word_logprobs(reply: Reply) -> dict[str, Any] | None:
    if reply.logprobs is None:
        return None
    return {
        "content": [
            {"token": item.text, "logprob": item.logprob, "bytes": list(item.text.encode()), "top_logprobs": []}
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
    choice = body.get("tool_choice")
    if choice not in (None, "none", "auto"):
        raise refuse_field("tool_choice", choice, "none or auto: the policy itself chooses what to call")


def _read_include_usage(body: Mapping[str, Any]) -> bool:
    return read_boolean(read_mapping(body.get("stream_options") or {}, "stream_options"), "include_usage")


def _read_top_p(body: Mapping[str, Any]) -> float:
    top_p = read_number(body, "top_p", least=0.0, most=1.0, default=1.0)
    if top_p == 0.0:
        raise refuse_field("top_p", body["top_p"], "a number above 0 and at most 1")
    return top_p


def _read_stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (read_text(value, "stop"),)
    return tuple(read_text(item, f"stop[{index}]") for index, item in enumerate(read_array(value, "stop")))

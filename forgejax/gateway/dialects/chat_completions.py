"""OpenAI's chat completions: ``POST /v1/chat/completions``, streamed or not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from forgejax.chat.messages import ChatRequest
from forgejax.chat.reply import Reply, ToolCall, Usage
from forgejax.chat.reply_builder import Delta, TextDelta
from forgejax.gateway.dialects.base import Event, ReplyHead
from forgejax.gateway.dialects.chat_messages import read_messages, read_tools
from forgejax.gateway.dialects.fields import array, boolean, integer, mapping, number, text
from forgejax.gateway.refusals import RefusedError, bad_field
from forgejax.types import SamplingLaw

_DONE: Event = (None, "[DONE]")


class ChatCompletions:
    """Fields it does not know are ignored; those it cannot serve (``n`` above 1, say) are refused."""

    name = "chat_completions"
    path = "/v1/chat/completions"

    def parse(self, body: Mapping[str, Any]) -> ChatRequest:
        _refuse_unserved(body)
        tools = read_tools(body.get("tools"))
        stream_options = mapping(body.get("stream_options") or {}, "stream_options")
        limit = integer(body, "max_tokens", least=1)
        return ChatRequest(
            messages=read_messages(body.get("messages")),
            tools=() if body.get("tool_choice") == "none" else tools,
            law=SamplingLaw(
                temperature=number(body, "temperature", least=0.0, most=2.0, default=1.0),
                top_p=_top_p(body),
                top_k=max(0, integer(body, "top_k", least=-1) or 0),
            ),
            max_tokens=integer(body, "max_completion_tokens", least=1, default=limit),
            stop=_stop(body.get("stop")),
            seed=integer(body, "seed", least=-(2**63), most=2**63 - 1),
            stream=boolean(body, "stream"),
            include_usage=boolean(stream_options, "include_usage"),
            logprobs=boolean(body, "logprobs"),
        )

    def response(self, head: ReplyHead, reply: Reply) -> Mapping[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": reply.content, "refusal": None}
        if reply.tool_calls:
            message["content"] = reply.content or None
            message["tool_calls"] = [_call(call) for call in reply.tool_calls]
        choice = {"index": 0, "message": message, "logprobs": _logprobs(reply), "finish_reason": reply.finish}
        return _body(head, "chat.completion", [choice]) | {"usage": _usage(reply.usage)}

    def stream(self, head: ReplyHead, request: ChatRequest) -> ChatCompletionsStream:
        return ChatCompletionsStream(head, request.include_usage)

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

    def __init__(self, head: ReplyHead, include_usage: bool) -> None:
        self._head = head
        self._include_usage = include_usage

    def start(self) -> Sequence[Event]:
        return [self._chunk({"role": "assistant", "content": "", "refusal": None})]

    def delta(self, delta: Delta) -> Sequence[Event]:
        if isinstance(delta, TextDelta):
            return [self._chunk({"content": delta.text})]
        return [self._chunk({"tool_calls": [{"index": delta.index} | _call(delta.call)]})]

    def end(self, reply: Reply) -> Sequence[Event]:
        events = [self._chunk({}, finish=reply.finish, logprobs=_logprobs(reply))]
        if self._include_usage:
            events.append(self._event([], usage=_usage(reply.usage)))
        return [*events, _DONE]

    def error(self, refusal: RefusedError) -> Sequence[Event]:
        return [(None, json.dumps(ChatCompletions().error(refusal))), _DONE]

    def _chunk(self, delta: Mapping[str, Any], finish: str | None = None, logprobs: Any = None) -> Event:
        return self._event([{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}])

    def _event(self, choices: list[Any], usage: Mapping[str, Any] | None = None) -> Event:
        body = _body(self._head, "chat.completion.chunk", choices)
        if self._include_usage:
            body["usage"] = usage
        return None, json.dumps(body, separators=(",", ":"))


def _body(head: ReplyHead, kind: str, choices: list[Any]) -> dict[str, Any]:
    return {"id": head.id, "object": kind, "created": head.created, "model": head.model, "choices": choices}


def _call(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _logprobs(reply: Reply) -> dict[str, Any] | None:
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
    if integer(body, "n", default=1) != 1:
        raise bad_field("n", body["n"], "1; send the request again for another answer")
    if integer(body, "top_logprobs", default=0) != 0:
        raise bad_field("top_logprobs", body["top_logprobs"], "0: only the drawn token's log-probability is known")
    if body.get("model") is not None:
        text(body["model"], "model")
    choice = body.get("tool_choice")
    if choice not in (None, "none", "auto"):
        raise bad_field("tool_choice", choice, "none or auto: the policy itself chooses what to call")


def _top_p(body: Mapping[str, Any]) -> float:
    top_p = number(body, "top_p", least=0.0, most=1.0, default=1.0)
    if top_p == 0.0:
        raise bad_field("top_p", body["top_p"], "a number above 0 and at most 1")
    return top_p


def _stop(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (text(value, "stop"),)
    return tuple(text(item, f"stop[{index}]") for index, item in enumerate(array(value, "stop")))

"""OpenAI's Responses: requests in, responses and events out, and the pages of a stored response."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from forgejax.chat.messages import ChatRequest, Message, Tool
from forgejax.chat.reply import Reply, Usage
from forgejax.gateway.dialects.base import AskingSession, Page, ParsedRequest, ReplyHead, Route, find_bearer
from forgejax.gateway.dialects.chat_completions import word_openai_error
from forgejax.gateway.dialects.fields import (
    CallChoice,
    choose_calls,
    list_ignored,
    read_array,
    read_boolean,
    read_integer,
    read_law,
    read_limit,
    read_mapping,
    read_text,
)
from forgejax.gateway.dialects.reply_schemas import read_reply_format
from forgejax.gateway.dialects.responses_items import OfferedTool, read_items, read_offered, word_items
from forgejax.gateway.dialects.responses_stream import ResponsesStream
from forgejax.gateway.memory import ReplyMemory
from forgejax.gateway.refusals import RefusedError, refuse_field

_SERVED = frozenset(
    {
        "input",
        "instructions",
        "previous_response_id",
        "model",
        "tools",
        "tool_choice",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "max_output_tokens",
        "seed",
        "text",
        "stream",
        "store",
        "include",
        # these ask for nothing that has an effect on an answer
        "user",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "client_metadata",
    }
)


class Responses:
    """Fields it does not know are ignored and counted; those it cannot serve are refused.

    A reasoning item's ``encrypted_content`` names the turn. What is stored goes with the session.
    """

    name = "responses"
    routes = (Route(path="/v1/responses"),)
    statuses: Mapping[str, int] = {}
    credential_form = "Authorization: Bearer KEY"
    streamed_failures = frozenset({"context_length_exceeded"})

    @property
    def pages(self) -> Sequence[Page]:
        return (
            Page(method="POST", path="/v1/responses/input_tokens", answer=self._count),
            Page(method="GET", path="/v1/responses/{id}", answer=_show),
            Page(method="DELETE", path="/v1/responses/{id}", answer=_delete),
        )

    def credential(self, headers: Mapping[str, str]) -> str | None:
        return find_bearer(headers)

    def reply_id(self, request_id: str) -> str:
        return f"resp_{request_id.replace('-', '_')}"

    def parse(self, body: Mapping[str, Any], memory: ReplyMemory) -> ParsedRequest:
        _refuse_unserved(body)
        instructions = body.get("instructions")
        system = [] if not instructions else [Message.of_text("system", read_text(instructions, "instructions"))]
        history = (*_recall(body.get("previous_response_id"), memory), *read_items(body.get("input"), memory))
        if not history:
            raise refuse_field("input", body.get("input"), "a string or at least one item")
        offered = read_offered(body.get("tools"))
        tools = tuple(each.tool for each in offered)
        choice = _read_choice(body.get("tool_choice"), tools)
        text = read_mapping(body.get("text") or {}, "text")
        chat = ChatRequest(
            messages=(*system, *history),
            tools=tools,
            calls=choice.rule,
            allowed=choice.allowed,
            law=read_law(body),
            max_tokens=read_limit(body, "max_output_tokens"),
            seed=read_integer(body, "seed", least=-(2**63), most=2**63 - 1),
            schema=read_reply_format(text.get("format"), "text.format"),
        )
        verbosity = () if text.get("verbosity") is None else ("verbosity",)
        return ParsedRequest(
            chat=chat,
            stream=read_boolean(body, "stream"),
            keep=body.get("store") is None or read_boolean(body, "store"),
            history=history,
            body=body,
            ignored=(*list_ignored(body, _SERVED), *verbosity, *_list_hosted(body)),
        )

    def response(self, head: ReplyHead, request: ParsedRequest, reply: Reply) -> Mapping[str, Any]:
        status = "incomplete" if reply.finish == "length" else "completed"
        return _word_response(head, request, status, reply, None)

    def stream(self, head: ReplyHead, request: ParsedRequest) -> ResponsesStream:
        def word(status: str, reply: Reply | None, error: Mapping[str, Any] | None) -> Mapping[str, Any]:
            return _word_response(head, request, status, reply, error)

        return ResponsesStream(head.id, read_offered(request.body.get("tools")), word)

    def error(self, refusal: RefusedError) -> Mapping[str, Any]:
        return word_openai_error(refusal)

    async def _count(
        self, session: AskingSession, body: Mapping[str, Any], names: Mapping[str, str]
    ) -> Mapping[str, Any]:
        tokens = await session.count_tokens(self.parse(body, session.memory).chat)
        return {"object": "response.input_tokens", "input_tokens": tokens}


async def _show(session: AskingSession, body: Mapping[str, Any], names: Mapping[str, str]) -> Mapping[str, Any]:
    stored = session.memory.recall(names["id"])
    if stored is None:
        raise _refuse_unknown(names["id"])
    return stored.body


async def _delete(session: AskingSession, body: Mapping[str, Any], names: Mapping[str, str]) -> Mapping[str, Any]:
    if not session.memory.remove(names["id"]):
        raise _refuse_unknown(names["id"])
    return {"id": names["id"], "object": "response", "deleted": True}


def _refuse_unknown(reply_id: str) -> RefusedError:
    return RefusedError(404, f"Response with id '{reply_id}' not found.", code="response_not_found")


def _recall(reply_id: object, memory: ReplyMemory) -> tuple[Message, ...]:
    if reply_id is None:
        return ()
    stored = memory.recall(read_text(reply_id, "previous_response_id"))
    if stored is None:
        raise RefusedError(
            400,
            f"Previous response with id '{reply_id}' not found.",
            code="previous_response_not_found",
            param="previous_response_id",
        )
    return stored.messages


def _refuse_unserved(body: Mapping[str, Any]) -> None:
    if read_boolean(body, "background"):
        raise refuse_field("background", True, "false: a reply is answered to the request that asks for it")
    if body.get("conversation") is not None:
        raise refuse_field("conversation", body["conversation"], "null; send previous_response_id or the items")
    if body.get("model") is not None:
        read_text(body["model"], "model")


def _read_choice(choice: object, tools: Sequence[Tool]) -> CallChoice:
    if choice is None or isinstance(choice, str):
        return choose_calls(choice or "auto", None, tools, "tool_choice")
    fields = read_mapping(choice, "tool_choice")
    if fields.get("type") == "allowed_tools":
        items = read_array(fields.get("tools"), "tool_choice.tools")
        named = [item.get("name") if isinstance(item, dict) else None for item in items]
        return choose_calls(fields.get("mode"), named, tools, "tool_choice")
    return choose_calls("required", [fields.get("name")], tools, "tool_choice")


def _list_hosted(body: Mapping[str, Any]) -> tuple[str, ...]:
    """``tools`` if some of them are a vendor's own, which nobody runs here."""
    known = ("function", "custom", "namespace")
    return ("tools",) if any(tool.get("type") not in known for tool in body.get("tools") or ()) else ()


def _word_response(
    head: ReplyHead,
    request: ParsedRequest,
    status: str,
    reply: Reply | None,
    error: Mapping[str, Any] | None,
) -> dict[str, Any]:
    body = request.body
    offered: tuple[OfferedTool, ...] = () if reply is None else read_offered(body.get("tools"))
    cut = status == "incomplete"
    return {
        "id": head.id,
        "object": "response",
        "created_at": head.created,
        "status": status,
        "error": error,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "model": head.model,
        "output": [] if reply is None else word_items(reply.message, head.id, offered, cut=cut),
        "parallel_tool_calls": True,
        "previous_response_id": body.get("previous_response_id"),
        "reasoning": {"effort": None, "summary": None},
        "store": request.keep,
        "temperature": request.chat.law.temperature,
        "text": {"format": (body.get("text") or {}).get("format") or {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_p": request.chat.law.top_p,
        "truncation": "disabled",
        "usage": None if reply is None else _word_usage(reply.usage),
        "user": body.get("user"),
        "metadata": body.get("metadata") or {},
    }


def _word_usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }

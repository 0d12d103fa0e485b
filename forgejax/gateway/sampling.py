"""What the engine is asked for a request: what binds the reply, how long it may be, its law, its seed."""

from __future__ import annotations

import hashlib

from forgejax.chat.messages import ChatRequest
from forgejax.chat.reply_grammar import make_reply_grammar
from forgejax.chat.tool_calls import PlainTextFormat, ToolCallFormat
from forgejax.errors import GrammarError
from forgejax.gateway.history.conversation import Prompt
from forgejax.gateway.refusals import OverflowRefusedError, RefusedError, refuse_field
from forgejax.gateway.service import Service
from forgejax.types import Grammar, SampleRequest, SamplingLaw, SessionSpec


def choose_call_format(service: Service, chat: ChatRequest) -> ToolCallFormat:
    """How calls are read from the reply. Raises RefusedError for a request that asks for more than is served."""
    service.limits.check_request(chat)
    if not chat.tools or chat.calls == "none":
        return PlainTextFormat()
    if service.tool_format is None:
        raise RefusedError(
            400,
            "tools were sent, and the policy's chat template writes tool calls in no known format; set "
            "gateway.tool_format to the format the policy was trained on, or send no tools",
            code="tools_not_served",
            param="tools",
        )
    return service.tool_format


def open_call(chat: ChatRequest, tool_format: ToolCallFormat) -> str:
    """The beginning of a call that must be made: its name as well, where there is one tool to call."""
    names = [tool["function"]["name"] for tool in chat.callable_tools]
    return tool_format.open_call(names[0] if len(names) == 1 else None)


async def bind_reply(
    service: Service, chat: ChatRequest, tool_format: ToolCallFormat, prompt: Prompt
) -> Grammar | None:
    """What the reply is bound to, compiled. Raises RefusedError where the schema cannot be served."""
    grammar = make_reply_grammar(chat, service.chat_format.thoughts, tool_format, thinking=prompt.thinking)
    if grammar is None or chat.schema is None:
        return None
    try:
        await service.grammars.prepare(grammar)
    except GrammarError as error:
        field = chat.schema.field
        raise RefusedError(400, f"{field}: {error}", code="invalid_json_schema", param=field) from error
    return grammar


def make_sample_request(
    service: Service,
    spec: SessionSpec,
    chat: ChatRequest,
    prompt: Prompt,
    grammar: Grammar | None,
    *,
    session_id: str,
    number: int,
    live: bool,
) -> SampleRequest:
    """Request ``number`` of the session; of a ``live`` one the agent sees tokens while they are drawn.

    Raises OverflowRefusedError where its prompt leaves no room for a reply, RefusedError for a bias of no token.
    """
    room = service.context_length - len(prompt.ids)
    if room < 1:
        raise OverflowRefusedError(len(prompt.ids), service.context_length)
    asked = chat.max_tokens if chat.max_tokens is not None else service.config.max_tokens_default
    bounds = (room, asked, service.config.max_tokens_limit)
    return SampleRequest(
        request_id=f"{session_id}-{number}",
        session_id=session_id,
        prompt_ids=prompt.ids,
        max_tokens=min(bound for bound in bounds if bound is not None),
        law=_choose_law(service, spec, chat),
        stop_ids=service.chat_format.stop_ids,
        stop_strings=chat.stop,
        grammar=grammar,
        seed=_choose_seed(spec, chat, number),
        purpose=spec.purpose,
        owner=spec.owner,
        repeatable=not live,
    )


def derive_seed(seed: int, number: int) -> int:
    """The seed of a session's request ``number``: independent between requests, equal between equal runs."""
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF


def _choose_law(service: Service, spec: SessionSpec, chat: ChatRequest) -> SamplingLaw:
    if spec.law is not None:
        return spec.law
    size = service.chat_format.codec.vocab_size
    for id_, _ in chat.law.logit_bias:
        if id_ >= size:
            raise refuse_field("logit_bias", id_, f"ids of the policy's tokens, 0 to {size - 1}")
    return chat.law


def _choose_seed(spec: SessionSpec, chat: ChatRequest, number: int) -> int | None:
    if spec.seed is not None:
        return derive_seed(spec.seed, number)
    return None if chat.seed is None else chat.seed & 0x7FFFFFFF

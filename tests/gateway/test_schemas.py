"""Structured outputs from end to end: real clients, the gateway, an engine that draws under the masks."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import aiohttp
import numpy as np
import openai
import pytest
from flax import nnx
from pydantic import BaseModel, Field

from forgejax.chat import ChatFormat
from forgejax.gateway import Gateway, GatewayConfig
from forgejax.grammar import GrammarCompiler
from forgejax.models import Policy
from forgejax.rollout import EngineConfig, LocalSampler, PolicyEngine, RemoteSampler
from forgejax.rollout.server.http import RolloutServer
from forgejax.types import Sampler, SessionSpec
from tests.chat.families import save_family
from tests.chat.tokenizers import CALCULATOR
from tests.gateway.asking import USER, ask_messages, client
from tests.gateway.fakes import ScriptedSampler, started
from tests.rollout import tiny
from tests.rollout.serving import served, serving_engine

CONTEXT = 512


class Found(BaseModel):
    kind: Literal["sum", "product"]
    value: int | None = Field(ge=-99, le=99)


@asynccontextmanager
async def policy_behind(chat_format: ChatFormat, *, remote: bool = False) -> AsyncIterator[Gateway]:
    """A gateway in front of a small policy that knows nothing, in this process or behind the token server."""
    policy = replace(tiny.POLICY, vocab_size=chat_format.vocab_size)
    config = EngineConfig(slots=1, max_context=CONTEXT, tokens_per_step=2, prefill_buckets=(32,), page_tokens=4)
    grammars = GrammarCompiler(chat_format.codec.spell_vocabulary())
    weights = nnx.split(Policy(policy, nnx.Rngs(0)))[1]
    engine = PolicyEngine(policy, config, tiny.LAYOUT)
    async with serving_engine(weights, grammars=grammars, engine=engine) as serving:
        if not remote:
            async with _serving(LocalSampler(serving.driver), chat_format, grammars) as gateway:
                yield gateway
            return
        async with (
            served(RolloutServer(serving).make_app()) as url,
            RemoteSampler(url) as sampler,
            _serving(sampler, chat_format, None) as gateway,
        ):
            yield gateway


@asynccontextmanager
async def _serving(
    sampler: Sampler, chat_format: ChatFormat, grammars: GrammarCompiler | None
) -> AsyncIterator[Gateway]:
    gateway = Gateway(sampler, chat_format, CONTEXT, GatewayConfig(port=0), grammars=grammars)
    await gateway.start()
    try:
        yield gateway
    finally:
        await gateway.stop()


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
async def test_the_official_client_parses_what_a_policy_draws_that_knows_nothing(
    chat_format: ChatFormat, remote: bool
) -> None:
    async with policy_behind(chat_format, remote=remote) as gateway:
        session = gateway.open(SessionSpec(seed=3))
        async with client(session) as agent:
            chats = [
                await agent.chat.completions.parse(model="m", messages=[USER], response_format=Found) for _ in range(3)
            ]
            response = await agent.responses.parse(model="m", input="?", text_format=Found)
            plain = await agent.chat.completions.create(model="m", messages=[USER], max_tokens=5)
            async with agent.chat.completions.stream(model="m", messages=[USER], response_format=Found) as stream:
                streamed = await stream.get_final_completion()
        status, message = await ask_messages(
            session,
            messages=[USER],
            max_tokens=400,
            output_config={"format": {"type": "json_schema", "schema": Found.model_json_schema()}},
        )
        turns = await gateway.close(session.id)
        bound = gateway.metrics.counts()["grammar_turns"]
    found = [chat.choices[0].message.parsed for chat in chats]
    assert all(isinstance(each, Found) for each in found) and len({str(each) for each in found}) > 1
    assert isinstance(response.output_parsed, Found) and isinstance(streamed.choices[0].message.parsed, Found)
    assert (
        json.loads(json.dumps(response.text and response.text.model_dump(by_alias=True)))["format"]["name"] == "Found"
    )
    assert (status, message["stop_reason"]) == (200, "end_turn")
    assert isinstance(Found.model_validate_json(message["content"][0]["text"]), Found)
    assert plain.choices[0].finish_reason == "length"
    assert [turn.untrainable for turn in turns] == ["grammar"] * 4 + [None] + ["grammar"] * 2 and bound == 6
    assert all(np.isfinite(turn.completion.logprobs).all() for turn in turns)


async def test_a_schema_that_cannot_be_served_is_refused_in_each_dialects_shape(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format))
    session = gateway.open(SessionSpec())
    bad = {"type": "array", "uniqueItems": True}
    said = 'Unimplemented keys: ["uniqueItems"]'
    async with client(session) as agent:
        asked: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": bad}}
        with pytest.raises(openai.BadRequestError) as chat:
            await agent.chat.completions.create(model="m", messages=[USER], response_format=asked)
        text: Any = {"format": {"type": "json_schema", "name": "n", "schema": bad}}
        with pytest.raises(openai.BadRequestError) as response:
            await agent.responses.create(model="m", input="?", text=text)
    status, message = await ask_messages(session, messages=[USER], output_format={"type": "json_schema", "schema": bad})
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert said in chat.value.message and chat.value.param == "response_format.json_schema.schema"
    assert said in response.value.message and response.value.param == "text.format.schema"
    assert chat.value.code == response.value.code == "invalid_json_schema"
    assert (status, message["type"], message["error"]["type"]) == (400, "error", "invalid_request_error")
    assert message["error"]["message"].startswith(f"output_format.schema: the schema cannot be served: {said}")
    assert turns == ()


async def test_a_schema_too_deep_for_anyone_is_a_400(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format))
    session = gateway.open(SessionSpec())
    for depth in (150, 900, 50_000):
        schema = '{"items":' * depth + "{}" + "}" * depth
        body = f'{{"messages": [{{"role": "user", "content": "?"}}], "guided_json": {schema}}}'
        async with (
            aiohttp.ClientSession() as http,
            http.post(
                f"{session.base_url}/chat/completions",
                data=body,
                headers={"Authorization": f"Bearer {session.api_key}"},
            ) as answer,
        ):
            assert answer.status == 400 and re.search("nested|recursion", await answer.text())
    await gateway.stop()


@pytest.mark.parametrize(
    ("family", "opening", "closing"),
    [("qwen2.5", "", ""), ("qwen3", "<think>", "</think>"), ("minimax-m2", "", "</think>")],
)
async def test_the_grammar_follows_the_template_the_tools_and_the_retry(
    tmp_path: Path, family: str, opening: str, closing: str
) -> None:
    chat_format = ChatFormat.load(save_family(tmp_path, family))
    end = next(iter(chat_format.codec.encode(chat_format.codec.decode_token(chat_format.end_of_turn_id))))
    sampler = ScriptedSampler(chat_format, *[[*chat_format.codec.encode("{}"), end]] * 4)
    gateway = await started(sampler)
    session = gateway.open(SessionSpec())
    json_object: Any = {"type": "json_object"}
    async with client(session) as agent:
        for fields in ({}, {"tools": [CALCULATOR]}, {"tools": [CALCULATOR], "tool_choice": "required"}):
            await agent.chat.completions.create(model="m", messages=[USER], response_format=json_object, **fields)
        same: Any = {"extra_headers": {"x-stainless-retry-count": "1"}}
        await agent.chat.completions.create(model="m", messages=[USER], response_format=json_object, **same)
        await agent.chat.completions.create(model="m", messages=[USER], **same)
    turns = await gateway.close(session.id)
    await gateway.stop()
    grammars = [request.grammar for request in sampler.requests]
    assert len(grammars) == 4 and grammars[0] is not None and grammars[1] is not None
    assert grammars[2:] == [None, None]  # a call must be made; the last asked for the same without a schema
    for grammar, free in zip(grammars[:2], (0, 1), strict=True):
        assert grammar is not None and grammar.schema == '{"type":"object"}'
        assert (grammar.thought_opening, grammar.thought_closing) == (opening, closing)
        assert len(grammar.free_openings) == free
    assert [turn.untrainable for turn in turns] == ["grammar", "grammar", None, None]

"""Requests on their way: cancelled, closed, streamed from another thread; every token drawn is in exactly one turn."""

from __future__ import annotations

import asyncio
import time

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI

from forgejax.chat import ChatFormat
from forgejax.types import Completion, FinishReason, OnTokens, SampleRequest
from tests.gateway.asking import BODY, LONG, status_of, until
from tests.gateway.fakes import TRAINING, ScriptedSampler, completion, started


@pytest.mark.parametrize("stream", [False, True])
async def test_an_agent_that_goes_away_leaves_its_tokens_in_a_cancelled_turn(
    chat_format: ChatFormat, stream: bool
) -> None:
    sampler = ScriptedSampler(chat_format, LONG, delay_s=0.01)
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    async with AsyncOpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0, timeout=0.2) as agent:
        if stream:
            reply = await agent.chat.completions.create(stream=True, **BODY)
            await anext(aiter(reply))
            await reply.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                await agent.chat.completions.create(**BODY)
    await until(lambda: sampler.returned)
    (turn,) = await gateway.close(session.id)
    await gateway.stop()
    assert turn.untrainable == "cancelled" and [turn.completion] == sampler.returned
    assert 0 < len(turn.completion.token_ids) < len(sampler.script[0])
    assert "forgejax_gateway_cancelled_total 1.0" in gateway.metrics.text().decode()


@pytest.mark.parametrize("stream", [False, True])
async def test_closing_ends_the_open_requests_and_keeps_what_they_drew(chat_format: ChatFormat, stream: bool) -> None:
    sampler = ScriptedSampler(chat_format, LONG, LONG, delay_s=0.01)
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    headers = {"Authorization": f"Bearer {session.api_key}"}

    async def ask() -> tuple[int, str]:
        url = f"{session.base_url}/chat/completions"
        async with (
            aiohttp.ClientSession() as http,
            http.post(url, json={**BODY, "stream": stream}, headers=headers) as response,
        ):
            return response.status, await response.text()

    waiting = [asyncio.create_task(ask()) for _ in range(2)]
    await until(lambda: len(sampler.requests) == 2)
    await asyncio.sleep(0.1)
    began = time.monotonic()
    turns = await gateway.close(session.id)
    assert time.monotonic() - began < 1.0
    answers = await asyncio.gather(*waiting)
    await gateway.stop()
    assert [turn.untrainable for turn in turns] == ["cancelled", "cancelled"]
    assert sorted(len(t.completion.token_ids) for t in turns) == sorted(len(c.token_ids) for c in sampler.returned)
    assert all(status == (200 if stream else 410) and "session_closed" in text for status, text in answers)


class DeafSampler(ScriptedSampler):
    """Takes a request and never answers; says whether it was cancelled."""

    cancelled = False

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        self.requests.append(request)
        try:
            assert on_tokens is not None
            if self.script:
                on_tokens(self.script[0][:1])
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        raise AssertionError


@pytest.mark.parametrize("drawn", [False, True])
async def test_a_request_the_engine_will_not_end_is_cancelled(chat_format: ChatFormat, drawn: bool) -> None:
    sampler = DeafSampler(chat_format, *["ab"] * drawn)
    gateway = await started(sampler, cancel_grace_s=0.1)
    session = gateway.open(TRAINING)
    waiting = asyncio.create_task(status_of(session, session.api_key))
    await until(lambda: sampler.requests)
    assert await gateway.close(session.id) == () and sampler.cancelled
    assert await waiting == (410, "session_closed")
    await gateway.stop()


class ThreadedSampler(ScriptedSampler):
    """Draws on a thread of its own, as an engine does, and calls back from there."""

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        self.requests.append(request)

        def draw() -> list[int]:
            drawn: list[int] = []
            for id_ in self.script[0]:
                time.sleep(0.001)
                drawn.append(id_)
                if on_tokens is not None and on_tokens([id_]):
                    break
            return drawn

        return completion(request, await asyncio.to_thread(draw), FinishReason.STOP)


async def test_an_engine_may_call_back_from_its_own_thread(chat_format: ChatFormat) -> None:
    gateway = await started(ThreadedSampler(chat_format, "one two END three<|im_end|>"))
    session = gateway.open(TRAINING)
    async with AsyncOpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0) as agent:
        stream = await agent.chat.completions.create(stream=True, stop="END", **BODY)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    await gateway.stop()
    assert "".join(pieces) == "one two " and len(pieces) > 4

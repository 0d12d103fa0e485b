"""Sessions: keys, closing, cancellation; every token the engine returned is in exactly one turn."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import socket
import time
import weakref
from collections.abc import Callable
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI

from forgejax.chat import ChatFormat
from forgejax.errors import ConfigError, GatewayError
from forgejax.gateway import Gateway, GatewayConfig
from forgejax.gateway.sessions import derive_seed
from forgejax.types import Completion, FinishReason, OnTokens, SampleRequest, Session, Sessions, SessionSpec
from tests.gateway.fakes import TRAINING, ScriptedSampler, completion, started

BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
LONG = "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 4


async def status_of(session: Session, key: str | None) -> tuple[int, str]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    url = f"{session.base_url}/chat/completions"
    async with aiohttp.ClientSession() as http, http.post(url, json=BODY, headers=headers) as response:
        body = await response.json()
        return response.status, body.get("error", {}).get("code")


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 (what is watched is the engine's own record)
            await asyncio.sleep(0.005)


async def test_only_a_sessions_key_opens_the_door(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format, "5<|im_end|>"))
    session = gateway.open(TRAINING)
    assert await status_of(session, None) == (401, "invalid_api_key")
    assert await status_of(session, "sk-other") == (401, "invalid_api_key")
    assert (await status_of(session, session.api_key))[0] == 200
    await gateway.stop()


async def test_keys_are_long_and_never_repeat(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format))
    door: Sessions = gateway
    sessions = [door.open(TRAINING) for _ in range(20)]
    assert len({s.api_key for s in sessions}) == len({s.id for s in sessions}) == 20
    assert min(len(s.api_key) for s in sessions) >= 36
    await gateway.stop()


async def test_anonymous_requests_are_served_only_where_allowed_and_never_recorded(chat_format: ChatFormat) -> None:
    sampler = ScriptedSampler(chat_format, "5<|im_end|>")
    gateway = await started(sampler, allow_anonymous=True)
    session = gateway.open(TRAINING)
    assert (await status_of(session, None))[0] == 200
    assert sampler.requests[0].purpose == "evaluation"
    assert await gateway.close(session.id) == ()
    await gateway.stop()


async def test_a_closed_session_answers_410_and_closes_again_with_the_same_turns(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format, "5<|im_end|>"))
    session = gateway.open(TRAINING)
    await status_of(session, session.api_key)
    turns = await gateway.close(session.id)
    assert len(turns) == 1 and await gateway.close(session.id) is turns
    assert await status_of(session, session.api_key) == (410, "session_closed")
    with pytest.raises(GatewayError, match="no session nobody"):
        await gateway.close("nobody")
    await gateway.stop()


async def test_what_is_kept_of_closed_sessions_is_bounded_and_late_requests_are_still_told(
    chat_format: ChatFormat,
) -> None:
    gateway = await started(ScriptedSampler(chat_format, "5<|im_end|>"))
    first = gateway.open(TRAINING)
    await status_of(first, first.api_key)
    turns = [weakref.ref(turn) for turn in await gateway.close(first.id)]
    for _ in range(64):
        await gateway.close(gateway.open(TRAINING).id)
    gc.collect()
    assert [turn() for turn in turns] == [None]
    with pytest.raises(GatewayError, match="closed long ago"):
        await gateway.close(first.id)
    assert await status_of(first, first.api_key) == (410, "session_closed")
    await gateway.stop()


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


async def test_an_agent_that_no_longer_reads_its_stream_is_let_go(chat_format: ChatFormat) -> None:
    sampler = ScriptedSampler(chat_format, list(chat_format.codec.encode("x")) * 30_000)
    gateway = await started(sampler, context_length=40_000, body_timeout_s=0.1)
    session = gateway.open(TRAINING)
    host, port = gateway.url.removeprefix("http://").split(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
    body = json.dumps({**BODY, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {session.api_key}\r\n"
    sock.send(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await until(lambda: "request_seconds_count 1.0" in gateway.metrics.text().decode())
    sock.close()
    (turn,) = await gateway.close(session.id)
    await gateway.stop()
    assert [turn.completion] == sampler.returned and turn.untrainable == "cancelled"


class RacingSampler(ScriptedSampler):
    """Answers each request after the time its own message asks for."""

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        number = int(request.request_id.rsplit("-", 1)[1])
        await asyncio.sleep(0.15 - 0.05 * number)
        return await super().sample(request, on_tokens)


async def test_turns_are_in_order_of_arrival_whatever_the_order_of_answers(chat_format: ChatFormat) -> None:
    sampler = RacingSampler(chat_format, "a<|im_end|>", "b<|im_end|>", "c<|im_end|>")
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    waiting = []
    for _ in range(3):
        waiting.append(asyncio.create_task(status_of(session, session.api_key)))
        await asyncio.sleep(0.02)
    await asyncio.gather(*waiting)
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert [turn.index for turn in turns] == [0, 1, 2]
    assert [turn.requested_at for turn in turns] == sorted(turn.requested_at for turn in turns)
    assert [chat_format.decode(turn.completion.token_ids) for turn in turns] == ["c", "b", "a"]


async def test_a_failed_request_leaves_no_gap_in_the_turns(chat_format: ChatFormat) -> None:
    sampler = ScriptedSampler(chat_format, [], "b<|im_end|>", "c<|im_end|>")  # the first draws nothing
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    headers = {"Authorization": f"Bearer {session.api_key}"}
    history = [{"role": "user", "content": "?"}]
    async with aiohttp.ClientSession(headers=headers) as http:
        for _ in range(3):
            async with http.post(f"{session.base_url}/chat/completions", json={"messages": history}) as response:
                message = (await response.json())["choices"][0]["message"]
            if message["content"]:
                history += [message, {"role": "user", "content": "more"}]
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert [(turn.index, turn.parent) for turn in turns] == [(0, None), (1, 0)]


def test_seeds_are_reproducible_and_differ_between_requests_and_sessions() -> None:
    seeds = [derive_seed(seed, number) for seed in range(30) for number in range(30)]
    assert len(set(seeds)) == 900 and derive_seed(3, 4) == seeds[94] and max(seeds) < 2**31


async def test_stopping_closes_every_session_and_opening_needs_a_running_gateway(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format, "5<|im_end|>"))
    session = gateway.open(TRAINING)
    await status_of(session, session.api_key)
    await gateway.stop()
    await gateway.stop()
    assert len(await gateway.close(session.id)) == 1
    with pytest.raises(GatewayError, match="not running"):
        gateway.open(SessionSpec())


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"tool_format": "xml"},
        {"max_tokens_default": 0},
        {"max_tokens_limit": 0},
        {"cancel_grace_s": 0},
        {"host": ""},
        {"body_timeout_s": math.nan},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"gateway.{next(iter(wrong))}"):
        GatewayConfig(**wrong)


async def test_a_host_that_is_not_ours_is_refused(chat_format: ChatFormat) -> None:
    gateway = Gateway(ScriptedSampler(chat_format), chat_format, 64, GatewayConfig())
    with pytest.raises(GatewayError, match=r"cannot listen on 192\.0\.2\.1"):
        await gateway.start("192.0.2.1", 0)


def test_the_gateway_never_imports_jax() -> None:
    import subprocess  # noqa: PLC0415
    import sys  # noqa: PLC0415

    code = "import forgejax.gateway, sys, json; print(json.dumps([m for m in ('jax', 'torch') if m in sys.modules]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(out.stdout) == []

"""The generic handler: bodies that cannot be read, engines that fail, and the pages beside the chat."""

from __future__ import annotations

import asyncio
import json
import socket

import aiohttp
import openai
import pytest

from forgejax.chat import ChatFormat
from forgejax.errors import EngineError, GatewayError
from forgejax.gateway.dialects import DIALECTS
from forgejax.gateway.limits import LimitsConfig
from forgejax.types import Completion, OnTokens, SampleRequest
from tests.gateway.asking import BODY, GOOD, USER, client, post, until
from tests.gateway.fakes import TRAINING, ScriptedSampler, started


async def test_dialects_that_share_a_route_and_none_at_all_are_refused_before_anything_listens(
    chat_format: ChatFormat,
) -> None:
    sampler = ScriptedSampler(chat_format)
    with pytest.raises(GatewayError, match=r"is a route of the dialects chat_completions and chat_completions; give"):
        await started(sampler, dialects=(*DIALECTS, DIALECTS[0]))
    with pytest.raises(GatewayError, match="no dialect; give one at least"):
        await started(sampler, dialects=())


async def test_a_body_over_the_limit_is_a_413(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format), limits=LimitsConfig(body_bytes=1000))
    status, error = await post(gateway.open(TRAINING), b" " * 2000)
    await gateway.stop()
    assert (status, error["code"]) == (413, "body_too_large")


async def test_a_body_that_is_not_packed_as_it_says_is_a_400(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format))
    status, error = await post(gateway.open(TRAINING), b"plain", {"Content-Encoding": "gzip"})
    await gateway.stop()
    assert (status, error["code"]) == (400, "invalid_body")


class FailingSampler(ScriptedSampler):
    """Draws one token, then dies."""

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        await asyncio.sleep(0)
        if on_tokens is not None and self.script:
            on_tokens(self.script[0][:1])
            await asyncio.sleep(0.01)
        raise EngineError("out of memory")


async def test_an_engine_that_fails_is_a_503(chat_format: ChatFormat) -> None:
    gateway = await started(FailingSampler(chat_format))
    session = gateway.open(TRAINING)
    async with client(session) as agent:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="out of memory") as refused:
                await agent.chat.completions.create(model="m", messages=[USER], stream=stream)
            assert refused.value.status_code == 503
    assert await gateway.close(session.id) == ()
    await gateway.stop()


async def test_an_engine_that_fails_within_a_stream_ends_it_with_an_error(chat_format: ChatFormat) -> None:
    gateway = await started(FailingSampler(chat_format, "abc"))
    async with client(gateway.open(TRAINING)) as agent:
        stream = await agent.chat.completions.create(model="m", messages=[USER], stream=True)
        with pytest.raises(openai.APIError, match="out of memory"):
            _ = [chunk async for chunk in stream]
    await gateway.stop()


async def test_an_engine_that_takes_too_long_is_a_504(chat_format: ChatFormat) -> None:
    sampler = ScriptedSampler(chat_format, "slow answer<|im_end|>", delay_s=0.1)
    gateway = await started(sampler, request_timeout_s=0.15)
    session = gateway.open(TRAINING)
    status, error = await post(session, json.dumps(GOOD).encode())
    (turn,) = await gateway.close(session.id)
    await gateway.stop()
    assert (status, error["code"]) == (504, "timeout")
    assert turn.untrainable == "cancelled" and [turn.completion] == sampler.returned


async def test_the_pages_beside_the_chat(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format, "5<|im_end|>"), model_name="tiny")
    session = gateway.open(TRAINING)
    async with client(session) as agent:
        assert [model.id async for model in agent.models.list()] == ["tiny"]
        await agent.chat.completions.create(model="m", messages=[USER])
    async with aiohttp.ClientSession() as http:
        assert (await http.head(gateway.url + "/")).status == 200
        assert await (await http.get(gateway.url + "/health")).json() == {"status": "ok"}
        missing = await http.get(gateway.url + "/v1/nothing")
        assert (missing.status, (await missing.json())["error"]["code"]) == (404, "not_served")
        page = await (await http.get(gateway.url + "/metrics")).text()
    await gateway.stop()
    assert 'forgejax_gateway_requests_total{dialect="chat_completions",status="200"} 1.0' in page
    assert "forgejax_gateway_completion_tokens_total 2.0" in page


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

"""No session reads or goes on from another's, and no key is written down."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Any

import aiohttp
import pytest

from forgejax.chat import ChatFormat
from forgejax.errors import ConfigError
from forgejax.gateway import GatewayConfig
from forgejax.gateway.keys import make_key
from tests.gateway.asking import GOOD, USER, status_of
from tests.gateway.fakes import TRAINING, ScriptedSampler, started
from tests.gateway.http.test_doors import BuggySampler

THOUGHTFUL = "<think>\nhm\n</think>\n\n5<|im_end|>"


async def ask(http: aiohttp.ClientSession, url: str, key: str, body: Any = None, method: str = "POST") -> Any:
    async with http.request(method, url, json=body, headers={"x-api-key": key}) as response:
        return response.status, await response.json()


async def test_ids_of_another_session_are_as_unknown_as_random_ones(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format, *["5<|im_end|>"] * 3))
    mine, theirs = gateway.open(TRAINING).api_key, gateway.open(TRAINING).api_key
    url = f"{gateway.url}/v1/responses"
    async with aiohttp.ClientSession() as http:
        _, first = await ask(http, url, mine, {"input": "the secret"})
        item = first["output"][0]["id"]
        for id_ in (first["id"], f"resp_{secrets.token_hex(8)}_0"):
            refused = f"Response with id '{id_}' not found."
            status, body = await ask(http, f"{url}/{id_}", theirs, method="GET")
            assert (status, body["error"]["message"]) == (404, refused)
            assert (await ask(http, f"{url}/{id_}", theirs, method="DELETE"))[0] == 404
            status, body = await ask(http, url, theirs, {"input": "?", "previous_response_id": id_})
            assert (status, body["error"]["code"]) == (400, "previous_response_not_found")
        assert (await ask(http, url, theirs, {"input": [{"type": "item_reference", "id": item}]}))[0] == 404
        assert (await ask(http, f"{url}/{first['id']}", mine, method="GET"))[1] == first
    await gateway.stop()


async def test_a_signature_or_a_calls_id_of_another_session_names_nothing(chat_format: ChatFormat) -> None:
    sampler = ScriptedSampler(chat_format, *[THOUGHTFUL] * 2, "6<|im_end|>", "7<|im_end|>")
    gateway = await started(sampler)
    mine, theirs = gateway.open(TRAINING), gateway.open(TRAINING)
    url = f"{gateway.url}/v1/messages"
    async with aiohttp.ClientSession() as http:
        _, said = await ask(http, url, mine.api_key, GOOD)
        thought = said["content"][0]
        assert thought["type"] == "thinking" and thought["signature"]
        # The signature alone would bring the whole thought back in its own session.
        echo = [{**thought, "thinking": ""}, {"type": "text", "text": "5"}]
        history = {"messages": [USER, {"role": "assistant", "content": echo}, USER]}
        await ask(http, url, theirs.api_key, GOOD)
        await ask(http, url, theirs.api_key, {"messages": [USER, {"role": "assistant", "content": echo[:1]}, USER]})
        await ask(http, url, mine.api_key, history)
    foreign, own = (sampler.chat_format.decode(request.prompt_ids.tolist()) for request in sampler.requests[2:])
    their_turns, my_turns = await gateway.close(theirs.id), await gateway.close(mine.id)
    await gateway.stop()
    assert "hm" in own and "hm" not in foreign
    assert [turn.parent for turn in my_turns] == [None, 0]
    assert [turn.parent for turn in their_turns] == [None, None]


async def test_an_address_may_hold_the_key(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format, *["5<|im_end|>"] * 4))
    session = gateway.open(TRAINING)
    base = f"{gateway.url}/key/{session.api_key}"
    async with aiohttp.ClientSession(headers={"Authorization": "Bearer sk-whatever"}) as http:
        for path in ("/v1/chat/completions", "/chat/completions", "/v1/messages", "/v1/v1/messages"):
            async with http.post(base + path, json=GOOD) as response:
                assert response.status == 200, path
        async with http.post(f"{gateway.url}/key/fjx-{secrets.token_urlsafe(24)}/v1/messages", json=GOOD) as response:
            assert response.status == 401
            assert (await response.json())["error"]["type"] == "authentication_error"
        async with http.get(f"{base}/v1/models") as response:
            assert response.status == 200
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert len(turns) == 4


async def test_no_key_is_written_to_any_log(chat_format: ChatFormat, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    gateway = await started(BuggySampler(chat_format), body_timeout_s=0.2)
    session = gateway.open(TRAINING)
    key = session.api_key
    host, port = gateway.url.removeprefix("http://").split(":")
    async with aiohttp.ClientSession() as http:
        for path in (f"/key/{key}/v1/messages", f"/key/{key}/v1/nothing", f"/{key}", "/v1/responses"):
            for body in (GOOD, {**GOOD, "stream": True}, {"input": key}):
                async with http.post(gateway.url + path, json=body, headers={"x-api-key": key}) as response:
                    await response.read()
    for sent in (
        f"POST /key/{key}/v1/messages HTTP/9.9\r\n\r\n",
        f"GET / HTTP/1.1\r\nHost: x\r\nAuthorization : Bearer {key}\r\n\r\n",
        f"{key} nonsense\r\n\r\n",
        f"POST /v1/messages HTTP/1.1\r\nHost: x\r\nx-api-key: {key}\r\nContent-Length: 50\r\n\r\n{{",
    ):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(sent.encode())
        async with asyncio.timeout(5):
            assert await reader.read(12)
        writer.close()
    written = caplog.text
    await gateway.close(session.id)
    await gateway.stop()
    assert "a bug" in written and "/key/fjx-.../v1/messages failed" in written
    assert key not in caplog.text and key not in repr(session)


async def test_whoever_is_not_on_this_machine_needs_a_key(chat_format: ChatFormat) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "gateway.example"):
        with pytest.raises(ConfigError, match="allow_anonymous"):
            GatewayConfig(host=host, allow_anonymous=True)
        assert GatewayConfig(host=host).host == host
    for host in ("127.0.0.1", "::1", "localhost", "127.3.2.1"):
        assert GatewayConfig(host=host, allow_anonymous=True).host == host
    gateway = await started(ScriptedSampler(chat_format), allow_anonymous=True)
    await gateway.stop()
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0"):
        await gateway.start("0.0.0.0", 0)


async def test_random_keys_open_nothing(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format))
    session = gateway.open(TRAINING)
    for key in (
        make_key(),
        session.id,
        session.api_key[:-1],
        session.api_key + "A",
        session.api_key.swapcase(),
        "fjx-",
    ):
        assert await status_of(session, key) == (401, "invalid_api_key")
    assert await gateway.close(session.id) == ()
    await gateway.stop()

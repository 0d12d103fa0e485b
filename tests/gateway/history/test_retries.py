"""The same request again: the recorded answer, never a second turn; an answer nobody read is not trained."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from forgejax.chat import ChatFormat
from forgejax.gateway.history.retries import RetryHints
from forgejax.gateway.records.reader import read_session
from forgejax.gateway.records.replay import replay_session
from forgejax.types import Session
from tests.gateway.asking import GOOD, until
from tests.gateway.fakes import TRAINING, ScriptedSampler, started


async def ask(session: Session, headers: dict[str, str] | None = None, **more: Any) -> tuple[str, str]:
    """The id of the answer and what it says."""
    sent = {"Authorization": f"Bearer {session.api_key}", **(headers or {})}
    url = f"{session.base_url}/chat/completions"
    async with aiohttp.ClientSession(headers=sent) as http, http.post(url, json={**GOOD, **more}) as response:
        if not more.get("stream"):
            body = await response.json()
            return body["id"], body["choices"][0]["message"]["content"]
        lines = (await response.text()).split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    return chunks[0]["id"], "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("again", [{"x-stainless-retry-count": "1"}, {"Idempotency-Key": "k"}])
async def test_a_retry_gets_the_recorded_answer_streamed_if_it_asks_for_that(
    chat_format: ChatFormat, again: dict[str, str], stream: bool
) -> None:
    sampler = ScriptedSampler(chat_format, "first<|im_end|>", "second<|im_end|>")
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    first = await ask(session, {"Idempotency-Key": "k", "x-stainless-retry-count": "0"})
    retried = [await ask(session, again, stream=stream) for _ in range(2)]
    counts = gateway.metrics.counts()
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert first[1] == "first" and retried == [first, first]
    assert len(turns) == len(sampler.requests) == 1 and counts["retries"] == 2


@pytest.mark.parametrize(
    ("headers", "more"),
    [
        ({}, {}),
        ({"x-stainless-retry-count": "0"}, {}),
        ({"Idempotency-Key": "other"}, {}),
        ({"x-stainless-retry-count": "1"}, {"max_tokens": 9}),
        ({"x-stainless-retry-count": "1"}, {"messages": [{"role": "user", "content": "?"}]}),
        ({"x-stainless-retry-count": "²"}, {}),
    ],
)
async def test_another_request_and_the_same_asked_anew_get_answers_of_their_own(
    chat_format: ChatFormat, headers: dict[str, str], more: dict[str, Any]
) -> None:
    sampler = ScriptedSampler(chat_format, "first<|im_end|>", "second<|im_end|>")
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {session.api_key}"}) as http:
        url, said = f"{session.base_url}/chat/completions", []
        for sent, body in (({"Idempotency-Key": "k"}, GOOD), (headers, {**GOOD, **more})):
            ascii_only = {name: value for name, value in sent.items() if value.isascii()}
            async with http.post(url, json=body, headers=ascii_only) as response:
                said.append((await response.json())["choices"][0]["message"]["content"])
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert said == ["first", "second"] and [turn.untrainable for turn in turns] == [None, None]


def test_a_count_that_is_no_number_is_none() -> None:
    assert RetryHints.read({"x-stainless-retry-count": "²", "idempotency-key": ""}) == RetryHints()
    assert RetryHints.read({"x-stainless-retry-count": "3"}).count == 3


async def leave(session: Session, stream: bool, reset: bool) -> None:
    """Asks, waits until the answer is there, and goes away without reading it (or, without ``reset``, having read)."""
    host, port = session.base_url.removeprefix("http://").removesuffix("/v1").split(":")
    sock = socket.socket()
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, (host, int(port)))
    body = json.dumps({**GOOD, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {session.api_key}\r\n"
    await loop.sock_sendall(sock, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await asyncio.sleep(0.2)
    if not reset:
        await loop.sock_recv(sock, 1 << 20)
    sock.close()


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_was_reset_unread_is_given_again_to_whoever_asks_the_same(
    chat_format: ChatFormat, stream: bool
) -> None:
    gateway = await started(ScriptedSampler(chat_format, "first<|im_end|>", "second<|im_end|>"))
    session = gateway.open(TRAINING)
    await leave(session, stream, reset=True)
    await until(lambda: gateway.metrics.counts()["undelivered"])
    again = await ask(session)
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert again[1] == "first" and [turn.untrainable for turn in turns] == [None]


@pytest.mark.parametrize("reset", [False, True])
async def test_an_answer_nobody_read_is_recorded_and_not_trained(chat_format: ChatFormat, reset: bool) -> None:
    sampler = ScriptedSampler(chat_format, "first<|im_end|>", "second<|im_end|>")
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    await leave(session, stream=False, reset=reset)
    if reset:
        await until(lambda: gateway.metrics.counts()["undelivered"])
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert [turn.untrainable for turn in turns] == ["undelivered" if reset else None]
    assert [turn.completion for turn in turns] == sampler.returned


async def test_the_same_asked_again_after_the_connection_was_closed_leaves_the_first_untrained(
    chat_format: ChatFormat,
) -> None:
    gateway = await started(ScriptedSampler(chat_format, "first<|im_end|>", "second<|im_end|>", "third<|im_end|>"))
    session = gateway.open(TRAINING)
    await leave(session, stream=False, reset=False)
    second = await ask(session)
    said = {"role": "assistant", "content": second[1]}
    await ask(session, messages=[*GOOD["messages"], said, {"role": "user", "content": "go"}])
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert second[1] == "second"
    assert [(turn.parent, turn.untrainable) for turn in turns] == [(None, "undelivered"), (None, None), (1, None)]


async def test_a_key_whose_bytes_are_no_text_is_a_key_and_is_recorded(chat_format: ChatFormat, tmp_path: Path) -> None:
    gateway = await started(ScriptedSampler(chat_format, "1<|im_end|>", "2<|im_end|>"), record=str(tmp_path))
    session = gateway.open(TRAINING)
    said: list[str] = []
    body = json.dumps(GOOD).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {session.api_key}\r\n"
    for key in (b"k\x80", b"k\x80", b"k\x81"):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.url.rpartition(":")[2]))
        writer.write(head.encode() + b"Connection: close\r\nIdempotency-Key: " + key)
        writer.write(f"\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        answer = json.loads((await reader.read()).partition(b"\r\n\r\n")[2])
        said.append(answer["choices"][0]["message"]["content"])
        writer.close()
    await gateway.close(session.id)
    await gateway.stop()
    replayed = await replay_session(read_session(tmp_path / f"{session.id}.jsonl"), chat_format)
    assert said == ["1", "1", "2"]
    assert (len(replayed.turns), replayed.differences) == (2, ())

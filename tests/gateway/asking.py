"""How the gateway's tests ask it: as the OpenAI client does, and with bare bytes."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import numpy as np
from openai import AsyncOpenAI

from forgejax.types import Session, Turn
from tests.gateway.fakes import ScriptedSampler

USER: Any = {"role": "user", "content": "What is 2+3?"}
CALL_TEXT = 'Let me see.\n<tool_call>\n{"name": "calculator", "arguments": {"expression": "2+3"}}</tool_call><|im_end|>'
GOOD: dict[str, Any] = {"model": "m", "messages": [USER]}


def client(session: Session) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0, timeout=20)


async def post(session: Session, raw: bytes, more: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    headers = {"Authorization": f"Bearer {session.api_key}", **(more or {})}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{session.base_url}/chat/completions", data=raw, headers=headers) as response,
    ):
        return response.status, (await response.json())["error"]


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


def assert_chain(turns: tuple[Turn, ...], sampler: ScriptedSampler) -> None:
    """Each turn goes on from the one before, and the turns are what was drawn."""
    assert [turn.parent for turn in turns] == [None, *range(len(turns) - 1)]
    assert [turn.completion for turn in turns] == sampler.returned
    for before, turn in itertools.pairwise(turns):
        known = np.concatenate([before.completion.prompt_ids, before.completion.token_ids])
        assert turn.completion.prompt_ids[: len(known)].tolist() == known.tolist()


_FIELDS = {"text": "text", "thinking": "thinking", "input_json": "partial_json", "signature": "signature"}


async def ask_messages(session: Session, path: str = "/v1/messages", **body: Any) -> tuple[int, Any]:
    """The status and the answer; of a stream the message its events make, each in its place."""
    headers = {"x-api-key": session.api_key, "anthropic-version": "2023-06-01", "anthropic-beta": "a-1,b-2"}
    url = session.base_url.removesuffix("/v1") + path
    async with aiohttp.ClientSession() as http, http.post(url, json=body, headers=headers) as response:
        if response.content_type != "text/event-stream":
            return response.status, await response.json()
        return response.status, _accumulate((await response.text()).split("\n\n"))


def _accumulate(frames: list[str]) -> dict[str, Any]:
    assert frames.pop() == ""
    message: dict[str, Any] = {}
    block: dict[str, Any] | None = None
    partial, seen = "", []
    for frame in frames:
        if frame.startswith(":"):  # nothing was drawn for a while
            continue
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        seen.append(event["type"])
        if event["type"] == "message_start":
            message = event["message"]
            assert (message["content"], message["stop_reason"]) == ([], None)
        elif event["type"] == "content_block_start":
            assert block is None and event["index"] == len(message["content"])
            block, partial = event["content_block"], ""
        elif event["type"] == "content_block_delta":
            assert block is not None and event["index"] == len(message["content"])
            kind = event["delta"]["type"].removesuffix("_delta")
            piece = event["delta"][_FIELDS[kind]]
            assert kind == {"text": "text", "tool_use": "input_json"}.get(block["type"], kind)
            if kind == "input_json":
                partial += piece
            else:
                block[kind] += piece
        elif event["type"] == "content_block_stop":
            assert block is not None and event["index"] == len(message["content"])
            if block["type"] == "tool_use":
                block["input"] = json.loads(partial) if partial.endswith("}") else partial
            message["content"].append(block)
            block = None
        elif event["type"] == "message_delta":
            message |= event["delta"] | {"usage": event["usage"]}
        elif event["type"] == "error":
            message = event
    assert seen[0] == "message_start" and seen[-1] in ("message_stop", "error")
    return message

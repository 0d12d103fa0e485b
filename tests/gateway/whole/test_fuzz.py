"""Bodies that went wrong somewhere: every one is answered or refused in its dialect's shape; nothing drawn is lost."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import os
from collections.abc import Iterator
from random import Random
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forgejax.chat import ChatFormat
from forgejax.gateway import Gateway
from forgejax.types import Completion, OnTokens, SampleRequest
from tests.chat.tokenizers import CALCULATOR
from tests.gateway.fakes import TRAINING, ScriptedSampler, started

SENT = int(os.environ.get("FUZZ_BODIES", "800")) // 2
SEED = int(os.environ.get("FUZZ_SEED", "0"))
FUNCTION: dict[str, Any] = CALCULATOR["function"]
CALL = {"id": "c", "type": "function", "function": {"name": "calculator", "arguments": '{"expression": "1"}'}}
SCHEMA = {"name": "calculator", "description": "", "input_schema": FUNCTION["parameters"]}
TEXT = {"type": "text", "text": "t"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [
            {"role": "user", "content": [TEXT]},
            {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "content": "1"},
        ],
        "tools": [CALCULATOR],
        "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [CALL]}},
        "stop": ["x"],
        "temperature": 1,
        "max_tokens": 30,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "/v1/responses": {
        "instructions": "s",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "t"}]},
            {"type": "reasoning", "summary": [], "content": [], "encrypted_content": "turn"},
            {"type": "function_call", "call_id": "c", "name": "calculator", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": [TEXT]},
            {"type": "custom_tool_call", "call_id": "d", "name": "patch", "input": "x"},
            {"type": "custom_tool_call_output", "call_id": "d", "output": "1"},
        ],
        "tools": [
            {"type": "function", **FUNCTION},
            {"type": "namespace", "name": "n", "tools": [{"type": "custom", "name": "patch", "format": {}}]},
        ],
        "tool_choice": {"type": "function", "name": "calculator"},
        "store": True,
        "stream": True,
    },
    "/v1/messages": {
        "system": [TEXT],
        "messages": [
            {"role": "user", "content": [TEXT]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "turn"},
                    {"type": "tool_use", "id": "c", "name": "calculator", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "c", "content": [TEXT], "is_error": True}],
            },
        ],
        "tools": [SCHEMA],
        "tool_choice": {"type": "any"},
        "stop_sequences": ["x"],
        "stream": True,
    },
}
BODIES |= {"/v1/messages/count_tokens": BODIES["/v1/messages"], "/v1/responses/input_tokens": BODIES["/v1/responses"]}
JUNK: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    1e308,
    10**30,
    "",
    "x",
    "none",
    "required",
    "\ud83d",
    "<|im_end|>",
    "{",
    [],
    {},
]
JUNK += [
    [None],
    {"type": "text"},
    {"type": 5},
    {"type": []},
    {"name": {}},
    {"role": "user"},
    "assistant",
    "tool",
    "system",
]
REPLIES = ("ok<|im_end|>", '<tool_call>{"name": "calculator", "arguments": {"a', ' "calculator", "arguments": 1}', "x")


def list_places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from list_places(value[key], (*path, key))


def spoil(random: Random, body: dict[str, Any]) -> dict[str, Any]:
    body = copy.deepcopy(body)
    for _ in range(random.randint(1, 3)):
        *path, key = random.choice(list(list_places(body)) or [("messages",)])
        at: Any = body
        for step in path:
            at = at[step]
        if random.randint(0, 4):
            at[key] = copy.deepcopy(random.choice(JUNK))
        else:
            at.pop(key, None) if isinstance(at, dict) else at.pop(key)
    return body


def assert_answered(status: int, text: str) -> None:
    assert status < 500 and "internal_error" not in text
    assert status == 200 or json.loads(text)["error"]["message"]


@pytest.mark.parametrize("path", BODIES)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(random=st.randoms())
async def test_no_body_is_a_failure_and_every_token_drawn_is_in_a_turn(
    chat_format: ChatFormat, path: str, random: Random
) -> None:
    sampler = ScriptedSampler(chat_format, *(random.choice(REPLIES) for _ in range(3)))
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    try:
        async with aiohttp.ClientSession(headers={"x-api-key": session.api_key}) as http:
            for _ in range(3):
                raw = json.dumps(spoil(random, BODIES[path])).encode()
                async with http.post(gateway.url + path, data=raw) as response:
                    assert_answered(response.status, await response.text())
        turns = await gateway.close(session.id)
    finally:
        await gateway.stop()
    assert [turn.completion for turn in turns] == sampler.returned


class RandomSampler(ScriptedSampler):
    """Draws one of the replies, and keeps what it returned by session, for those that are open."""

    def __init__(self, chat_format: ChatFormat, random: Random) -> None:
        super().__init__(chat_format, *REPLIES)
        self.random = random
        self.drawn: dict[str, list[Completion]] = {}

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        self.requests[:], self.returned[:] = [], []
        self.random.shuffle(self.script)
        done = await super().sample(request, on_tokens)
        self.drawn[request.session_id].append(done)
        return done


async def play_badly(gateway: Gateway, sampler: RandomSampler, http: aiohttp.ClientSession, bodies: int) -> None:
    """One session of spoiled bodies: every one is answered in time, and its turns are what was drawn for it."""
    session = gateway.open(TRAINING)
    sampler.drawn[session.id] = []
    random, stored = sampler.random, f"resp_{session.id}_0"
    for _ in range(bodies):
        path, base = random.choice(list(BODIES.items()))
        keyed = random.choice(["", f"/key/{session.api_key}"])
        method, raw = "POST", json.dumps(spoil(random, base)).encode()
        if random.randint(0, 9) == 0:
            method, path, raw = random.choice(["GET", "DELETE"]), f"/v1/responses/{stored}", b""
        elif random.randint(0, 9) == 0:
            raw = raw[: random.randint(0, len(raw))]
        headers = {} if keyed else {"x-api-key": session.api_key}
        async with (
            asyncio.timeout(60),
            http.request(method, gateway.url + keyed + path, data=raw, headers=headers) as response,
        ):
            assert_answered(response.status, await response.text())
    turns = await gateway.close(session.id)
    assert [turn.completion for turn in turns] == sampler.drawn.pop(session.id)


async def test_bodies_of_many_sessions_at_once_lose_no_token_and_leave_nothing_behind(chat_format: ChatFormat) -> None:
    sampler = RandomSampler(chat_format, Random(SEED))
    gateway = await started(sampler)
    count, objects = 0, []

    async def play(http: aiohttp.ClientSession) -> None:
        nonlocal count
        while count < SENT:
            count += 5
            await play_badly(gateway, sampler, http, 5)

    async with aiohttp.ClientSession() as http:
        for _ in range(2):  # by the first time the table holds as many closed sessions as it ever does
            count = 0
            await asyncio.gather(*(play(http) for _ in range(8)))
            gc.collect()
            objects.append(len(gc.get_objects()))
    await gateway.stop()
    assert sampler.drawn == {}
    assert objects[1] - objects[0] < 5_000

"""Bodies that went wrong somewhere: every one is answered or refused in its dialect's shape; nothing drawn is lost."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forgejax.chat import ChatFormat
from tests.chat.tokenizers import CALCULATOR
from tests.gateway.fakes import TRAINING, ScriptedSampler, started

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


def spoil(data: st.DataObject, body: dict[str, Any]) -> dict[str, Any]:
    body = copy.deepcopy(body)
    for _ in range(data.draw(st.integers(1, 3))):
        *path, key = data.draw(st.sampled_from(list(list_places(body)) or [("messages",)]))
        at: Any = body
        for step in path:
            at = at[step]
        if data.draw(st.integers(0, 4)):
            at[key] = copy.deepcopy(data.draw(st.sampled_from(JUNK)))
        else:
            at.pop(key, None) if isinstance(at, dict) else at.pop(key)
    return body


@pytest.mark.parametrize("path", BODIES)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
async def test_no_body_is_a_failure_and_every_token_drawn_is_in_a_turn(
    chat_format: ChatFormat, path: str, data: st.DataObject
) -> None:
    sampler = ScriptedSampler(chat_format, *(data.draw(st.sampled_from(REPLIES)) for _ in range(3)))
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    try:
        async with aiohttp.ClientSession(headers={"x-api-key": session.api_key}) as http:
            for _ in range(3):
                raw = json.dumps(spoil(data, BODIES[path])).encode()
                async with http.post(gateway.url + path, data=raw) as response:
                    text = await response.text()
                    assert response.status < 500 and "internal_error" not in text
                    assert response.status == 200 or json.loads(text)["error"]["message"]
        turns = await gateway.close(session.id)
    finally:
        await gateway.stop()
    assert [turn.completion for turn in turns] == sampler.returned

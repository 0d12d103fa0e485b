"""How the gateway's tests ask it: as the OpenAI client does, and with bare bytes."""

from __future__ import annotations

import asyncio
import itertools
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

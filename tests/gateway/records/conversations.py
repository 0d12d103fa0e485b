"""A session with everything in it that a session can have, recorded on the way."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from forgejax.chat import ChatFormat
from forgejax.errors import EngineError
from forgejax.gateway.side_calls.rules import SideCall, SideCallMatch
from forgejax.types import Completion, FinishReason, OnTokens, SampleRequest, Turn
from tests.gateway.asking import CALL_TEXT, ask_messages, client, until
from tests.gateway.fakes import TRAINING, ScriptedSampler, completion, started

TOOL: Any = {"type": "function", "function": {"name": "calculator", "parameters": {"type": "object"}}}
TITLE = SideCall(name="title", match=SideCallMatch(system="You are a title generator"))
QUOTA = SideCall(name="quota", match=SideCallMatch(prompt="/^quota$/", max_tokens=1), answer="ok")
SLOW = "slow"


class EventfulSampler(ScriptedSampler):
    """Answers a prompt by what it says: it waits for another, fails, draws until it is stopped, or reads its script."""

    def __init__(self, chat_format: ChatFormat) -> None:
        super().__init__(chat_format, *[CALL_TEXT] + ["five<|im_end|>"] * 30)
        self.gate = asyncio.Event()

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        text = self.chat_format.decode(request.prompt_ids.tolist())[-40:]
        if SLOW in text:
            await self.gate.wait()
        if "fail" in text:
            raise EngineError("out of memory")
        if "endless" in text:
            drawn: list[int] = []
            while not (on_tokens is not None and on_tokens([5])):
                drawn.append(5)
                await asyncio.sleep(0.002)
            return completion(request, [*drawn, 5], FinishReason.STOP)
        return await super().sample(request, on_tokens)


async def record_everything(chat_format: ChatFormat, folder: Path) -> tuple[Turn, ...]:
    """The turns that the gateway gave; its file is in ``folder``."""
    sampler = EventfulSampler(chat_format)
    gateway = await started(sampler, 700, record=str(folder), side_calls=(TITLE, QUOTA))
    session = gateway.open(TRAINING)
    async with client(session) as agent:
        history: list[Any] = [{"role": "user", "content": "What is 2+3?"}]
        for _ in range(3):  # a call, its result, and an answer that is echoed
            reply = await agent.chat.completions.create(model="m", messages=history, tools=[TOOL])
            said = reply.choices[0].message
            history.append(said.model_dump(exclude_none=True))
            call = said.tool_calls[0].id if said.tool_calls else None
            history.append(
                {"role": "user", "content": "And now?"}
                if call is None
                else {"role": "tool", "tool_call_id": call, "content": "5"}
            )
        first = await agent.responses.create(model="m", input="hello")
        await agent.responses.create(model="m", input="go on", previous_response_id=first.id)
        await ask_messages(session, max_tokens=9, messages=[{"role": "user", "content": "hello"}], stream=True)
        # side calls, of both kinds
        await ask_messages(session, max_tokens=1, messages=[{"role": "user", "content": "quota"}])
        title: list[Any] = [
            {"role": "system", "content": "You are a title generator."},
            {"role": "user", "content": "2+3"},
        ]
        await agent.chat.completions.create(model="m", messages=title)
        # one that is overtaken: it must not find the turn that was drawn while it waited
        waiting = asyncio.create_task(_say(agent, f"{SLOW} one"))
        await until(lambda: sampler.requests and gateway.metrics.counts().get("turns_stop", 0) >= 6)
        await asyncio.sleep(0.05)
        await _say(agent, "a quick one")
        sampler.gate.set()
        await waiting
        with pytest.raises(openai.InternalServerError, match="out of memory"):
            await _say(agent, "fail")
        with pytest.raises(openai.BadRequestError, match="maximum context length"):
            await _say(agent, "x " * 900)
    await _retry_and_leave(session)
    turns = await gateway.close(session.id)
    await gateway.stop()
    return turns


async def _say(agent: Any, text: str) -> None:
    await agent.chat.completions.create(model="m", messages=[{"role": "user", "content": text}])


async def _retry_and_leave(session: Any) -> None:
    """Sends the same twice, as a retry, and goes away while an answer is drawn."""
    url = f"{session.base_url}/chat/completions"
    headers = {"Authorization": f"Bearer {session.api_key}", "Idempotency-Key": "k"}
    body = {"model": "m", "messages": [{"role": "user", "content": "once"}]}
    async with aiohttp.ClientSession(headers=headers) as http:
        for _ in range(2):
            async with http.post(url, json=body) as response:
                assert response.status == 200
                await response.read()  # whoever closes a connection in which bytes lie unread has not had the answer
        endless = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "endless"}]}
        async with http.post(url, json=endless) as response:
            await response.content.readline()
            await asyncio.sleep(0.1)
            response.close()
    await asyncio.sleep(0.1)

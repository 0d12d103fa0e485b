"""A session: what its requests are sampled with, and how its turns are numbered."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from forgejax.chat import ChatFormat
from forgejax.types import Completion, OnTokens, SampleRequest, SamplingLaw, SessionSpec
from tests.chat.families import save_family
from tests.chat.tokenizers import CALCULATOR
from tests.gateway.asking import CALL_TEXT, GOOD, USER, client, post, status_of
from tests.gateway.fakes import TRAINING, ScriptedSampler, started


async def test_the_length_limit_and_the_context_cut_a_reply(chat_format: ChatFormat) -> None:
    prompt = len(chat_format.render([USER]))
    sampler = ScriptedSampler(chat_format, *["x " * 40] * 4)
    gateway = await started(sampler, context_length=prompt + 20, max_tokens_default=9)
    async with client(gateway.open(TRAINING)) as agent:
        limits: Any
        for limits in ({"max_tokens": 5}, {"max_completion_tokens": 7, "max_tokens": 99}, {}, {"max_tokens": 1000}):
            reply = await agent.chat.completions.create(model="m", messages=[USER], **limits)
            assert reply.choices[0].finish_reason == "length"
        assert [request.max_tokens for request in sampler.requests] == [5, 7, 9, 20]
        with pytest.raises(openai.BadRequestError) as refused:
            await agent.chat.completions.create(model="m", messages=[{"role": "user", "content": "long " * 40}])
    await gateway.stop()
    assert refused.value.code == "context_length_exceeded" and len(sampler.requests) == 4


async def test_no_reply_is_longer_than_the_gateways_limit(chat_format: ChatFormat) -> None:
    sampler = ScriptedSampler(chat_format, *["x " * 40] * 3)
    gateway = await started(sampler, max_tokens_default=9, max_tokens_limit=6)
    async with client(gateway.open(TRAINING)) as agent:
        limits: Any
        for limits in ({"max_tokens": 5}, {}, {"max_tokens": 1000}):
            await agent.chat.completions.create(model="m", messages=[USER], **limits)
    await gateway.stop()
    assert [request.max_tokens for request in sampler.requests] == [5, 6, 6]


@pytest.mark.parametrize(
    ("law", "asked", "drawn_from", "untrainable"),
    [
        (SamplingLaw(), {"temperature": 0}, SamplingLaw(), None),
        (None, {"temperature": 0.5}, SamplingLaw(temperature=0.5), None),
        (None, {"temperature": 0}, SamplingLaw(temperature=0.0), "sampling_law"),
        (None, {"top_p": 0.9}, SamplingLaw(top_p=0.9), "sampling_law"),
        (None, {"logit_bias": {"5": -100}}, SamplingLaw(logit_bias=((5, -100.0),)), "sampling_law"),
    ],
)
async def test_the_sessions_law_overrides_the_agents(
    chat_format: ChatFormat,
    law: SamplingLaw | None,
    asked: dict[str, Any],
    drawn_from: SamplingLaw,
    untrainable: str | None,
) -> None:
    sampler = ScriptedSampler(chat_format, "5<|im_end|>")
    gateway = await started(sampler)
    session = gateway.open(SessionSpec(law=law))
    async with client(session) as agent:
        await agent.chat.completions.create(model="m", messages=[USER], **asked)
    (turn,) = await gateway.close(session.id)
    await gateway.stop()
    assert sampler.requests[0].law == drawn_from and turn.untrainable == untrainable
    assert turn.requested_law == (SamplingLaw(**asked) if law is not None else drawn_from)


async def test_tools_are_refused_where_the_template_knows_no_way_to_call_them(tmp_path: Path) -> None:
    chat_format = ChatFormat.load(save_family(tmp_path, "smollm2"))
    gateway = await started(ScriptedSampler(chat_format, "5<|im_end|>", CALL_TEXT))
    session = gateway.open(TRAINING)
    status, error = await post(session, json.dumps({**GOOD, "tools": [CALCULATOR]}).encode())
    assert (status, error["code"]) == (400, "tools_not_served") and "gateway.tool_format" in error["message"]
    async with client(session) as agent:
        assert (await agent.chat.completions.create(**GOOD)).choices[0].message.content == "5"
    await gateway.stop()
    told = await started(ScriptedSampler(chat_format, CALL_TEXT, "5<|im_end|>"), tool_format="hermes")
    asking = told.open(TRAINING)
    async with client(asking) as agent:
        reply = await agent.chat.completions.create(tools=[CALCULATOR], **GOOD)
        message: Any = reply.choices[0].message
        result: Any = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "5"}
        history: Any = [*GOOD["messages"], message, result]
        await agent.chat.completions.create(tools=[CALCULATOR], model="m", messages=history)
    turns = await told.close(asking.id)
    await told.stop()
    assert reply.choices[0].finish_reason == "tool_calls"
    # The template prints no tools, so the policy is told of them, and of how a call is written.
    prompt = chat_format.decode(turns[0].completion.prompt_ids)
    assert '"name": "calculator"' in prompt and '{"name": "NAME", "arguments": {"KEY": "VALUE"}}' in prompt
    assert [turn.parent for turn in turns] == [None, 0]


async def test_a_long_prompt_is_answered_like_a_short_one_and_counts_are_by_name(chat_format: ChatFormat) -> None:
    sampler = ScriptedSampler(chat_format, "5<|im_end|>", "6<|im_end|>", "7<|im_end|>")
    gateway = await started(sampler, context_length=200_000)
    session = gateway.open(TRAINING)
    long: Any = {"role": "user", "content": "the answer is " * 2000}
    async with client(session) as agent:
        first = await agent.chat.completions.create(model="m", messages=[long])
        said: Any = first.choices[0].message
        await agent.chat.completions.create(model="m", messages=[long, said, USER])
        await agent.chat.completions.create(model="m", messages=[USER])
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert [turn.parent for turn in turns] == [None, 0, None]
    assert turns[0].completion.prompt_ids.tolist() == chat_format.render([long])
    counts = gateway.metrics.counts()
    assert (counts["branches_history"], counts["turns_stop"], counts["completion_tokens"]) == (1, 3, 6)


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


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("family", "choice", "forced", "drawn"),
    [
        (
            "qwen3",
            "required",
            '<tool_call>\n{"name":',
            ' "calculator", "arguments": {"expression": "1"}}\n</tool_call>',
        ),
        (
            "qwen2.5",
            {"type": "function", "function": {"name": "calculator"}},
            '<tool_call>\n{"name": "calculator", "arguments":',
            ' {"expression": "1"}}\n</tool_call>',
        ),
        (
            "minimax-m2",
            "required",
            '\n</think>\n\n<minimax:tool_call>\n<invoke name="',
            'calculator"><parameter name="expression">1</parameter></invoke>\n</minimax:tool_call>',
        ),
    ],
)
async def test_a_call_that_must_be_made_is_begun_in_the_context_and_the_rest_is_drawn(
    tmp_path: Path, family: str, choice: Any, *, forced: str, drawn: str, stream: bool
) -> None:
    chat_format = ChatFormat.load(save_family(tmp_path, family))
    end = chat_format.codec.decode_token(chat_format.end_of_turn_id)
    sampler = ScriptedSampler(chat_format, drawn + end, f"1{end}")
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    other = {"type": "function", "function": {"name": "other"}}
    body: dict[str, Any] = {"model": "m", "tools": [CALCULATOR, other]}
    async with client(session) as agent:
        asked: Any = {**body, "messages": [USER], "tool_choice": choice, "stream": stream}
        reply = await agent.chat.completions.create(**asked)
        if stream:
            deltas = [chunk.choices[0].delta async for chunk in reply]
            pieces = [call for delta in deltas for call in delta.tool_calls or ()]
            id_, name = pieces[0].id, pieces[0].function.name
            arguments = "".join(call.function.arguments or "" for call in pieces)
        else:
            (call,) = reply.choices[0].message.tool_calls
            id_, name, arguments = call.id, call.function.name, call.function.arguments
        echo = {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
        history = [{"role": "assistant", "tool_calls": [echo]}, {"role": "tool", "tool_call_id": id_, "content": "1"}]
        following: Any = {**body, "messages": [USER, *history]}
        await agent.chat.completions.create(**following)
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert (name, json.loads(arguments)) == ("calculator", {"expression": "1"})
    spelled = chat_format.codec.encode(forced, at_start=False)
    opening = chat_format.render([USER])[-4:]  # where the assistant begins to speak
    assert turns[0].completion.prompt_ids.tolist()[-len(opening) - len(spelled) :] == opening + spelled
    assert [turn.completion for turn in turns] == sampler.returned
    assert [(turn.parent, turn.untrainable, turn.tool_calls) for turn in turns] == [(None, None, 1), (0, None, 0)]

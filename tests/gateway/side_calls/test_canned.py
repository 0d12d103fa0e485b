"""Who answers side calls: a given text in the words of the dialect, or the policy, which is not trained on it."""

from __future__ import annotations

from typing import Any

import pytest

from forgejax.chat import ChatFormat
from forgejax.gateway.side_calls.rules import SideCall, SideCallMatch
from tests.gateway.asking import ask_messages, client
from tests.gateway.fakes import TRAINING, ScriptedSampler, started

CANNED = SideCall(name="title", match=SideCallMatch(system="title"), answer="A title")
BY_POLICY = SideCall(name="title", match=SideCallMatch(system="title"))
TITLE: list[Any] = [{"role": "system", "content": "Write a title."}, {"role": "user", "content": "hi"}]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_given_text_is_worded_in_every_dialect_and_draws_no_token(
    chat_format: ChatFormat, stream: bool
) -> None:
    sampler = ScriptedSampler(chat_format)
    gateway = await started(sampler, side_calls=(CANNED,))
    session = gateway.open(TRAINING)
    async with client(session) as agent:
        chat: Any = await agent.chat.completions.create(model="m", messages=TITLE, stream=stream)
        said = (
            chat.choices[0].message.content
            if not stream
            else "".join([chunk.choices[0].delta.content or "" async for chunk in chat])
        )
        response: Any = await agent.responses.create(model="m", instructions="title", input="hi", stream=stream)
        if stream:
            response = [event async for event in response][-1].response
        again = await agent.responses.retrieve(response.id)
    status, message = await ask_messages(
        session, max_tokens=9, system="A title", messages=[{"role": "user", "content": "hi"}], stream=stream
    )
    counts, turns = gateway.metrics.counts(), await gateway.close(session.id)
    await gateway.stop()
    assert said == response.output_text == again.output_text == "A title"
    assert status == 200 and [block["text"] for block in message["content"]] == ["A title"]
    assert message["stop_reason"] == "end_turn" and response.status == "completed"
    assert (turns, sampler.requests) == ((), [])
    assert counts["side_calls_title_canned"] == 3 and counts["undelivered"] == 0


async def test_the_policys_answer_to_a_side_call_is_recorded_and_not_trained(chat_format: ChatFormat) -> None:
    sampler = ScriptedSampler(chat_format, "four<|im_end|>", "Sums<|im_end|>", "five<|im_end|>")
    gateway = await started(sampler, side_calls=(BY_POLICY,))
    session = gateway.open(TRAINING)
    async with client(session) as agent:
        first: Any = await agent.chat.completions.create(model="m", messages=[TITLE[1]])
        title: Any = await agent.chat.completions.create(model="m", messages=TITLE)
        said: Any = {"role": "assistant", "content": first.choices[0].message.content}
        await agent.chat.completions.create(model="m", messages=[TITLE[1], said, TITLE[1]])
    counts, turns = gateway.metrics.counts(), await gateway.close(session.id)
    await gateway.stop()
    assert title.choices[0].message.content == "Sums"
    assert [(turn.parent, turn.untrainable) for turn in turns] == [(None, None), (None, "side_call_title"), (0, None)]
    assert counts["side_calls_title_policy"] == 1 and not any(name.startswith("branches") for name in counts)

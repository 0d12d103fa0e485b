"""OpenAI's chat completions, as the real OpenAI client sees them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import numpy as np
import pytest
from openai import OpenAI

from forgejax.chat import ChatFormat
from forgejax.chat.messages import Message, ReasoningPart, TextPart, ToolCallPart
from forgejax.chat.reply import PartEnd, ReasoningDelta, Reply, TextDelta, ToolCallDelta, ToolCallStart, Usage
from forgejax.gateway.dialects.base import ReplyHead
from forgejax.gateway.dialects.chat_completions import ChatCompletions
from forgejax.gateway.memory import ReplyMemory
from forgejax.types import SamplingLaw
from tests.chat.tokenizers import CALCULATOR
from tests.gateway.asking import CALL_TEXT, GOOD, USER, client, post
from tests.gateway.fakes import TRAINING, ScriptedSampler, started


async def test_a_tool_episode_records_a_chain_whose_prompts_grow_by_the_sampled_ids(chat_format: ChatFormat) -> None:
    sampler = ScriptedSampler(chat_format, CALL_TEXT, "It is 5.<|im_end|>")
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    messages: list[Any] = [USER]
    async with client(session) as agent:
        reply = await agent.chat.completions.create(model="any", messages=messages, tools=[CALCULATOR])
        choice = reply.choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
        assert choice.message.tool_calls is not None and len(choice.message.tool_calls) == 1
        call = choice.message.tool_calls[0]
        assert call.type == "function" and json.loads(call.function.arguments) == {"expression": "2+3"}
        assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
        assert reply.usage.prompt_tokens_details.cached_tokens == 4
        assert reply.usage.completion_tokens == len(sampler.script[0])
        messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "5"}]
        last = await agent.chat.completions.create(model="any", messages=messages, tools=[CALCULATOR])
        assert (last.choices[0].finish_reason, last.choices[0].message.content) == ("stop", "It is 5.")
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert [turn.parent for turn in turns] == [None, 0]
    assert [turn.tool_calls for turn in turns] == [1, 0] and turns[0].malformed_tool_calls == 0
    known = np.concatenate([turns[0].completion.prompt_ids, turns[0].completion.token_ids])
    assert turns[1].completion.prompt_ids[: len(known)].tolist() == known.tolist()
    assert [turn.completion for turn in turns] == sampler.returned
    assert all(turn.untrainable is None and turn.finished_at > turn.requested_at for turn in turns)
    seeds = [request.seed for request in sampler.requests]
    assert None not in seeds and len(set(seeds)) == 2


async def test_a_stream_says_what_the_whole_reply_says(chat_format: ChatFormat) -> None:
    text = "naïve 🙂 " + CALL_TEXT
    sampler = ScriptedSampler(chat_format, text, text)
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    async with client(session) as agent:
        whole = await agent.chat.completions.create(
            model="any",
            messages=[USER],
            tools=[CALCULATOR],
            logprobs=True,
        )
        stream = await agent.chat.completions.create(
            model="any",
            messages=[USER],
            tools=[CALCULATOR],
            logprobs=True,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    await gateway.stop()
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    deltas = [chunk.choices[0].delta for chunk in chunks[:-1]]
    assert len(deltas) > 10
    assert (
        "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content == "naïve 🙂 Let me see."
    )
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert whole.choices[0].message.tool_calls is not None
    expected = whole.choices[0].message.tool_calls[0]
    assert expected.type == "function" and calls[0].function is not None
    assert (calls[0].id, calls[0].function.name) == ("call_00001000", "calculator")
    assert {call.index for call in calls} == {0}
    pieces = [call.function.arguments or "" for call in calls if call.function is not None]
    assert "".join(pieces) == expected.function.arguments == '{"expression": "2+3"}' and len(pieces) > 5
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "tool_calls"
    streamed, at_once = chunks[-2].choices[0].logprobs, whole.choices[0].logprobs
    assert streamed is not None and at_once is not None and at_once.content is not None
    assert streamed.content == at_once.content
    assert [item.logprob for item in at_once.content][:2] == [-0.125, -0.25]


async def test_the_synchronous_client_is_served_too(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format, "five<|im_end|>", "five<|im_end|>"))
    session = gateway.open(TRAINING)

    def ask() -> list[str | None]:
        with OpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0) as agent:
            whole = agent.chat.completions.create(model="m", messages=[{"role": "user", "content": "?"}])
            with agent.chat.completions.stream(model="m", messages=[{"role": "user", "content": "?"}]) as stream:
                return [whole.choices[0].message.content, stream.get_final_completion().choices[0].message.content]

    assert await asyncio.to_thread(ask) == ["five", "five"]
    await gateway.stop()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "content"), [("END", "one two "), (["xyz", "two"], "one "), (["absent"], "one two END three")]
)
async def test_a_stop_string_ends_the_text_and_the_ids_stay_as_drawn(
    chat_format: ChatFormat, stream: bool, stop: str | list[str], content: str
) -> None:
    sampler = ScriptedSampler(chat_format, "one two END three<|im_end|>")
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    async with client(session) as agent:
        body: dict[str, Any] = {"model": "m", "messages": [USER], "stop": stop, "stream": stream}
        reply = await agent.chat.completions.create(**body)
        if stream:
            pieces = [chunk.choices[0] async for chunk in reply]
            got, finish = "".join(piece.delta.content or "" for piece in pieces), pieces[-1].finish_reason
        else:
            got, finish = reply.choices[0].message.content, reply.choices[0].finish_reason
    (turn,) = await gateway.close(session.id)
    await gateway.stop()
    assert (got, finish) == (content, "stop")
    ids = turn.completion.token_ids.tolist()
    assert ids == sampler.script[0][: len(ids)]
    assert chat_format.decode(ids) == content + ("" if stop == ["absent"] else "END" if stop == "END" else "two")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        ('<tool_call>{"name": "abacus", "arguments": {}}</tool_call>', "abacus", "{}"),
        ('<tool_call>{"name": "calculator", "arguments": {"expr": 1}}</tool_call>', "calculator", '{"expr": 1}'),
        ('<tool_call>{"name": "calculator", "arguments": {"e": 1x}}</tool_call>', "calculator", '{"e": '),
        ('<tool_call>{"name": "calculator", "arguments": "{}"}</tool_call>', "calculator", "{}"),
    ],
)
async def test_a_faulty_call_is_handed_over_and_counted_and_stays_trainable_as_sampled(
    chat_format: ChatFormat, text: str, name: str, arguments: str, stream: bool
) -> None:
    sampler = ScriptedSampler(chat_format, text + "<|im_end|>", "Done.<|im_end|>")
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    async with client(session) as agent:
        body: dict[str, Any] = {"model": "m", "messages": [USER], "tools": [CALCULATOR], "stream": stream}
        reply = await agent.chat.completions.create(**body)
        if stream:
            chunks = [chunk.choices[0] async for chunk in reply]
            calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
            got = (calls[0].function.name, "".join(call.function.arguments or "" for call in calls))
            id_, finish = calls[0].id, chunks[-1].finish_reason
        else:
            (call,) = reply.choices[0].message.tool_calls
            got, id_, finish = (call.function.name, call.function.arguments), call.id, reply.choices[0].finish_reason
        echo = {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
        said: Any = {"role": "assistant", "content": None, "tool_calls": [echo]}
        error: Any = {"role": "tool", "tool_call_id": id_, "content": "Error: no such call."}
        await agent.chat.completions.create(model="m", messages=[USER, said, error], tools=[CALCULATOR])
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert (got, finish) == ((name, arguments), "tool_calls")
    assert [(t.tool_calls, t.malformed_tool_calls, t.untrainable, t.parent) for t in turns] == [
        (0, 1, None, None),
        (0, 0, None, 0),
    ]


async def test_what_names_no_tool_is_text_and_is_counted(chat_format: ChatFormat) -> None:
    text = "<tool_call>five</tool_call>"
    gateway = await started(ScriptedSampler(chat_format, text + "<|im_end|>"))
    session = gateway.open(TRAINING)
    async with client(session) as agent:
        reply = await agent.chat.completions.create(model="m", messages=[USER], tools=[CALCULATOR])
    (turn,) = await gateway.close(session.id)
    await gateway.stop()
    assert reply.choices[0].message.content == text and reply.choices[0].message.tool_calls is None
    assert reply.choices[0].finish_reason == "stop"
    assert (turn.tool_calls, turn.malformed_tool_calls, turn.untrainable) == (0, 1, None)


async def test_with_tool_choice_none_the_prompt_is_the_same_and_calls_stay_text(chat_format: ChatFormat) -> None:
    sampler = ScriptedSampler(chat_format, CALL_TEXT, CALL_TEXT)
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    async with client(session) as agent:
        body: dict[str, Any] = {"model": "m", "tools": [CALCULATOR]}
        first = await agent.chat.completions.create(messages=[USER], **body)
        message: Any = first.choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "5"}
        body |= {"messages": [USER, message, result], "tool_choice": "none"}
        last = await agent.chat.completions.create(**body)
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert [turn.parent for turn in turns] == [None, 0]
    assert last.choices[0].message.content == CALL_TEXT.removesuffix("<|im_end|>")
    assert last.choices[0].message.tool_calls is None and last.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("call", "result"),
    [
        ('{"expression": "2', "5"),
        ("", "5"),
        ({"expression": "2+3"}, "5"),
        ("{}", None),
        ('{"expression": "\\ud83d"}', "cut \ud83d"),
    ],
)
async def test_a_history_that_cannot_be_read_is_served_as_text(chat_format: ChatFormat, call: Any, result: Any) -> None:
    gateway = await started(ScriptedSampler(chat_format, "ok<|im_end|>"))
    session = gateway.open(TRAINING)
    said = {"id": "a", "type": "function", "function": {"name": "calculator", "arguments": call}}
    history = [USER, {"role": "assistant", "content": None, "tool_calls": [said]}]
    history.append({"role": "tool", "tool_call_id": "a", "content": result})
    raw = json.dumps({"model": "m", "messages": history, "tools": [CALCULATOR]}).encode()
    headers = {"Authorization": f"Bearer {session.api_key}"}
    async with aiohttp.request("POST", f"{session.base_url}/chat/completions", data=raw, headers=headers) as response:
        answer = await response.json()
    (turn,) = await gateway.close(session.id)
    await gateway.stop()
    assert answer["choices"][0]["message"]["content"] == "ok"
    if call == '{"expression": "2':
        assert 'calculator({"expression": "2)' in chat_format.decode(turn.completion.prompt_ids)


CALCULATE = {"type": "function", "function": {"name": "calculator"}}


@pytest.mark.parametrize(
    ("sent", "calls", "allowed"),
    [
        ({}, "auto", None),
        ({"tool_choice": "required"}, "required", None),
        ({"tool_choice": CALCULATE}, "required", {"calculator"}),
        ({"function_call": {"name": "calculator"}}, "required", {"calculator"}),
        ({"function_call": "none"}, "none", None),
        (
            {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [CALCULATE]}}},
            "required",
            {"calculator"},
        ),
    ],
)
def test_tool_choices_are_read(sent: dict[str, Any], calls: str, allowed: set[str] | None) -> None:
    chat = ChatCompletions().parse({**GOOD, "tools": [CALCULATOR], **sent}, ReplyMemory()).chat
    assert (chat.calls, chat.allowed) == (calls, allowed)


async def test_the_older_functions_and_both_names_of_reasoning_are_read() -> None:
    history = [
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}, "reasoning": "hm"},
        {"role": "function", "name": "f", "content": "5"},
    ]
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    chat = ChatCompletions().parse({"messages": history, "functions": [function]}, ReplyMemory()).chat
    assert chat.tools == ({"type": "function", "function": function},)
    assert chat.messages[1].reasoning == "hm" and chat.messages[1].tool_calls[0].name == "f"
    assert (chat.messages[2].role, chat.messages[2].name) == ("tool", "f")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "expected an object"),
        ({}, "messages is None; expected an array"),
        ({**GOOD, "messages": []}, "messages is []; expected at least one message"),
        ({**GOOD, "messages": "hi"}, "messages is 'hi'; expected an array"),
        ({**GOOD, "messages": ["hi"]}, "messages[0] is 'hi'; expected an object"),
        ({**GOOD, "messages": [{"role": "wizard", "content": ""}]}, "messages[0].role is 'wizard'; expected one of"),
        ({**GOOD, "messages": [{"role": ["user"], "content": ""}]}, "messages[0].role is ['user']"),
        ({**GOOD, "messages": [{"role": "user"}]}, "messages[0].content is None"),
        ({**GOOD, "messages": [{"role": "user", "content": 5}]}, "messages[0].content is 5"),
        (
            {**GOOD, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type is 'image_url'",
        ),
        (
            {**GOOD, "messages": [{"role": "user", "content": "", "tool_calls": [1]}]},
            "messages[0].tool_calls is [1]",
        ),
        (
            {**GOOD, "messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}]},
            "messages[0].tool_calls[0].function.arguments is 5",
        ),
        ({**GOOD, "functions": [{"name": 5}]}, "functions[0].name is 5"),
        ({**GOOD, "messages": [USER, {"role": "system", "content": "x"}]}, "no place for a message of role system"),
        ({**GOOD, "tools": {}}, "tools is {}; expected an array"),
        ({**GOOD, "tools": [{"type": "web_search"}]}, "tools[0].type is 'web_search'"),
        ({**GOOD, "tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name is ''"),
        (
            {**GOOD, "tool_choice": "required"},
            "tool_choice is 'required'; expected none or auto where no tools are sent",
        ),
        ({**GOOD, "tool_choice": "some"}, "tool_choice is 'some'; expected none, auto, required"),
        ({**GOOD, "tools": [CALCULATOR], "tool_choice": {"function": {"name": "f"}}}, "tool_choice is ['f']"),
        ({**GOOD, "n": 2}, "n is 2; expected 1"),
        ({**GOOD, "max_tokens": 0}, "max_tokens is 0; expected an integer of at least 1, or -1 for no limit"),
        ({**GOOD, "max_tokens": True}, "max_tokens is True"),
        ({**GOOD, "max_completion_tokens": "9"}, "max_completion_tokens is '9'"),
        ({**GOOD, "temperature": "hot"}, "temperature is 'hot'; expected a number"),
        ({**GOOD, "top_p": True}, "top_p is True"),
        ({**GOOD, "logit_bias": {"x": 1}}, "logit_bias is 'x'; expected token ids as keys"),
        ({**GOOD, "logit_bias": {"3": "1"}}, "logit_bias.3 is '1'; expected a number"),
        ({**GOOD, "stream": "yes"}, "stream is 'yes'; expected true or false"),
        ({**GOOD, "stream_options": 1}, "stream_options is 1"),
        ({**GOOD, "stop": [5]}, "stop[0] is 5; expected a non-empty string"),
        ({**GOOD, "seed": 1.5}, "seed is 1.5"),
        ({**GOOD, "top_logprobs": 3}, "top_logprobs is 3"),
        ({**GOOD, "model": 1}, "model is 1"),
    ],
)
async def test_a_bad_body_is_a_400_that_names_the_field(chat_format: ChatFormat, body: Any, says: str) -> None:
    sampler = ScriptedSampler(chat_format)
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, error = await post(session, raw)
    assert status == 400 and says in error["message"] and error["type"] == "invalid_request_error"
    assert await gateway.close(session.id) == () and sampler.requests == []
    await gateway.stop()


async def test_fields_without_an_effect_are_counted_by_name(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format, "5<|im_end|>"))
    async with client(gateway.open(TRAINING)) as agent:
        extra = {"store": True, "whatever": [1], "min_tokens": 1, "parallel_tool_calls": False, "min_p": None}
        reply = await agent.chat.completions.create(model="m", messages=[USER], extra_body=extra)
    counts = gateway.metrics.counts()
    await gateway.stop()
    assert reply.choices[0].message.content == "5"
    assert {name: count for name, count in counts.items() if name.startswith("ignored")} == {
        "ignored_fields_chat_completions_min_tokens": 1,
        "ignored_fields_chat_completions_other": 1,
        "ignored_fields_chat_completions_parallel_tool_calls": 1,
    }


@pytest.mark.parametrize(
    ("sent", "law", "limit"),
    [
        ({"temperature": -1, "top_p": 2}, SamplingLaw(temperature=0.0), None),
        ({"temperature": 7, "max_tokens": -1, "top_k": -1}, SamplingLaw(temperature=2.0), None),
        (
            {"min_p": 2, "logit_bias": {"7": 250, "3": -1}},
            SamplingLaw(min_p=1.0, logit_bias=((3, -1.0), (7, 100.0))),
            None,
        ),
        ({"top_p": 0, "max_tokens": 9, "max_completion_tokens": -1}, SamplingLaw(top_k=1), 9),
    ],
)
def test_a_law_out_of_range_is_the_nearest_that_can_be_drawn_from(
    sent: dict[str, Any], law: SamplingLaw, limit: int | None
) -> None:
    chat = ChatCompletions().parse({**GOOD, **sent}, ReplyMemory()).chat
    assert (chat.law, chat.max_tokens) == (law, limit)


def test_reasoning_is_worded_as_reasoning_content_beside_the_content() -> None:
    call = ToolCallPart(id="call_0", name="f", raw='{"n": 3}', arguments={"n": 3})
    parts = (ReasoningPart(text="Hm, 5."), TextPart(text="It is 5."), call)
    usage = Usage(prompt_tokens=3, completion_tokens=4, cached_tokens=1, reasoning_tokens=2)
    message = Message(role="assistant", parts=parts)
    reply = Reply(message=message, finish="tool_calls", usage=usage, signature="t")
    head = ReplyHead(id="c", created=0, model="m")
    request = ChatCompletions().parse(GOOD, ReplyMemory())
    response = ChatCompletions().response(head, request, reply)
    wired = {"id": "call_0", "type": "function", "function": {"name": "f", "arguments": '{"n": 3}'}}
    assert response["choices"][0]["message"] == {
        "role": "assistant",
        "content": "It is 5.",
        "refusal": None,
        "reasoning_content": "Hm, 5.",
        "reasoning": "Hm, 5.",
        "tool_calls": [wired],
    }
    assert response["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}
    words = ChatCompletions().stream(head, request)
    deltas = (
        ReasoningDelta(part=0, text="Hm, 5."),
        PartEnd(part=0),
        TextDelta(part=1, text="It is"),
        ToolCallStart(part=2, id="call_0", name="f"),
        ToolCallDelta(part=2, text='{"n"'),
    )
    events = [json.loads(data) for delta in deltas for _, data in words.delta(delta)]
    assert [event["choices"][0]["delta"] for event in events] == [
        {"reasoning_content": "Hm, 5.", "reasoning": "Hm, 5."},
        {"content": "It is"},
        {"tool_calls": [{**wired, "index": 0, "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"n"'}}]},
    ]

"""Anthropic's Messages, by the letter of its protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from forgejax.chat import ChatFormat
from forgejax.gateway.dialects.anthropic_messages import AnthropicMessages
from forgejax.gateway.memory import ReplyMemory
from tests.chat.tokenizers import CALCULATOR
from tests.gateway.asking import ask_messages as ask
from tests.gateway.asking import assert_chain
from tests.gateway.fakes import TRAINING, ScriptedSampler, started

FUNCTION: dict[str, Any] = CALCULATOR["function"]
TOOL = {"name": "calculator", "description": FUNCTION["description"], "input_schema": FUNCTION["parameters"]}
ASKED = {"role": "user", "content": [{"type": "text", "text": "What is 2+3?", "cache_control": {"type": "ephemeral"}}]}
THOUGHT = "<think>\nI add.\n</think>\n\nLet me see.\n"
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "2+3"}}\n</tool_call><|im_end|>'
END = "It is 5.<|im_end|>"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("thought", ["kept", "redacted", "dropped"])
async def test_an_episode_is_a_chain_of_turns_whatever_becomes_of_the_thought(
    chat_format: ChatFormat, thought: str, stream: bool
) -> None:
    sampler = ScriptedSampler(chat_format, THOUGHT + CALL, THOUGHT + CALL, END)
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    history: list[Any] = [ASKED]
    system = [{"type": "text", "text": "x-anthropic-billing-header: cch=1;"}, {"type": "text", "text": "Be brief."}]
    answers = []
    for number in range(3):
        system[0]["text"] = f"x-anthropic-billing-header: cch={number};"
        body: dict[str, Any] = {
            "model": "m",
            "max_tokens": 99,
            "messages": history,
            "system": system,
            "tools": [TOOL],
            "stream": stream,
        }
        status, answer = await ask(session, **body)
        assert status == 200
        answers.append(answer)
        content = answer["content"]
        if thought == "redacted":
            content = [
                {"type": "redacted_thinking", "data": block["signature"]} if block["type"] == "thinking" else block
                for block in content
            ]
        elif thought == "dropped":
            content = [block for block in content if block["type"] != "thinking"]
        results = [
            {"type": "tool_result", "tool_use_id": block["id"], "content": [{"type": "text", "text": "5"}]}
            for block in content
            if block["type"] == "tool_use"
        ]
        history = [*history, {"role": "assistant", "content": content}, {"role": "user", "content": results}]
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert_chain(turns, sampler)
    assert [answer["stop_reason"] for answer in answers] == ["tool_use", "tool_use", "end_turn"]
    thinking, text, call = answers[0]["content"]
    assert (thinking["thinking"], text["text"]) == ("I add.", "Let me see.") and thinking["signature"]
    assert (call["name"], call["input"]) == ("calculator", {"expression": "2+3"})
    prompt = len(turns[0].completion.prompt_ids)
    assert answers[0]["usage"] == {
        "input_tokens": prompt - 4,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens": len(turns[0].completion.token_ids),
    }
    text = chat_format.decode(turns[0].completion.prompt_ids)
    assert "Be brief." in text and "billing" not in text


@pytest.mark.parametrize("stream", [False, True])
async def test_the_stop_sequence_that_was_met_is_told(chat_format: ChatFormat, stream: bool) -> None:
    gateway = await started(ScriptedSampler(chat_format, "one two three<|im_end|>", "one<|im_end|>"))
    session = gateway.open(TRAINING)
    body: dict[str, Any] = {"messages": [ASKED], "max_tokens": 99, "stop_sequences": ["three", "two"], "stream": stream}
    met, unmet = (await ask(session, **body))[1], (await ask(session, **body))[1]
    await gateway.stop()
    assert (met["content"][0]["text"], met["stop_reason"], met["stop_sequence"]) == ("one ", "stop_sequence", "two")
    assert (unmet["stop_reason"], unmet["stop_sequence"]) == ("end_turn", None)


async def test_a_call_that_is_no_object_is_told_as_such_and_its_turn_is_known_again(chat_format: ChatFormat) -> None:
    broken = '<tool_call>{"name": "calculator", "arguments": {"expression": 2+3}}</tool_call><|im_end|>'
    sampler = ScriptedSampler(chat_format, broken, broken, END)
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    body: dict[str, Any] = {"max_tokens": 99, "tools": [TOOL]}
    streamed = (await ask(session, messages=[{"role": "user", "content": "?"}], stream=True, **body))[1]
    whole = (await ask(session, messages=[ASKED], **body))[1]
    (block,) = whole["content"]
    result = {"type": "tool_result", "tool_use_id": block["id"], "content": "no JSON", "is_error": True}
    said = {"role": "assistant", "content": [block]}
    await ask(session, messages=[ASKED, said, {"role": "user", "content": [result]}], **body)
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert streamed["content"][0]["input"] == '{"expression": '
    assert block["input"] == {"INVALID_JSON": '{"expression": '}
    assert [(t.parent, t.malformed_tool_calls, t.untrainable) for t in turns] == [
        (None, 1, None),
        (None, 1, None),
        (1, 0, None),
    ]
    assert "Error: no JSON" in chat_format.decode(turns[2].completion.prompt_ids)


async def test_errors_are_in_anthropics_shape_and_words(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format), context_length=200)
    session = gateway.open(TRAINING)
    long = {"role": "user", "content": "word " * 500}
    overflow = await ask(session, messages=[long], max_tokens=9, stream=True)
    counted = await ask(session, "/v1/messages/count_tokens", messages=[long])
    twice = await ask(session, "/v1/v1/messages/", messages=5)
    missing = await ask(session, "/v1/messages/batches", messages=[ASKED])
    await gateway.close(session.id)
    closed = await ask(session, messages=[ASKED])
    await gateway.stop()
    tokens = len(chat_format.render([long]))
    message = f"prompt is too long: {tokens} tokens > 200 maximum"
    assert counted == (200, {"input_tokens": tokens})
    error = {"type": "invalid_request_error", "message": message}
    assert overflow == (400, {"type": "error", "error": error})
    assert (twice[0], twice[1]["error"]["message"]) == (400, "messages is 5; expected an array")
    assert (missing[0], missing[1]["error"]["type"]) == (404, "not_found_error")
    assert "/v1/messages" in missing[1]["error"]["message"]
    assert (closed[0], closed[1]["error"]["type"]) == (410, "permission_error")


def parse(**body: Any) -> Any:
    return AnthropicMessages().parse({"messages": [ASKED], **body}, ReplyMemory())


def test_results_of_tools_are_messages_of_their_own_and_neighbours_of_the_assistants_are_one() -> None:
    image = {"type": "image", "source": {}}
    messages: list[Mapping[str, Any]] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": [{"type": "text", "text": "So."}]},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "5"}, image]},
                {"type": "text", "text": "And?"},
                {"type": "text", "text": "Go on."},
            ],
        },
    ]
    asked, said, result, more = parse(messages=messages).chat.messages
    assert (asked.text, said.text, [call.id for call in said.tool_calls]) == ("?", "So.", ["a"])
    assert (result.role, result.tool_call_id) == ("tool", "a")
    assert result.text == "5\n[image: not shown, for this model reads text alone]"
    assert (more.role, more.text) == ("user", "And?\nGo on.")


def test_a_vendors_own_tools_are_left_out_and_counted() -> None:
    request = parse(tools=[TOOL, {"type": "web_search_20250305", "name": "web_search"}], thinking={"type": "enabled"})
    assert [tool["function"]["name"] for tool in request.chat.tools] == ["calculator"]
    assert request.ignored == ("thinking", "tools")


@pytest.mark.parametrize(
    ("choice", "calls", "allowed"),
    [
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", None),
        ({"type": "none"}, "none", None),
        ({"type": "any"}, "required", None),
        ({"type": "tool", "name": "calculator"}, "required", {"calculator"}),
    ],
)
def test_tool_choices_are_read(choice: dict[str, Any], calls: str, allowed: set[str] | None) -> None:
    chat = parse(tools=[TOOL], tool_choice=choice).chat
    assert (chat.calls, chat.allowed) == (calls, allowed)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"messages": []}, "messages is []; expected at least one message"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role is 'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is None"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type is 'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id is None"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use"}]}]},
            "messages[0].content[0].name is None",
        ),
        ({"system": 5}, "system is 5; expected a string or an array"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name is None"),
        ({"tool_choice": "auto"}, "tool_choice is 'auto'; expected an object"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type is 'some'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice is 'required'; expected none or auto where no tools are sent"),
    ],
)
async def test_a_bad_body_is_told_by_field(chat_format: ChatFormat, body: Any, says: str) -> None:
    gateway = await started(ScriptedSampler(chat_format))
    status, answer = await ask(gateway.open(TRAINING), **{"messages": [ASKED], **body})
    await gateway.stop()
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"
    assert says in answer["error"]["message"]

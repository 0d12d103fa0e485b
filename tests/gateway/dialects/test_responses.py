"""OpenAI's Responses, as the real OpenAI client sees them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import openai
import pytest

from forgejax.chat import ChatFormat
from forgejax.gateway.dialects.responses import Responses
from forgejax.gateway.memory import ReplyMemory
from forgejax.types import Session
from tests.chat.tokenizers import CALCULATOR
from tests.gateway.asking import assert_chain, client
from tests.gateway.fakes import TRAINING, ScriptedSampler, started

TOOL: dict[str, Any] = {"type": "function", **CALCULATOR["function"]}
PATCH: dict[str, Any] = {
    "type": "custom",
    "name": "patch",
    "description": "Edits a file.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}
THOUGHT = "<think>\nI add.\n</think>\n\nLet me see.\n"
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "2+3"}}\n</tool_call><|im_end|>'
CUSTOM = (
    '<tool_call>\n{"name": "patch", "arguments": {"input": "*** a\\n\\ud83d\\ude00\\u00e9"}}\n</tool_call><|im_end|>'
)
END = "It is 5.<|im_end|>"


async def collect(stream: AsyncIterator[Any]) -> tuple[list[str], Any]:
    """The kinds of events and the last response. Deltas joined are what was done, and events are numbered."""
    kinds: list[str] = []
    drawn: dict[tuple[str, str], str] = {}
    items: dict[int, Any] = {}
    response = None
    async for event in stream:
        assert event.sequence_number == len(kinds)
        kinds.append(event.type)
        family, _, state = event.type.rpartition(".")
        if state == "delta":
            assert event.item_id == items[event.output_index].id
            drawn[family, event.item_id] = drawn.get((family, event.item_id), "") + event.delta
        elif event.type == "response.output_item.added":
            items[event.output_index] = event.item
        elif event.type == "response.output_item.done":
            assert event.item.id == items[event.output_index].id
            items[event.output_index] = event.item
        elif state == "done" and family != "response.content_part":
            whole = [getattr(event, name) for name in ("text", "arguments", "input") if hasattr(event, name)]
            assert drawn.get((family, event.item_id), "") == whole[0]
        response = getattr(event, "response", response)
    assert response is not None and [items[index] for index in sorted(items)] == response.output
    return kinds, response


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("keep", ["previous_response_id", "items", "items without the thought"])
async def test_an_episode_is_a_chain_of_turns_however_the_agent_keeps_it(
    chat_format: ChatFormat, keep: str, stream: bool
) -> None:
    sampler = ScriptedSampler(chat_format, THOUGHT + CALL, THOUGHT + CUSTOM, END)
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    outputs = []
    async with client(session) as agent:
        history: list[Any] = [{"role": "user", "content": "What is 2+3?"}]
        body: dict[str, Any] = {"model": "m", "tools": [TOOL, PATCH], "instructions": "Be brief.", "stream": stream}
        body["store"] = keep == "previous_response_id"
        for _ in range(3):
            answer: Any = await agent.responses.create(input=history, **body)
            response = (await collect(answer))[1] if stream else answer
            assert response.status == "completed"
            outputs.append(response.output)
            results = [
                {"type": f"{item.type}_output", "call_id": item.call_id, "output": "5"}
                for item in response.output
                if item.type in ("function_call", "custom_tool_call")
            ]
            if keep == "previous_response_id":
                body["previous_response_id"] = response.id
                history = results
            else:
                items = [item.model_dump(exclude_none=True) for item in response.output]
                for item in items:
                    if keep == "items without the thought" and item["type"] == "reasoning":
                        del item["content"]
                history = [*history, *items, *results]
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert_chain(turns, sampler)
    assert [[item.type for item in output] for output in outputs] == [
        ["reasoning", "message", "function_call"],
        ["reasoning", "message", "custom_tool_call"],
        ["message"],
    ]
    reasoning, message, call = outputs[0]
    assert (reasoning.content[0].text, message.content[0].text) == ("I add.", "Let me see.")
    assert (call.name, json.loads(call.arguments)) == ("calculator", {"expression": "2+3"})
    assert outputs[1][2].input == "*** a\n😀é"
    prompt = chat_format.codec._tokenizer.decode(turns[0].completion.prompt_ids.tolist(), skip_special_tokens=False)
    assert "Be brief." in prompt and "lark grammar" in prompt


async def test_the_events_of_a_reply_are_those_of_the_api(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format, THOUGHT + CALL))
    async with client(gateway.open(TRAINING)) as agent:
        tools: Any = [TOOL]
        stream: Any = await agent.responses.create(model="m", input="?", tools=tools, stream=True)
        kinds, response = await collect(stream)
    await gateway.stop()
    once = [kind.removeprefix("response.") for at, kind in enumerate(kinds) if kinds[at - 1 : at] != [kind]]
    assert once == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert kinds.count("response.function_call_arguments.delta") > 5
    assert response.usage.output_tokens_details.reasoning_tokens > 3 and response.usage.input_tokens > 50


async def test_the_clients_own_accumulation_of_a_stream_is_the_whole_reply(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format, THOUGHT + CALL))
    async with client(gateway.open(TRAINING)) as agent:
        tools: Any = [TOOL]
        async with agent.responses.stream(model="m", input="What is 2+3?", tools=tools) as stream:
            final = await stream.get_final_response()
    await gateway.stop()
    assert final.output_text == "Let me see." and final.output[2].type == "function_call"


async def ask_raw(session: Session, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {session.api_key}"}
    url = f"{session.base_url}{path}"
    async with aiohttp.ClientSession() as http, http.request(method, url, json=body, headers=headers) as response:
        return response.status, await response.json()


async def test_a_stored_response_is_shown_and_deleted_and_another_is_not_found(chat_format: ChatFormat) -> None:
    sampler = ScriptedSampler(chat_format, *[END] * 4)
    gateway = await started(sampler)
    session, other = gateway.open(TRAINING), gateway.open(TRAINING)
    async with client(session) as agent, client(other) as stranger:
        kept = await agent.responses.create(model="m", input="?")
        dropped = await agent.responses.create(model="m", input="??", store=False)
        assert (await agent.responses.retrieve(kept.id)).output == kept.output
        for asking, id_ in ((stranger, kept.id), (agent, dropped.id)):
            with pytest.raises(openai.NotFoundError, match="not found"):
                await asking.responses.retrieve(id_)
            with pytest.raises(openai.BadRequestError) as refused:
                await asking.responses.create(model="m", input="?", previous_response_id=id_)
            assert refused.value.code == "previous_response_not_found"
        referred: Any = [{"role": "user", "content": "?"}, {"type": "item_reference", "id": kept.output[0].id}]
        referred.append({"role": "user", "content": "And?"})
        await agent.responses.create(model="m", input=referred)
        await agent.responses.delete(kept.id)
        with pytest.raises(openai.NotFoundError):
            await agent.responses.delete(kept.id)
        counted = await ask_raw(session, "POST", "/responses/input_tokens", {"input": "?"})
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert [turn.parent for turn in turns] == [None, None, 0]
    assert counted == (200, {"object": "response.input_tokens", "input_tokens": len(turns[0].completion.prompt_ids)})


async def test_calls_torn_apart_by_their_results_are_one_turn(chat_format: ChatFormat) -> None:
    sampler = ScriptedSampler(chat_format, CALL.replace("<|im_end|>", "") + CALL, END)
    gateway = await started(sampler)
    session = gateway.open(TRAINING)
    async with client(session) as agent:
        tools: Any = [TOOL]
        history: list[Any] = [{"role": "user", "content": "What is 2+3?"}]
        first = await agent.responses.create(model="m", input=history, tools=tools, store=False)
        for item in first.output:
            assert item.type == "function_call"
            history.append(item.model_dump(exclude_none=True))
            history.append({"type": "function_call_output", "call_id": item.call_id, "output": "5"})
        await agent.responses.create(model="m", input=history, tools=tools, store=False)
    turns = await gateway.close(session.id)
    await gateway.stop()
    assert_chain(turns, sampler)


async def test_a_reply_cut_by_a_limit_is_incomplete_and_an_overflow_is_told_in_the_stream(
    chat_format: ChatFormat,
) -> None:
    gateway = await started(ScriptedSampler(chat_format, END), context_length=200)
    async with client(gateway.open(TRAINING)) as agent:
        cut = await agent.responses.create(model="m", input="?", max_output_tokens=2)
        stream: Any = await agent.responses.create(model="m", input="word " * 500, stream=True)
        kinds, failed = await collect(stream)
        with pytest.raises(openai.BadRequestError, match="maximum context length is 200 tokens") as refused:
            await agent.responses.create(model="m", input="word " * 500)
    await gateway.stop()
    assert (cut.status, cut.incomplete_details and cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert kinds == ["response.created", "response.in_progress", "response.failed"]
    assert failed.error.code == refused.value.code == "context_length_exceeded"


def parse(body: Mapping[str, Any]) -> Any:
    return Responses().parse(body, ReplyMemory())


def test_a_vendors_own_tools_are_left_out_and_counted_and_namespaces_are_opened() -> None:
    nested = {"type": "namespace", "name": "math", "description": "", "tools": [TOOL]}
    request = parse({"input": "?", "tools": [{"type": "web_search"}, nested, PATCH], "reasoning": {"effort": "low"}})
    assert [tool["function"]["name"] for tool in request.chat.tools] == ["calculator", "patch"]
    assert request.ignored == ("reasoning", "tools")


@pytest.mark.parametrize(
    ("choice", "calls", "allowed"),
    [
        ("none", "none", None),
        ("required", "required", None),
        ({"type": "function", "name": "calculator"}, "required", {"calculator"}),
        ({"type": "custom", "name": "patch"}, "required", {"patch"}),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"name": "patch"}]}, "auto", {"patch"}),
    ],
)
def test_tool_choices_are_read(choice: Any, calls: str, allowed: set[str] | None) -> None:
    chat = parse({"input": "?", "tools": [TOOL, PATCH], "tool_choice": choice}).chat
    assert (chat.calls, chat.allowed) == (calls, allowed)


def test_what_another_vendors_history_holds_is_kept_as_text() -> None:
    search = {"type": "web_search_call", "id": "ws_1", "status": "completed"}
    request = parse({"input": [{"role": "user", "content": [{"type": "input_text", "text": "?"}]}, search]})
    assert [message.role for message in request.chat.messages] == ["user", "assistant"]
    assert json.loads(request.chat.messages[1].text) == search


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "input is None; expected an array"),
        ({"input": []}, "input is []; expected a string or at least one item"),
        ({"input": [5]}, "input[0] is 5; expected an object"),
        ({"input": [{"role": "wizard", "content": ""}]}, "input[0].role is 'wizard'"),
        ({"input": [{"type": 5}]}, "input[0].type is 5"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id is None"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type is"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "Item with id 'x' not found"),
        ({"input": "?", "background": True}, "background is True"),
        ({"input": [], "tools": [{"type": {}}]}, "input is []"),
        ({"input": "?", "tool_choice": {"type": "allowed_tools", "mode": [], "tools": []}}, "tool_choice is []"),
        ({"input": "?", "conversation": "c"}, "conversation is 'c'"),
        ({"input": "?", "tool_choice": {"type": "function", "name": "f"}}, "tool_choice is ['f']; expected names of"),
        ({"input": "?", "max_output_tokens": 0}, "max_output_tokens is 0"),
        ({"input": "?", "tools": [{"type": "custom"}]}, "tools[0].name is None"),
    ],
)
async def test_a_bad_body_is_told_by_field_in_openais_shape(chat_format: ChatFormat, body: Any, says: str) -> None:
    gateway = await started(ScriptedSampler(chat_format))
    status, answer = await ask_raw(gateway.open(TRAINING), "POST", "/responses", body)
    await gateway.stop()
    assert status in (400, 404) and says in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"

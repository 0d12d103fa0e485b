"""The example agent, as a program, against a small chat-completions server."""

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from examples.quickstart.agent import evaluate
from examples.quickstart.demonstrations import describe_agent, write_messages
from forgejax.agents import AgentConfig, EpisodeSpec, make_scaffold
from forgejax.types import StopReason, Task
from tests.agents.fakes import CALCULATOR

PROGRAM = (sys.executable, str(CALCULATOR))
FAST = {"CALCULATOR_LATENCY_S": "0"}


def call_calculator(arguments: str) -> dict[str, Any]:
    call = {"id": "call_0", "type": "function", "function": {"name": "calculator", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


@asynccontextmanager
async def model(reply: Any) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """A server whose next assistant message is ``reply(messages)``; gives its URL and the requests it got."""
    requests: list[dict[str, Any]] = []

    async def complete(request: web.Request) -> web.Response:
        body = await request.json()
        requests.append(body | {"key": request.headers["Authorization"]})
        message, finish_reason = reply(body["messages"])
        if finish_reason == "refused":
            error = {"message": "too long", "type": "invalid_request_error", "code": "context_length_exceeded"}
            return web.json_response({"error": error}, status=400)
        choice = {"index": 0, "message": message, "finish_reason": finish_reason}
        return web.json_response(
            {"id": "c", "object": "chat.completion", "model": "m", "created": 0, "choices": [choice]}
        )

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1", requests
    finally:
        await runner.cleanup()


def use_tool_once(messages: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """Asks the calculator, then says what it said."""
    if messages[-1]["role"] == "user":
        return call_calculator(json.dumps({"expression": messages[-1]["content"]})), "tool_calls"
    return {"role": "assistant", "content": messages[-1]["content"]}, "stop"


@pytest.mark.parametrize("kind", ["worker", "process"])
async def test_it_answers_through_its_tool_in_both_modes(kind: Any) -> None:
    command = (*PROGRAM, "--worker") if kind == "worker" else PROGRAM
    scaffold = make_scaffold(AgentConfig(kind=kind, command=command, env=FAST))
    async with model(use_tool_once) as (url, requests):
        await scaffold.start()
        episode = EpisodeSpec(
            id="e",
            question="12 * 34",
            base_url=url,
            api_key="secret",
            model="policy",
            context_length=4096,
            deadline_s=20.0,
        )
        result = await scaffold.run(episode)
        await scaffold.close()
    assert (result.answer, result.error) == ("408", None)
    assert {request["key"] for request in requests} == {"Bearer secret"}
    assert [len(request["messages"]) for request in requests] == [2, 4]


async def test_a_demonstration_is_what_the_agent_exchanges() -> None:
    """The messages of a real episode, and those built for the warm start, are equal to the last field."""
    agent = describe_agent((*PROGRAM, "--describe"))
    task = Task(id="t", family="f", level="l", question="12 * 34", payload={"answer": "408"})
    expected = write_messages(task, "408", use_tool=True, agent=agent)
    scaffold = make_scaffold(AgentConfig(command=(*PROGRAM, "--worker"), env=FAST))
    async with model(use_tool_once) as (url, requests):
        await scaffold.start()
        await scaffold.run(
            EpisodeSpec(
                id="e",
                question=task.question,
                base_url=url,
                api_key="k",
                model="policy",
                context_length=4096,
                deadline_s=20.0,
            )
        )
        await scaffold.close()
    assert requests[-1]["messages"] == expected[:-1]
    assert requests[-1]["tools"] == list(agent.tools)


async def test_a_worker_survives_what_a_model_or_server_may_do() -> None:
    def answer(messages: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
        question = messages[1]["content"]
        if question == "loop":
            return call_calculator("{}"), "tool_calls"
        if question == "long":
            return {}, "refused"
        if question == "cut":
            return {"role": "assistant", "content": "1234567"}, "length"
        return {"role": "assistant", "content": None}, "stop"

    scaffold = make_scaffold(AgentConfig(command=(*PROGRAM, "--worker"), env=FAST | {"CALCULATOR_MAX_TURNS": "2"}))
    async with model(answer) as (url, requests):
        await scaffold.start()
        for question in ("loop", "cut", "empty"):
            result = await scaffold.run(
                EpisodeSpec(
                    id=question,
                    question=question,
                    base_url=url,
                    api_key="k",
                    model="policy",
                    context_length=4096,
                    deadline_s=20,
                )
            )
            assert (result.answer, result.error) == (None, None)
        assert requests[1]["messages"][-1]["content"] == "error: 'expression'"
        gone = EpisodeSpec(
            id="g",
            question="?",
            base_url="http://127.0.0.1:1/v1",
            api_key="k",
            model="policy",
            context_length=4096,
            deadline_s=20.0,
        )
        assert (await scaffold.run(gone)).stop_reason is StopReason.ENVIRONMENT_FAILED
        long = EpisodeSpec(
            id="l", question="long", base_url=url, api_key="k", model="policy", context_length=4096, deadline_s=20.0
        )
        assert (await scaffold.run(long)).stop_reason is StopReason.TRUNCATED
        await scaffold.close()


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("123456789 * 987654321", "121932631112635269"),
        ("-(2 + 3) * 4 - -1", "-19"),
        ("10 / 4", "2.5"),
        ("10 / 5", "2"),
        ("7 // 2 + 7 % 4", "6"),
    ],
)
def test_the_calculator_is_exact(expression: str, value: str) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "2 ** 99",
        "__import__('os')",
        "1 / 0",
        "1 +",
        "",
        "True",
        "9" * 201,
        "*".join(["9" * 30] * 6),
        "(" * 150,
        "x",
        "'a'",
    ],
)
def test_the_calculator_refuses_everything_else(expression: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        evaluate(expression)

"""The number agent, as a program and as a function."""

import json
import sys
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from examples.agents.number_agent import last_number
from forgejax.agents import AgentConfig, EpisodeSpec, make_scaffold

NUMBER_AGENT = Path(__file__).parents[3] / "examples" / "agents" / "number_agent.py"


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("The answer is 18.", "18"),
        ("10 - 12 = -2", "-2"),
        ("It is 1,234,567 exactly", "1234567"),
        ("about 2.50", "2.50"),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_reply_is_the_answer(reply: str, number: str | None) -> None:
    assert last_number(reply) == number


@pytest.mark.parametrize(("finish_reason", "answer"), [("stop", "7"), ("length", None)])
async def test_a_reply_that_was_cut_off_is_no_answer(finish_reason: str, answer: str | None) -> None:
    asked = []

    async def complete(request: web.Request) -> web.Response:
        asked.append(await request.json())
        message = {"role": "assistant", "content": "3 + 4 = 7"}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason}
        return web.json_response(
            {"id": "c", "object": "chat.completion", "created": 0, "model": "policy", "choices": [choice]}
        )

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    config = AgentConfig(
        kind="worker",
        command=(sys.executable, str(NUMBER_AGENT), "--worker"),
        env={"NUMBER_MAX_TOKENS": "5", "NUMBER_SYSTEM": "Be brief."},
    )
    scaffold = make_scaffold(config)
    async with TestServer(app) as server:
        await scaffold.start()
        try:
            url = str(server.make_url("/v1"))
            episode = EpisodeSpec(
                id="e",
                question="What is 3 + 4?",
                base_url=url,
                api_key="k",
                model="policy",
                context_length=4096,
                deadline_s=20.0,
            )
            result = await scaffold.run(episode)
        finally:
            await scaffold.close()
    assert result.answer == answer
    assert asked[0]["max_tokens"] == 5
    assert [each["content"] for each in asked[0]["messages"]] == ["Be brief.", "What is 3 + 4?"], json.dumps(asked)

"""A gateway that stands alone: keys are sessions, and its owner sees what was recorded of them."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from forgejax.chat import ChatFormat
from forgejax.errors import ConfigError, EngineError
from forgejax.gateway import Gateway, GatewayConfig
from forgejax.gateway.walk_in import StandAlone
from forgejax.types import SamplingLaw, SessionSpec
from tests.gateway.fakes import ScriptedSampler

ASK: Any = {"model": "m", "messages": [{"role": "user", "content": "?"}]}
OWNER = "owner-token"


async def look() -> dict[str, int]:
    return {"context_length": 4096}


async def alone(chat_format: ChatFormat, **rules: Any) -> tuple[Gateway, ScriptedSampler]:
    sampler = ScriptedSampler(chat_format, *["five<|im_end|>"] * 20)
    given = StandAlone(**{"admin_token": OWNER, "look": look, **rules})
    gateway = Gateway(sampler, chat_format, 4096, GatewayConfig(port=0), alone=given)
    await gateway.start()
    return gateway, sampler


async def ask(gateway: Gateway, key: str | None, body: Any = ASK) -> tuple[int, Any]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    url = f"{gateway.url}/v1/chat/completions"
    async with aiohttp.ClientSession(headers=headers) as http, http.post(url, json=body) as response:
        return response.status, await response.json()


async def page(gateway: Gateway, method: str, path: str, key: str = OWNER, body: Any = None) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {key}"}
    url = f"{gateway.url}{path}"
    async with aiohttp.ClientSession(headers=headers) as http, http.request(method, url, json=body) as response:
        return response.status, await response.json()


async def test_each_key_is_a_session_of_its_own_and_can_be_read_and_closed(chat_format: ChatFormat) -> None:
    gateway, sampler = await alone(chat_format, spec=SessionSpec(law=SamplingLaw(temperature=0.5)))
    reply = (await ask(gateway, "one"))[1]["choices"][0]["message"]
    follow = [*ASK["messages"], reply, {"role": "user", "content": "and?"}]
    await ask(gateway, "one", {**ASK, "messages": follow})
    await ask(gateway, "two")
    status, listed = await page(gateway, "GET", "/sessions")
    ids = {each["name"]: each["id"] for each in listed["sessions"]}
    shown = (await page(gateway, "GET", f"/sessions/{ids['one']}"))[1]
    closed = (await page(gateway, "DELETE", f"/sessions/{ids['one']}"))[1]
    gone = await page(gateway, "GET", f"/sessions/{ids['one']}")
    again = await ask(gateway, "one")  # opens another
    listed_again = (await page(gateway, "GET", "/sessions"))[1]["sessions"]
    await gateway.stop()

    assert status == 200 and [each["turns"] for each in listed["sessions"]] == [2, 1]
    assert shown | {"open": False} == closed and gone[0] == 404
    assert again[0] == 200 and {each["name"]: each["turns"] for each in listed_again} == {"one": 1, "two": 1}
    first, second = shown["turns"]
    one, two = sampler.returned[:2]
    assert (first["parent"], first["branch"], second["parent"], second["branch"]) == (None, None, 0, None)
    assert first["prompt_ids"] == one.prompt_ids.tolist() and first["token_ids"] == one.token_ids.tolist()
    assert first["logprobs"] == one.logprobs.tolist() and first["versions"] == [3] * len(one.token_ids)
    assert first["prompt_ids"] + first["token_ids"] + second["prompt_ids"] == two.prompt_ids.tolist()
    assert sampler.requests[0].law.temperature == 0.5 and second["prompt_tokens"] == len(two.prompt_ids)


async def test_with_a_token_keys_are_it_or_begin_with_it(chat_format: ChatFormat) -> None:
    gateway, _ = await alone(chat_format, token="secret")
    found = [(await ask(gateway, key))[0] for key in ("secret", "secret-a", "secretly", "secre", "other", None)]
    names = [each["name"] for each in (await page(gateway, "GET", "/sessions"))[1]["sessions"]]
    await gateway.stop()
    assert found == [200, 200, 401, 401, 401, 401] and names == ["secret", "a"]


async def test_sessions_are_opened_under_a_key_of_ones_own_or_a_new_one(chat_format: ChatFormat) -> None:
    gateway, sampler = await alone(chat_format, token="secret")
    law = {"temperature": 2.0}
    status, opened = await page(gateway, "POST", "/sessions", body={"seed": 3, "law": law, "purpose": "train"})
    named = (await page(gateway, "POST", "/sessions", body={"key": "mine"}))[1]
    taken = await page(gateway, "POST", "/sessions", body={"key": "mine"})
    wrong = await page(gateway, "POST", "/sessions", body={"sed": 3})
    answers = [(await ask(gateway, key))[0] for key in (opened["api_key"], "mine")]
    await gateway.stop()
    assert (status, opened["base_url"].startswith("http://127.0.0.1:")) == (201, True)
    assert named["api_key"] == "mine" and taken[0] == 409 and answers == [200, 200]
    assert wrong[0] == 400 and "sed" in wrong[1]["error"]["message"]
    assert (sampler.requests[0].law.temperature, sampler.requests[0].purpose) == (2.0, "train")


@pytest.mark.parametrize(("method", "path"), [("GET", "/sessions"), ("POST", "/sessions"), ("DELETE", "/sessions/x")])
async def test_nobody_but_the_owner_sees_the_pages(chat_format: ChatFormat, method: str, path: str) -> None:
    gateway, _ = await alone(chat_format)
    assert (await page(gateway, method, path, key="anyone", body={}))[0] == 401
    await gateway.stop()


async def test_where_no_more_may_be_open_idle_ones_make_room(chat_format: ChatFormat) -> None:
    busy, _ = await alone(chat_format, most=2)
    found = [await ask(busy, key) for key in ("a", "b", "c", "a")]
    await busy.stop()
    idle, _ = await alone(chat_format, most=2, idle_s=1e-6)
    roomy = [(await ask(idle, key))[0] for key in ("a", "b", "c", "a")]
    counts = (await page(idle, "GET", "/sessions"))[1]["sessions"]
    await idle.stop()
    assert [status for status, _ in found] == [200, 200, 429, 200]
    assert "2 sessions are open; close one" in found[2][1]["error"]["message"]
    assert roomy == [200] * 4 and len(counts) == 2


async def test_it_is_ready_once_its_engine_is(chat_format: ChatFormat) -> None:
    there = False

    async def look_again() -> dict[str, int]:
        if not there:
            raise EngineError("no answer")
        return {"context_length": 4096}

    gateway, _ = await alone(chat_format, look=look_again)
    down = await page(gateway, "GET", "/ready")
    there = True
    up = await page(gateway, "GET", "/ready")
    await gateway.stop()
    assert down[0] == 503 and "the engine is not there: no answer" in down[1]["error"]["message"]
    assert up == (200, {"status": "ok", "engine": {"context_length": 4096}})


@pytest.mark.parametrize("rules", [{"most": 0}, {"idle_s": 0.0}, {"idle_s": float("inf")}, {"token": ""}])
def test_rules_that_cannot_be_kept_are_refused(rules: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="give"):
        StandAlone(**{"admin_token": OWNER, "look": look, **rules})

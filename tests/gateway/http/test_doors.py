"""The doors agents try: spellings of paths, models, preflights, and the words for those who knock elsewhere."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import pytest

from forgejax.chat import ChatFormat
from forgejax.types import Completion, OnTokens, SampleRequest
from tests.gateway.asking import GOOD
from tests.gateway.fakes import TRAINING, ScriptedSampler, started


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions/", "/v1/v1/chat/completions"])
@pytest.mark.parametrize("header", ["Authorization", "x-api-key", "api-key"])
async def test_a_path_is_found_and_a_key_seen_however_it_is_spelled(
    chat_format: ChatFormat, path: str, header: str
) -> None:
    gateway = await started(ScriptedSampler(chat_format, "5<|im_end|>"))
    key = gateway.open(TRAINING).api_key
    headers = {header: f"Bearer {key}" if header == "Authorization" else key}
    async with aiohttp.request("POST", gateway.url + path, json=GOOD, headers=headers) as response:
        assert response.status == 200
        assert response.headers["Access-Control-Allow-Origin"] == "*"
    counts = gateway.metrics.counts()
    await gateway.stop()
    assert counts["requests_chat_completions_200"] == 1


async def test_models_tell_the_context_length_and_browsers_may_ask(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format), 1234, model_name="tiny")
    async with aiohttp.ClientSession() as http:
        model = await (await http.get(gateway.url + "/v1/models/org/tiny/")).json()
        listed = await (await http.get(gateway.url + "/models")).json()
        preflight = await http.options(gateway.url + "/v1/messages")
        assert (await http.head(gateway.url + "/v1/models")).status == 200
    await gateway.stop()
    assert (model["id"], model["context_length"], model["max_model_len"]) == ("org/tiny", 1234, 1234)
    assert [each["id"] for each in listed["data"]] == ["tiny"]
    assert preflight.status == 204 and "POST" in preflight.headers["Access-Control-Allow-Methods"]


async def test_whoever_knocks_elsewhere_hears_what_is_served_and_is_counted(chat_format: ChatFormat) -> None:
    gateway = await started(ScriptedSampler(chat_format))
    async with aiohttp.request("POST", gateway.url + "/v1/completions", json={}) as response:
        status, error = response.status, (await response.json())["error"]
    counts = gateway.metrics.counts()
    await gateway.stop()
    assert status == 404 and "/v1/chat/completions, /v1/responses, /v1/messages" in error["message"]
    assert counts["requests_none_404"] == 1


class BuggySampler(ScriptedSampler):
    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        if on_tokens is not None:
            on_tokens([70])
        raise RuntimeError("a bug")


@pytest.mark.parametrize(
    ("path", "body", "first"),
    [
        ("/v1/chat/completions", GOOD, "data: "),
        ("/v1/responses", {"input": "?"}, "event: response.created"),
        ("/v1/messages", GOOD, "event: message_start"),
    ],
)
async def test_a_bug_is_a_500_in_the_dialects_shape_and_an_event_within_a_stream(
    chat_format: ChatFormat, path: str, body: dict[str, Any], first: str, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = await started(BuggySampler(chat_format))
    headers = {"x-api-key": gateway.open(TRAINING).api_key}
    async with aiohttp.ClientSession(headers=headers) as http:
        whole = await http.post(gateway.url + path, json=body)
        error = (await whole.json())["error"]
        stream = await (await http.post(gateway.url + path, json={**body, "stream": True})).text()
    counts = gateway.metrics.counts()
    await gateway.stop()
    assert whole.status == 500 and error["message"] == "the gateway failed; its log says why"
    assert stream.startswith(first) and json.dumps(error["message"]) in stream
    assert {count for name, count in counts.items() if name.startswith("requests_") and "500" in name} == {1}
    assert "a bug" in caplog.text

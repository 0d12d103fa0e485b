"""Other people's servers of tokens, as their documentation says they answer: what is asked, and what is made of it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from forgejax.errors import EngineError
from forgejax.rollout.clients.base import ServerFacts, TokenServer
from forgejax.rollout.clients.own import ServeClient
from forgejax.rollout.clients.sglang import SglangClient
from forgejax.rollout.clients.vllm import VllmClient
from forgejax.types import FinishReason, SampleRequest, SamplingLaw
from tests.rollout.serving import served

REQUEST = SampleRequest(
    request_id="s-0", prompt_ids=np.array([1, 2, 3], np.int32), max_tokens=8, stop_ids=frozenset({9}), seed=5
)
DRAWN = [(7, -0.5), (8, -0.25), (9, -1.5)]


async def answer_events(http: web.Request, events: list[Any]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(http)
    for event in events:
        data = event if isinstance(event, str) else json.dumps(event)
        await response.write(f"data: {data}\n\n".encode())
    return response


class FakeSglang:
    """``/generate`` of SGLang: chunks of all tokens so far, or of the new ones alone."""

    def __init__(self, *, incremental: bool = False, last: Any = None, end: bool = True) -> None:
        self.incremental, self.end = incremental, end
        self.finish = {"type": "stop", "matched": 9} if last is None else last
        self.bodies: list[Any] = []

    def make_app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/generate", self.generate)
        app.router.add_get("/get_server_info", self.info)
        return app

    async def info(self, _: web.Request) -> web.Response:
        return web.json_response({"context_length": None, "max_req_input_len": 4090})

    async def generate(self, http: web.Request) -> web.StreamResponse:
        self.bodies.append(await http.json())
        events: list[Any] = []
        for count in (1, 3):
            first = (count - 2 if count > 1 else 0) if self.incremental else 0
            items = [[logprob, id_, None] for id_, logprob in DRAWN[first:count]]
            meta = {
                "id": "s-0",
                "finish_reason": self.finish if count == 3 else None,
                "prompt_tokens": 3,
                "completion_tokens": count,
                "cached_tokens": 2,
                "weight_version": "4",
                "output_token_logprobs": items,
            }
            events.append({"text": "", "output_ids": [id_ for _, id_, _ in items], "meta_info": meta})
        return await answer_events(http, [*events, *(["[DONE]"] if self.end else [])])


class FakeVllm:
    """``/v1/completions`` of vLLM, streamed, with token ids."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []

    def make_app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_get("/v1/models", self.models)
        return app

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "org/model", "max_model_len": 2048}]})

    async def complete(self, http: web.Request) -> web.StreamResponse:
        self.bodies.append(await http.json())
        events: list[Any] = []
        for drawn in (DRAWN[:1], DRAWN[1:]):
            last = drawn[-1][0] == 9
            choice = {
                "index": 0,
                "text": "",
                "token_ids": [id_ for id_, _ in drawn],
                "logprobs": {"tokens": [""] * len(drawn), "token_logprobs": [value for _, value in drawn]},
                "finish_reason": "stop" if last else None,
                "stop_reason": 9 if last else None,
            }
            events.append({"id": "cmpl-1", "choices": [choice]})
        usage = {"prompt_tokens": 3, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
        return await answer_events(http, [*events, {"id": "cmpl-1", "choices": [], "usage": usage}, "[DONE]"])


@pytest.mark.parametrize("kind", ["sglang", "sglang, incremental", "vllm"])
async def test_every_token_comes_once_with_its_log_probability_while_it_is_drawn(kind: str) -> None:
    fake: FakeSglang | FakeVllm = FakeVllm() if kind == "vllm" else FakeSglang(incremental="incremental" in kind)
    runs: list[list[int]] = []
    async with served(fake.make_app()) as url:
        client: TokenServer = VllmClient(url) if kind == "vllm" else SglangClient(url)
        async with client:
            facts = await client.look()
            completion = await client.sample(REQUEST, lambda ids: runs.append(list(ids)))
    assert runs == [[7], [8, 9]]
    assert (completion.token_ids.tolist(), completion.logprobs.tolist()) == ([7, 8, 9], [-0.5, -0.25, -1.5])
    assert completion.token_ids.dtype == np.int32 and completion.logprobs.dtype == np.float32
    assert completion.versions.tolist() == completion.oldest_versions.tolist() == [0 if kind == "vllm" else 4] * 3
    assert (completion.finish_reason, completion.cached_tokens) == (FinishReason.STOP, 2)
    assert facts == ServerFacts(context_length=2048 if kind == "vllm" else 4090)
    (body,) = fake.bodies
    asked = body if kind == "vllm" else body["sampling_params"]
    assert body["prompt" if kind == "vllm" else "input_ids"] == [1, 2, 3]
    assert asked["max_tokens" if kind == "vllm" else "max_new_tokens"] == 8 and asked["stop_token_ids"] == [9]
    assert (asked["temperature"], asked["top_p"], asked["top_k"]) == (1.0, 1.0, 0 if kind == "vllm" else -1)
    assert asked["seed" if kind == "vllm" else "sampling_seed"] == 5 and body["stream"] is True


@pytest.mark.parametrize("kind", [SglangClient, VllmClient])
async def test_whoever_wants_no_more_has_what_was_drawn_by_then(kind: Any) -> None:
    fake: FakeSglang | FakeVllm = FakeVllm() if kind is VllmClient else FakeSglang()
    async with served(fake.make_app()) as url, kind(url) as client:
        completion = await client.sample(REQUEST, lambda ids: True)
    assert (completion.token_ids.tolist(), completion.finish_reason) == ([7], FinishReason.STOP)


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        (FakeSglang(end=False), "closed its answer before the end; ask again"),
        (FakeSglang(last={"type": "abort", "message": "out of memory"}), "ended it as 'abort': out of memory"),
    ],
)
async def test_an_answer_that_breaks_off_is_an_error(fake: FakeSglang, words: str) -> None:
    async with served(fake.make_app()) as url, SglangClient(url) as client:
        with pytest.raises(EngineError, match=words):
            await client.sample(REQUEST)


@pytest.mark.parametrize(
    ("event", "words"),
    [
        ({"error": {"message": "too long"}}, "the server says .*too long"),
        ({"meta_info": {"completion_tokens": 1}}, r"unreadable answer .*KeyError\('output_token_logprobs'\)"),
        ({"meta_info": {"completion_tokens": 2, "output_token_logprobs": [[-1.0, 3, None]]}}, "log-probabilities of 1"),
        ("no json", "unreadable answer"),
        ("[1]", "expected an object"),
    ],
)
async def test_an_answer_of_another_shape_is_an_error_that_shows_it(event: Any, words: str) -> None:
    async def generate(http: web.Request) -> web.StreamResponse:
        return await answer_events(http, [event])

    app = web.Application()
    app.router.add_post("/generate", generate)
    async with served(app) as url, SglangClient(url) as client:
        with pytest.raises(EngineError, match=words):
            await client.sample(REQUEST)


async def test_a_law_whose_log_probabilities_vllm_does_not_give_is_refused() -> None:
    warm = SampleRequest(request_id="r", prompt_ids=REQUEST.prompt_ids, max_tokens=1, law=SamplingLaw(temperature=0.7))
    async with served(FakeVllm().make_app()) as url, VllmClient(url) as client:
        with pytest.raises(EngineError, match=r"temperature 0\.7, and vLLM gives .* --temperature 1"):
            await client.sample(warm)


@pytest.mark.parametrize("kind", [ServeClient, SglangClient, VllmClient])
async def test_a_server_that_is_down_or_another_is_told_with_its_address(kind: Any) -> None:
    async with kind("http://127.0.0.1:9") as client:
        with pytest.raises(EngineError, match=r"no answer from http://127\.0\.0\.1:9/.*is a server of tokens running"):
            await client.look()
        with pytest.raises(EngineError, match=r"no answer from http://127\.0\.0\.1:9"):
            await client.sample(REQUEST)
    async with served(web.Application()) as url, kind(url) as client:
        with pytest.raises(EngineError, match="say with --engine-kind what it is"):
            await client.look()

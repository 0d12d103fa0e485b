"""Our own sampler over HTTP."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from aiohttp import web

from forgejax.errors import EngineError
from forgejax.rollout import LocalSampler, RemoteSampler
from forgejax.rollout.server.http import RolloutServer
from forgejax.types import Completion, FinishReason, Grammar, SampleRequest, SamplingLaw
from tests.rollout import tiny
from tests.rollout.driver.test_masks import GRAMMAR, GRAMMARS, SCHEMA, STOP, text_of
from tests.rollout.serving import served, serving_engine


async def test_a_remote_sampler_gets_exactly_what_a_local_one_gets() -> None:
    async with (
        serving_engine(tiny.params(), 4) as engine,
        served(RolloutServer(engine).make_app()) as url,
        RemoteSampler(url) as remote,
    ):
        requests = [
            tiny.request(f"r{i}", tiny.prompt(i, 12), 9 + i, seed=i, law=SamplingLaw(temperature=0.7), stop_ids={3})
            for i in range(6)
        ]
        seen: list[int] = []
        there = await asyncio.gather(*(remote.sample(each, seen.extend) for each in requests))
        here = await asyncio.gather(*(LocalSampler(engine.driver).sample(each) for each in requests))
    for one, other in zip(there, here, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        for name in ("token_ids", "versions", "oldest_versions", "prompt_ids"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert (one.law, one.finish_reason, one.request_id) == (other.law, other.finish_reason, other.request_id)
    assert len(seen) == sum(len(each.token_ids) for each in there) and set(there[0].versions.tolist()) == {4}


async def test_a_grammar_travels_to_the_engine_and_its_masks_hold_there() -> None:
    def ask(name: str) -> SampleRequest:
        return tiny.request(name, [5, 6], 110, seed=4, grammar=GRAMMAR, stop_ids={STOP})

    async with (
        serving_engine(tiny.params(), grammars=GRAMMARS) as engine,
        served(RolloutServer(engine).make_app()) as url,
        RemoteSampler(url) as remote,
    ):
        there, here = await remote.sample(ask("a")), await LocalSampler(engine.driver).sample(ask("b"))
        with pytest.raises(EngineError, match="Unimplemented keys"):
            await remote.sample(replace(ask("c"), grammar=Grammar(schema='{"not": {}}')))
    jsonschema.validate(json.loads(text_of(there)), SCHEMA)
    np.testing.assert_array_equal(there.token_ids, here.token_ids)
    np.testing.assert_array_equal(there.logprobs, here.logprobs)


async def test_leaving_a_remote_request_or_asking_it_to_stop_frees_its_slot() -> None:
    async with (
        serving_engine(tiny.params()) as engine,
        served(RolloutServer(engine).make_app()) as url,
        RemoteSampler(url) as remote,
    ):
        seen: list[int] = []

        def enough(ids: list[int]) -> bool:
            seen.extend(ids)
            return len(seen) >= 4

        done: Completion = await remote.sample(tiny.request("r", [1, 2], 100, seed=1), enough)  # type: ignore[arg-type]
        assert (done.token_ids.tolist(), done.finish_reason) == (seen, FinishReason.STOP) and len(seen) == 4
        task = asyncio.create_task(remote.sample(tiny.request("s", [1, 2], 120)))
        await asyncio.sleep(0.02)
        task.cancel()
        for _ in range(500):
            metrics = engine.metrics()
            if metrics.active == metrics.waiting == 0:
                break
            await asyncio.sleep(0.01)
        assert metrics.active == metrics.waiting == 0


async def test_an_unreachable_or_silent_server_is_an_engine_error() -> None:
    async def silent(_: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    app = web.Application()
    app.add_routes([web.post("/generate", silent)])
    async with served(app) as url, RemoteSampler(url, silence_s=0.2) as remote:
        with pytest.raises(EngineError, match="no answer from"):
            await remote.sample(tiny.request("r", [1]))
    async with RemoteSampler(url) as remote:
        with pytest.raises(EngineError, match=r"serve\.py running"):
            await remote.sample(tiny.request("r", [1]))
    with pytest.raises(EngineError, match="async with"):
        await remote.sample(tiny.request("r", [1]))

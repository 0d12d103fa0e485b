"""Laws of the engine behind HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from forgejax.errors import EngineError
from forgejax.rollout import RemoteSampler
from forgejax.rollout.server.admin import PublishRoot
from forgejax.rollout.server.http import RolloutServer
from forgejax.rollout.server.wire import INSTANCE_HEADER
from forgejax.run.checkpoint import load_tree, save_tree
from tests.rollout import tiny
from tests.rollout.serving import served, serving_engine


async def test_weights_are_published_from_a_checkpoint_below_the_root(tmp_path: Path) -> None:
    save_tree(tmp_path / "root" / "step-9", tiny.params(9))
    save_tree(tmp_path / "outside", tiny.params(9))
    root = PublishRoot(root=tmp_path / "root", read=load_tree)
    async with (
        serving_engine(tiny.params(0)) as engine,
        served(RolloutServer(engine, root).make_app()) as url,
        aiohttp.ClientSession() as session,
    ):

        async def publish(path: Path) -> int:
            body = json.dumps({"path": str(path), "version": 9})
            async with session.post(f"{url}/publish", data=body) as response:
                return response.status

        assert await publish(tmp_path / "outside") == 409 and engine.version == 0
        assert await publish(tmp_path / "root" / "missing") == 409
        assert await publish(Path("nul\0")) == 409
        assert await publish(tmp_path / "root" / "step-9") == 200 and engine.version == 9
        async with session.get(f"{url}/health") as response:
            assert await response.json() == {"healthy": True, "version": 9, "max_context": 128}
        async with RemoteSampler(url) as remote:
            done = await remote.sample(tiny.request("r", tiny.prompt(0, 9), 8))
        async with session.get(f"{url}/metrics") as response:
            text = await response.text()
    expected = tiny.dense_logprobs(tiny.params(9), done.prompt_ids, done.token_ids, done.law)
    assert np.abs(expected - done.logprobs).max() < 1e-5
    assert 'forgejax_rollout_tokens_sampled_total{purpose="train"} 8.0' in text
    assert "forgejax_rollout_policy_version 9.0" in text


async def test_refusals_reach_the_caller_as_sentences() -> None:
    async with (
        serving_engine(tiny.params()) as engine,
        served(RolloutServer(engine).make_app()) as url,
        RemoteSampler(url) as remote,
    ):
        with pytest.raises(EngineError, match="the context holds 128"):
            await remote.sample(tiny.request("r", tiny.prompt(0, 200)))
        async with aiohttp.ClientSession() as session:
            for body, why in [
                (b"{", "truncated"),
                (b'{"prompt_ids": [1]}', "max_tokens"),
                (b'{"prompt_ids": [], "max_tokens": 1}', "the prompt is empty"),
                (b'{"prompt_ids": [1], "max_tokens": 1, "temprature": 1}', "temprature"),
                (b'{"prompt_ids": [99999999999], "max_tokens": 1}', "2\\^31"),
                (b'{"prompt_ids": [1], "max_tokens": 1, "law": {"top_p": 0}}', "top_p 0"),
            ]:
                async with session.post(f"{url}/generate", data=body) as response:
                    assert response.status == 400
                    error = (await response.json())["error"]
                    assert why.replace("\\", "") in error
            packed = {"Content-Encoding": "gzip"}
            async with session.post(f"{url}/generate", data=b"plain", headers=packed) as response:
                assert response.status == 400 and "Content-Encoding" in await response.text()
        await engine.stop()
        with pytest.raises(EngineError, match="the engine is draining"):
            await remote.sample(tiny.request("r", [1]))


async def test_it_is_ready_while_it_takes_requests_and_says_when_to_ask_again() -> None:
    async with (
        serving_engine(tiny.params()) as engine,
        served(RolloutServer(engine).make_app()) as url,
        aiohttp.ClientSession() as session,
    ):
        body = b'{"prompt_ids": [1], "max_tokens": 2}'
        assert (await session.get(f"{url}/ready")).status == 200
        other = await session.post(f"{url}/generate", data=body, headers={INSTANCE_HEADER: "gone"})
        await engine.drain(0.0)
        ready, refused = await session.get(f"{url}/ready"), await session.post(f"{url}/generate", data=body)
        health = await session.get(f"{url}/health")
        words = (await refused.json())["error"]
    assert [each.status for each in (other, ready, refused, health)] == [503, 503, 503, 200]
    assert refused.headers["Retry-After"] == "5" and words == "the engine is draining; ask again later"

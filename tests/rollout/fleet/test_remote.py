"""The engine behind sockets: our own sampler over HTTP and a stock JetStream client over gRPC."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import grpc  # type: ignore[import-untyped]
import numpy as np
import pytest
from aiohttp import web

from forgejax.errors import EngineError
from forgejax.rollout import Driver, LocalSampler, RemoteSampler
from forgejax.rollout.engine._jetstream import jetstream_pb2, jetstream_pb2_grpc
from forgejax.rollout.server.grpc_service import OrchestratorService
from forgejax.rollout.server.http import Publishing, RolloutServer
from forgejax.run.checkpoint import load_tree, save_tree
from forgejax.types import Completion, FinishReason, SamplingLaw
from tests.rollout import tiny


@asynccontextmanager
async def _served(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_a_remote_sampler_gets_exactly_what_a_local_one_gets() -> None:
    with Driver(tiny.engine(), tiny.params(), version=4) as driver:
        async with _served(RolloutServer(driver).app()) as url, RemoteSampler(url) as remote:
            requests = [
                tiny.request(f"r{i}", tiny.prompt(i, 12), 9 + i, seed=i, law=SamplingLaw(temperature=0.7), stop_ids={3})
                for i in range(6)
            ]
            seen: list[int] = []
            there = await asyncio.gather(*(remote.sample(each, seen.extend) for each in requests))
            here = await asyncio.gather(*(LocalSampler(driver).sample(each) for each in requests))
    for one, other in zip(there, here, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
        for name in ("token_ids", "versions", "oldest_versions", "prompt_ids"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert (one.law, one.finish_reason, one.request_id) == (other.law, other.finish_reason, other.request_id)
    assert len(seen) == sum(len(each.token_ids) for each in there) and set(there[0].versions.tolist()) == {4}


async def test_leaving_a_remote_request_or_asking_it_to_stop_frees_its_slot() -> None:
    with Driver(tiny.engine(), tiny.params()) as driver:
        async with _served(RolloutServer(driver).app()) as url, RemoteSampler(url) as remote:
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
                metrics = driver.metrics()
                if metrics.active == metrics.waiting == 0:
                    break
                await asyncio.sleep(0.01)
            assert metrics.active == metrics.waiting == 0


async def test_refusals_reach_the_caller_as_sentences() -> None:
    with Driver(tiny.engine(), tiny.params()) as driver:
        async with _served(RolloutServer(driver).app()) as url, RemoteSampler(url) as remote:
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
            driver.stop()
            with pytest.raises(EngineError, match="was stopped"):
                await remote.sample(tiny.request("r", [1]))


async def test_an_unreachable_or_silent_server_is_an_engine_error() -> None:
    async def silent(_: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    app = web.Application()
    app.add_routes([web.post("/generate", silent)])
    async with _served(app) as url, RemoteSampler(url, silence_s=0.2) as remote:
        with pytest.raises(EngineError, match="no answer from"):
            await remote.sample(tiny.request("r", [1]))
    async with RemoteSampler(url) as remote:
        with pytest.raises(EngineError, match=r"serve\.py running"):
            await remote.sample(tiny.request("r", [1]))
    with pytest.raises(EngineError, match="async with"):
        await remote.sample(tiny.request("r", [1]))


async def test_weights_are_published_from_a_checkpoint_below_the_root(tmp_path: Path) -> None:
    save_tree(tmp_path / "root" / "step-9", tiny.params(9))
    save_tree(tmp_path / "outside", tiny.params(9))
    publishing = Publishing(root=tmp_path / "root", read=load_tree)
    with Driver(tiny.engine(), tiny.params(0)) as driver:
        async with _served(RolloutServer(driver, publishing).app()) as url, aiohttp.ClientSession() as session:

            async def publish(path: Path) -> int:
                body = json.dumps({"path": str(path), "version": 9})
                async with session.post(f"{url}/publish", data=body) as response:
                    return response.status

            assert await publish(tmp_path / "outside") == 409 and driver.version == 0
            assert await publish(tmp_path / "root" / "missing") == 409
            assert await publish(Path("nul\0")) == 409
            assert await publish(tmp_path / "root" / "step-9") == 200 and driver.version == 9
            async with session.get(f"{url}/health") as response:
                assert await response.json() == {"healthy": True, "version": 9}
            async with RemoteSampler(url) as remote:
                done = await remote.sample(tiny.request("r", tiny.prompt(0, 9), 8))
            async with session.get(f"{url}/metrics") as response:
                text = await response.text()
    expected = tiny.dense_logprobs(tiny.params(9), done.prompt_ids, done.token_ids, done.law)
    assert np.abs(expected - done.logprobs).max() < 1e-5
    assert 'forgejax_rollout_tokens_sampled_total{purpose="train"} 8.0' in text
    assert "forgejax_rollout_policy_version 9.0" in text


async def test_a_stock_jetstream_client_is_served() -> None:
    with Driver(tiny.engine(), tiny.params()) as driver:
        server = grpc.aio.server()
        service = OrchestratorService(driver, law=SamplingLaw(temperature=0.0))
        jetstream_pb2_grpc.add_OrchestratorServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = jetstream_pb2_grpc.OrchestratorStub(channel)
                request = jetstream_pb2.DecodeRequest
                prompt = tiny.prompt(1, 9)
                token_content = request.TokenContent(token_ids=prompt.tolist())
                tokens: list[int] = []
                async for response in stub.Decode(request(token_content=token_content, max_tokens=7), timeout=30):
                    tokens += response.stream_content.samples[0].token_ids
                assert (await stub.HealthCheck(jetstream_pb2.HealthCheckRequest(), timeout=10)).is_live
                for bad, code in [
                    (request(text_content=request.TextContent(text="hi"), max_tokens=7), "INVALID_ARGUMENT"),
                    (request(token_content=request.TokenContent(), max_tokens=7), "INVALID_ARGUMENT"),
                    (request(token_content=request.TokenContent(token_ids=[99]), max_tokens=7), "FAILED_PRECONDITION"),
                ]:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        async for _ in stub.Decode(bad, timeout=10):
                            pass
                    assert caught.value.code().name == code
                expected = await LocalSampler(driver).sample(
                    tiny.request("local", prompt, 7, law=SamplingLaw(temperature=0.0))
                )
                assert tokens == expected.token_ids.tolist()
        finally:
            await server.stop(grace=None)

"""JetStream's service over our engine."""

from __future__ import annotations

import asyncio
import functools
import operator
import sys

import grpc  # type: ignore[import-untyped]
import pytest

from forgejax.rollout import LocalSampler
from forgejax.rollout.engine._jetstream import jetstream_pb2, jetstream_pb2_grpc
from forgejax.rollout.server.grpc_service import OrchestratorService
from forgejax.types import SamplingLaw
from tests.rollout import tiny
from tests.rollout.serving import serving_engine


async def test_a_stock_jetstream_client_is_served() -> None:
    async with serving_engine(tiny.params()) as engine:
        server = grpc.aio.server()
        service = OrchestratorService(engine, law=SamplingLaw(temperature=0.0))
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
                expected = await LocalSampler(engine.driver).sample(
                    tiny.request("local", prompt, 7, law=SamplingLaw(temperature=0.0))
                )
                assert tokens == expected.token_ids.tolist()
        finally:
            await server.stop(grace=None)


STOCK_CLIENT = """
import sys, grpc
from jetstream.core.proto import jetstream_pb2, jetstream_pb2_grpc
with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = jetstream_pb2_grpc.OrchestratorStub(channel)
    content = jetstream_pb2.DecodeRequest.TokenContent(token_ids=[3, 1, 4])
    for response in stub.Decode(jetstream_pb2.DecodeRequest(token_content=content, max_tokens=9), timeout=60):
        print(*response.stream_content.samples[0].token_ids)
"""


async def test_a_client_of_jetstreams_own_in_a_process_of_its_own_streams() -> None:
    async with serving_engine(tiny.params()) as engine:
        server = grpc.aio.server()
        jetstream_pb2_grpc.add_OrchestratorServicer_to_server(
            OrchestratorService(engine, law=SamplingLaw(temperature=0.0)), server
        )
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        client = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-c", STOCK_CLIENT, f"127.0.0.1:{port}", stdout=asyncio.subprocess.PIPE
        )
        said, _ = await asyncio.wait_for(client.communicate(), 90)
        expected = await LocalSampler(engine.driver).sample(
            tiny.request("local", [3, 1, 4], 9, law=SamplingLaw(temperature=0.0))
        )
        await server.stop(grace=None)
    runs = [[int(word) for word in line.split()] for line in said.decode().splitlines()]
    assert functools.reduce(operator.iadd, runs, []) == expected.token_ids.tolist() and len(runs) > 1

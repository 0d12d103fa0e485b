"""JetStream's service over our driver."""

from __future__ import annotations

import grpc  # type: ignore[import-untyped]
import pytest

from forgejax.rollout import Driver, LocalSampler
from forgejax.rollout.engine._jetstream import jetstream_pb2, jetstream_pb2_grpc
from forgejax.rollout.server.grpc_service import OrchestratorService
from forgejax.types import SamplingLaw
from tests.rollout import tiny


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

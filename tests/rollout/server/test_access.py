"""Laws of who may ask a server."""

from __future__ import annotations

import asyncio

import aiohttp
import grpc  # type: ignore[import-untyped]
import pytest

from forgejax.errors import ConfigError, EngineError
from forgejax.rollout.engine._jetstream import jetstream_pb2, jetstream_pb2_grpc
from forgejax.rollout.fleet.remote_engine import RemoteEngine
from forgejax.rollout.server.access import BearerInterceptor, check_exposure, make_bearer_check
from forgejax.rollout.server.grpc_service import OrchestratorService
from forgejax.rollout.server.http import RolloutServer
from tests.rollout import tiny
from tests.rollout.serving import served, serving_engine


@pytest.mark.parametrize(
    ("host", "token", "allowed"),
    [
        ("127.0.0.1", "", True),
        ("::1", "", True),
        ("localhost", "", True),
        ("0.0.0.0", "", False),
        ("10.1.2.3", "", False),
        ("trainer.example", "", False),
        ("0.0.0.0", "secret", True),
    ],
)
def test_only_a_token_opens_a_server_to_other_machines(host: str, token: str, allowed: bool) -> None:
    if allowed:
        check_exposure(host, token)
    else:
        with pytest.raises(ConfigError, match="can be reached from other machines"):
            check_exposure(host, token)


async def test_a_server_with_a_token_answers_whoever_knows_it() -> None:
    async with serving_engine(tiny.params()) as engine:
        grpc_server = grpc.aio.server(interceptors=[BearerInterceptor("secret")])
        jetstream_pb2_grpc.add_OrchestratorServicer_to_server(OrchestratorService(engine), grpc_server)
        port = grpc_server.add_insecure_port("127.0.0.1:0")
        await grpc_server.start()
        async with served(RolloutServer(engine).make_app(make_bearer_check("secret"))) as url:
            async with RemoteEngine(url, token="secret") as known, RemoteEngine(url, token="other") as unknown:
                assert len((await known.sample(tiny.request("a", [1, 2], 4))).token_ids) == 4
                for refused in (unknown.sample(tiny.request("b", [1, 2], 4)), unknown.status()):
                    with pytest.raises(EngineError, match="wants its token"):
                        await refused
            async with aiohttp.ClientSession() as session:
                statuses = [(await session.get(f"{url}{path}")).status for path in ("/health", "/ready", "/metrics")]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub, ping = jetstream_pb2_grpc.OrchestratorStub(channel), jetstream_pb2.HealthCheckRequest()
                metadata = (("authorization", "Bearer secret"),)
                assert (await stub.HealthCheck(ping, timeout=10, metadata=metadata)).is_live
                with pytest.raises(grpc.aio.AioRpcError, match="wants its token"):
                    await stub.HealthCheck(ping, timeout=10)
        await grpc_server.stop(grace=None)
    assert statuses == [200, 200, 401]


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"\xff\x80", 401), ("schl\u00fcssel".encode(), 200), ("schl\u00fcssel".encode("latin-1"), 401)],
)
async def test_a_credential_whose_bytes_are_no_text_is_a_wrong_one(sent: bytes, status: int) -> None:
    async with (
        serving_engine(tiny.params()) as engine,
        served(RolloutServer(engine).make_app(make_bearer_check("schl\u00fcssel"))) as url,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(b"GET /status HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + sent + b"\r\n\r\n")
        assert (await reader.read(12)).decode() == f"HTTP/1.1 {status}"
        writer.close()

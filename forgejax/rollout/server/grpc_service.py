"""JetStream's gRPC ``Orchestrator`` service over a served engine: a stock JetStream client needs no change.

Token content only. The protocol has no field for a sampling law, stop ids, seeds or log-probs: one law and one set of
stop ids hold for all its requests. As in JetStream, every response carries the ids drawn since the last.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import grpc  # type: ignore[import-untyped]
import numpy as np

from forgejax.errors import EngineError, OverloadedError
from forgejax.rollout.driver.job import Draw
from forgejax.rollout.engine._jetstream import jetstream_pb2, jetstream_pb2_grpc
from forgejax.rollout.server.served import ServedEngine
from forgejax.types import Completion, Purpose, SampleRequest, SamplingLaw


class OrchestratorService(jetstream_pb2_grpc.OrchestratorServicer):
    """Decode and HealthCheck."""

    def __init__(
        self,
        served: ServedEngine,
        *,
        law: SamplingLaw | None = None,
        stop_ids: frozenset[int] = frozenset(),
        purpose: Purpose = "evaluation",
    ):
        self._served, self._stop_ids, self._purpose = served, stop_ids, purpose
        self._law = law if law is not None else SamplingLaw()

    async def Decode(  # noqa: N802
        self, request: jetstream_pb2.DecodeRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[jetstream_pb2.DecodeResponse]:
        """Streams the ids drawn for a prompt; a client that goes away cancels its request."""
        if request.WhichOneof("content") != "token_content":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "this engine takes token_content, not text_content")
        try:
            sample = SampleRequest(
                request_id=f"grpc-{uuid.uuid4().hex}",
                prompt_ids=np.array(request.token_content.token_ids, np.int32),
                max_tokens=request.max_tokens,
                law=self._law,
                stop_ids=self._stop_ids,
                purpose=self._purpose,
            )
        except ValueError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        loop = asyncio.get_running_loop()
        drawn: asyncio.Queue[list[int] | None] = asyncio.Queue()

        def on_draw(draw: Draw) -> None:
            loop.call_soon_threadsafe(drawn.put_nowait, draw.token_ids.tolist())

        try:
            await self._served.enter(sample)
        except EngineError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        try:
            future = asyncio.wrap_future(self._served.submit(sample, on_draw))
        except OverloadedError as error:
            context.set_trailing_metadata((("retry-after", f"{error.retry_after_s:g}"),))
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except EngineError as error:
            await context.abort(_pick_status(self._served), str(error))
        future.add_done_callback(lambda _: drawn.put_nowait(None))
        try:
            while (token_ids := await drawn.get()) is not None:
                yield _make_response(token_ids)
            await self._confirm(future, context)
        finally:
            future.cancel()

    async def HealthCheck(  # noqa: N802
        self, request: jetstream_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> jetstream_pb2.HealthCheckResponse:
        return jetstream_pb2.HealthCheckResponse(is_live=self._served.healthy)

    async def _confirm(self, future: asyncio.Future[Completion], context: grpc.aio.ServicerContext) -> None:
        try:
            await future
        except EngineError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))


def _pick_status(served: ServedEngine) -> grpc.StatusCode:
    return grpc.StatusCode.FAILED_PRECONDITION if served.healthy else grpc.StatusCode.UNAVAILABLE


def _make_response(token_ids: list[int]) -> jetstream_pb2.DecodeResponse:
    stream = jetstream_pb2.DecodeResponse.StreamContent
    return jetstream_pb2.DecodeResponse(stream_content=stream(samples=[stream.Sample(token_ids=token_ids)]))

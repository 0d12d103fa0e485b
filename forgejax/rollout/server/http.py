"""Token-in, token-out over HTTP: the engine for samplers in other processes.

``POST /generate`` see ``wire``; ``GET /health`` 200 or 503: whether nothing has failed; ``GET /ready`` whether requests
are served now; ``GET /metrics`` Prometheus text. What changes the engine is in ``admin``.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from concurrent.futures import Future

import msgspec
from aiohttp import web
from aiohttp.typedefs import Middleware
from prometheus_client import CollectorRegistry, generate_latest

from forgejax.errors import EngineError, ForgejaxError, OverloadedError
from forgejax.rollout.driver.job import Draw
from forgejax.rollout.driver.request_log import RequestLog
from forgejax.rollout.server.admin import EngineAdmin, PublishRoot
from forgejax.rollout.server.bodies import MOST_BYTES, PATIENCE_S, refuse, take_body
from forgejax.rollout.server.metrics import DriverCollector
from forgejax.rollout.server.served import ServedEngine
from forgejax.rollout.server.wire import INSTANCE_HEADER, Line, decode_request, encode_draw, encode_end
from forgejax.types import Completion, SampleRequest

_HEARTBEAT_S = 5.0
_RETRY_S = 5


class RolloutServer:
    """HTTP handlers over one engine. ``publish_root`` of None refuses weights that lie in files."""

    def __init__(self, served: ServedEngine, publish_root: PublishRoot | None = None):
        self._served = served
        self._admin = EngineAdmin(served, publish_root)
        self._registry = CollectorRegistry()
        self._registry.register(DriverCollector(served))

    def make_app(self, *middlewares: Middleware) -> web.Application:
        app = web.Application(client_max_size=MOST_BYTES, middlewares=middlewares)
        app.add_routes(
            [
                web.post("/generate", self.generate),
                web.get("/health", self.health),
                web.get("/ready", self.ready),
                web.get("/metrics", self.metrics),
                *self._admin.list_routes(),
            ]
        )
        return app

    async def generate(self, request: web.Request) -> web.StreamResponse:
        served = self._served
        if request.headers.get(INSTANCE_HEADER, served.instance) != served.instance:
            return _refuse_for_now("the request was meant for the process that has served here before")
        try:
            sample = decode_request(await take_body(request), f"remote-{uuid.uuid4().hex}")
        except ValueError as error:
            return refuse(400, str(error))
        lines: asyncio.Queue[Line] = asyncio.Queue()
        try:
            await served.enter(sample)
            future = _submit(served, sample, lines)
        except OverloadedError as error:
            refusal = refuse(429, str(error))
            refusal.headers["Retry-After"] = str(math.ceil(error.retry_after_s))
            return refusal
        except ForgejaxError as error:
            return refuse(409, str(error)) if served.healthy and served.taking else _refuse_for_now(str(error))
        response = web.StreamResponse(headers={"Content-Type": "application/jsonl"})
        try:
            await response.prepare(request)
            await _write_lines(response, lines, served.request_log)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        finally:
            future.cancel()  # does nothing to a finished one
        return response

    async def health(self, _: web.Request) -> web.Response:
        served = self._served
        told = {"healthy": served.healthy, "version": served.version}
        told["max_context"] = served.engine.config.max_context
        return web.json_response(told, status=200 if served.healthy else 503)

    async def ready(self, _: web.Request) -> web.Response:
        served = self._served
        if served.state == "serving" and served.healthy:
            return web.json_response({"state": served.state, "version": served.version})
        return _refuse_for_now(f"the engine is {served.state if served.healthy else 'broken; its log says why'}")

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": "text/plain; version=0.0.4"})


def _submit(served: ServedEngine, sample: SampleRequest, lines: asyncio.Queue[Line]) -> Future[Completion]:
    """Submits a request whose lines arrive, in order, in a queue of the running event loop."""
    loop = asyncio.get_running_loop()

    def put(line: Line) -> None:
        # A loop that has closed has nobody left to tell.
        if not loop.is_closed():
            loop.call_soon_threadsafe(lines.put_nowait, line)

    def put_draw(draw: Draw) -> None:
        put(encode_draw(draw))

    def put_end(future: Future[Completion]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        put(encode_end(future.result()) if error is None else Line(error=str(error)))

    future = served.submit(sample, put_draw)
    future.add_done_callback(put_end)
    return future


async def _write_lines(response: web.StreamResponse, lines: asyncio.Queue[Line], log: RequestLog | None) -> None:
    while True:
        try:
            line = await asyncio.wait_for(lines.get(), _HEARTBEAT_S)
        except TimeoutError:
            line = Line()  # a sign of life; writing it also finds out whether the client still is
        ends = line.end is not None or line.error is not None
        if ends and log is not None:  # its record outlives this process before anybody knows that it ended
            try:
                await asyncio.to_thread(log.write)
            except EngineError as error:
                line = Line(error=str(error))
        async with asyncio.timeout(PATIENCE_S):  # a client that no longer reads must not be kept for ever
            await response.write(msgspec.json.encode(line) + b"\n")
        if ends:
            await response.write_eof()
            return


def _refuse_for_now(why: str) -> web.Response:
    return refuse(503, f"{why}; ask again later", headers={"Retry-After": str(_RETRY_S)})

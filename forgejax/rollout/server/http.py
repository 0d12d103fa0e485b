"""Token-in, token-out over HTTP: the engine for samplers in other processes.

``POST /generate`` see ``wire``; ``GET /health`` 200 or 503; ``GET /metrics`` Prometheus text; ``POST /publish`` takes
``{"path": "...", "version": n}`` and loads the weights that lie there, below the server's publish directory: weights
travel through a file system that both sides see.
"""

from __future__ import annotations

import asyncio
import json
import math
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from forgejax.errors import EngineError, ForgejaxError, OverloadedError
from forgejax.rollout.driver.driver import Driver
from forgejax.rollout.driver.job import Draw
from forgejax.rollout.server.metrics import DriverCollector
from forgejax.rollout.server.wire import Line, decode_request, encode_draw, encode_end
from forgejax.types import Completion, SampleRequest

_HEARTBEAT_S = 5.0
_CLIENT_S = 30.0  # for a client to send its request, or to read what waits for it
_BODY_BYTES = 64 << 20


class PublishBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which weights to load, and the version their tokens will carry."""

    path: str
    version: int


ReadWeights = Callable[[Path, Any], Any]
"""Gives the weights kept at a path, laid out as a tree of shapes asks; raises ForgejaxError."""


@dataclass(frozen=True, kw_only=True)
class Publishing:
    """What ``POST /publish`` may load: weights below ``root``, read by ``read``."""

    root: Path
    read: ReadWeights


class RolloutServer:
    """HTTP handlers over one driver. ``publishing`` of None refuses publications."""

    def __init__(self, driver: Driver, publishing: Publishing | None = None):
        self._driver = driver
        self._publishing = publishing
        self._turn_to_publish = asyncio.Lock()
        self._registry = CollectorRegistry()
        self._registry.register(DriverCollector(driver))

    def make_app(self) -> web.Application:
        app = web.Application(client_max_size=_BODY_BYTES)
        app.add_routes(
            [
                web.post("/generate", self.generate),
                web.get("/health", self.health),
                web.get("/metrics", self.metrics),
                web.post("/publish", self.publish),
            ]
        )
        return app

    async def generate(self, request: web.Request) -> web.StreamResponse:
        try:
            sample = decode_request(await _read_body(request), f"remote-{uuid.uuid4().hex}")
        except ValueError as error:
            return _refuse(400, str(error))
        lines: asyncio.Queue[Line] = asyncio.Queue()
        try:
            await self._driver.prepare(sample)
            future = _submit(self._driver, sample, lines)
        except OverloadedError as error:
            refusal = _refuse(429, str(error))
            refusal.headers["Retry-After"] = str(math.ceil(error.retry_after_s))
            return refusal
        except ForgejaxError as error:
            return _refuse(409 if self._driver.healthy else 503, str(error))
        response = web.StreamResponse(headers={"Content-Type": "application/jsonl"})
        try:
            await response.prepare(request)
            await _write_lines(response, lines)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        finally:
            future.cancel()  # does nothing to a finished one
        return response

    async def health(self, _: web.Request) -> web.Response:
        healthy = self._driver.healthy
        known = {"version": self._driver.version, "max_context": self._driver.engine.config.max_context}
        return web.json_response({"healthy": healthy, **known}, status=200 if healthy else 503)

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def publish(self, request: web.Request) -> web.Response:
        if self._publishing is None:
            return _refuse(403, "this server takes no weights; start it with a publish directory")
        try:
            body = msgspec.json.decode(await _read_body(request), type=PublishBody)
        except ValueError as error:
            return _refuse(400, str(error))
        async with self._turn_to_publish:
            try:
                await asyncio.to_thread(self._load, self._publishing, Path(body.path), body.version)
            except ForgejaxError as error:
                return _refuse(409, str(error))
        return web.json_response({"version": body.version})

    def _load(self, publishing: Publishing, path: Path, version: int) -> None:
        try:
            root, path = publishing.root.resolve(), path.resolve()
        except (ValueError, OSError, RuntimeError) as error:
            raise EngineError(f"{str(path)!r} is no path that can be read: {error}") from error
        if not path.is_relative_to(root):
            raise EngineError(f"{path} is not below the publish directory {root}; write the weights there")
        self._driver.publish(publishing.read(path, self._driver.engine.abstract_params), version)


def _submit(driver: Driver, sample: SampleRequest, lines: asyncio.Queue[Line]) -> Future[Completion]:
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

    future = driver.submit(sample, put_draw)
    future.add_done_callback(put_end)
    return future


async def _read_body(request: web.Request) -> bytes:
    """The whole body. Raises ValueError for one that does not arrive or cannot be unpacked."""
    try:
        async with asyncio.timeout(_CLIENT_S):
            return await request.read()
    except web.RequestPayloadError as error:
        raise ValueError(f"the body cannot be read: {error.__cause__ or error}; check its Content-Encoding") from error
    except TimeoutError as error:
        raise ValueError(f"the body did not arrive within {_CLIENT_S:g} s; send it again") from error


async def _write_lines(response: web.StreamResponse, lines: asyncio.Queue[Line]) -> None:
    while True:
        try:
            line = await asyncio.wait_for(lines.get(), _HEARTBEAT_S)
        except TimeoutError:
            line = Line()  # a sign of life; writing it also finds out whether the client still is
        async with asyncio.timeout(_CLIENT_S):  # a client that no longer reads must not be kept for ever
            await response.write(msgspec.json.encode(line) + b"\n")
        if line.end is not None or line.error is not None:
            await response.write_eof()
            return


def _refuse(status: int, why: str) -> web.Response:
    return web.Response(status=status, text=json.dumps({"error": why}), content_type="application/json")

"""The gateway's routes: one handler for every wire format, and the few pages beside them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from aiohttp import web

from forgejax.chat.messages import ChatRequest
from forgejax.gateway.dialects.base import Dialect, Event, ReplyHead
from forgejax.gateway.dialects.chat_completions import ChatCompletions
from forgejax.gateway.pending import Flight
from forgejax.gateway.refusals import RefusedError
from forgejax.gateway.sessions import Service, SessionTable, session_closed

DIALECTS: Sequence[Dialect] = (ChatCompletions(),)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def build_app(service: Service, sessions: SessionTable) -> web.Application:
    """An application that serves ``sessions``."""
    app = web.Application(client_max_size=service.config.max_body_bytes, middlewares=[_errors_as_json])
    for dialect in DIALECTS:
        app.router.add_post(dialect.path, ChatHandler(service, sessions, dialect).handle)

    async def models(_: web.Request) -> web.Response:
        model = {"id": service.config.model_name, "object": "model", "created": 0, "owned_by": "forgejax"}
        return web.json_response({"object": "list", "data": [model]})

    async def health(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def metrics(_: web.Request) -> web.Response:
        content_type = {"Content-Type": service.metrics.content_type}
        return web.Response(body=service.metrics.text(), headers=content_type)

    app.router.add_get("/", health)  # and HEAD, which some agents send first
    app.router.add_get("/health", health)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/metrics", metrics)
    return app


class ChatHandler:
    """Reads a request, samples for its session and writes the answer in its wire format."""

    def __init__(self, service: Service, sessions: SessionTable, dialect: Dialect) -> None:
        self._service = service
        self._sessions = sessions
        self._dialect = dialect

    async def handle(self, http: web.Request) -> web.StreamResponse:
        arrived = time.monotonic()
        try:
            response = await self._answer(http)
        except RefusedError as refusal:
            response = web.json_response(self._dialect.error(refusal), status=refusal.status)
        self._service.metrics.requests.labels(self._dialect.name, str(response.status)).inc()
        self._service.metrics.request_s.observe(time.monotonic() - arrived)
        return response

    async def _answer(self, http: web.Request) -> web.StreamResponse:
        session = self._sessions.find(_api_key(http))
        body = await self._body(http)
        if session.closed:
            raise session_closed()
        try:
            chat = self._dialect.parse(body)
            flight = await session.ask(chat)
        except RecursionError as error:
            raise RefusedError(400, "the body is nested too deeply; send it flatter", code="invalid_json") from error
        head = ReplyHead(id=f"chatcmpl-{flight.id}", created=int(time.time()), model=self._service.config.model_name)
        timeout_s = self._service.config.request_timeout_s
        late = RefusedError(504, f"no answer within {timeout_s:g} s; try again later", code="timeout")
        deadline = asyncio.get_running_loop().call_later(timeout_s, flight.abandon, late)
        try:
            if chat.stream:
                return await self._stream(http, head, chat, flight)
            return web.json_response(self._dialect.response(head, await flight.reply()))
        finally:
            deadline.cancel()
            # Does nothing once the answer is there; else the agent went away, and its tokens are recorded as such.
            flight.abandon(RefusedError(499, "the agent closed the connection", code="cancelled"))

    async def _stream(
        self, http: web.Request, head: ReplyHead, chat: ChatRequest, flight: Flight
    ) -> web.StreamResponse:
        words = self._dialect.stream(head, chat)
        deltas = await flight.deltas()  # before any byte is sent, so that a request that fails gets a proper status
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        try:
            await response.prepare(http)
            await self._send(response, words.start())
            try:
                while deltas:
                    await self._send(response, [event for delta in deltas for event in words.delta(delta)])
                    deltas = await flight.deltas()
                last = words.end(await flight.reply())
            except RefusedError as refusal:
                last = words.error(refusal)
            await self._send(response, last)
            await response.write_eof()
        except (ConnectionResetError, TimeoutError):
            # The agent went away, or no longer reads; what was drawn for it is recorded by the flight.
            if http.transport is not None:
                http.transport.abort()
        return response

    async def _send(self, response: web.StreamResponse, events: Sequence[Event]) -> None:
        async with asyncio.timeout(self._service.config.body_timeout_s):
            await response.write(_wire(events))

    async def _body(self, http: web.Request) -> dict[str, Any]:
        config = self._service.config
        try:
            async with asyncio.timeout(config.body_timeout_s):
                raw = await http.read()
        except web.HTTPRequestEntityTooLarge as error:
            message = f"the body has more than {config.max_body_bytes} bytes; send fewer or shorter messages"
            raise RefusedError(413, message, code="body_too_large") from error
        except web.RequestPayloadError as error:
            message = f"the body cannot be read: {error.__cause__ or error}; check its Content-Encoding"
            raise RefusedError(400, message, code="invalid_body") from error
        except TimeoutError as error:
            message = f"the body did not arrive within {config.body_timeout_s:g} s; send it again"
            raise RefusedError(408, message, code="timeout") from error
        try:
            body = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RefusedError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
        if not isinstance(body, dict):
            raise RefusedError(
                400, f"the body is a JSON {type(body).__name__}; expected an object", code="invalid_json"
            )
        return body


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Words aiohttp's own refusals (no such page, wrong method) as every other error is worded."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        refusal = RefusedError(error.status, f"{request.method} {request.path}: {error.reason}", code="not_served")
        return web.json_response(ChatCompletions().error(refusal), status=error.status)


def _api_key(http: web.Request) -> str | None:
    scheme, _, key = http.headers.get("Authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" and key.strip() else None


def _wire(events: Sequence[Event]) -> bytes:
    return "".join(
        f"data: {data}\n\n" if name is None else f"event: {name}\ndata: {data}\n\n" for name, data in events
    ).encode()

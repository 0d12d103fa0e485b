"""The gateway's routes: one handler for every wire format, and the few pages beside them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from forgejax.chat.reply import Reply
from forgejax.errors import GatewayError
from forgejax.gateway.dialects import Dialect
from forgejax.gateway.dialects.base import Event, ParsedRequest, ReplyHead
from forgejax.gateway.memory import ReplyMemory
from forgejax.gateway.pending import PendingReply
from forgejax.gateway.refusals import RefusedError, refuse_closed_session
from forgejax.gateway.session_table import SessionTable
from forgejax.gateway.sessions import Service


def build_app(service: Service, sessions: SessionTable, dialects: Sequence[Dialect]) -> web.Application:
    """An application that serves ``sessions`` in every one of ``dialects``.

    Raises GatewayError where there is none, or two of them have a route in common.
    """
    _check_routes(dialects)
    app = web.Application(client_max_size=service.config.max_body_bytes, middlewares=[_word_errors(dialects)])
    for dialect in dialects:
        handler = ChatHandler(service, sessions, dialect)
        for route in dialect.routes:
            app.router.add_route(route.method, route.path, handler.handle)

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


def _check_routes(dialects: Sequence[Dialect]) -> None:
    if not dialects:
        raise GatewayError("the gateway was given no dialect; give one at least, as those in DIALECTS")
    speakers: dict[tuple[str, str], str] = {}
    for dialect in dialects:
        for route in dialect.routes:
            key = (route.method, route.path)
            if key in speakers:
                raise GatewayError(
                    f"{route.method} {route.path} is a route of the dialects {speakers[key]} and {dialect.name}; "
                    "give each route to one of them"
                )
            speakers[key] = dialect.name


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
        session = self._sessions.find(self._dialect.credential(http.headers), self._dialect.credential_form)
        body = await self._read_body(http)
        if session.closed:
            raise refuse_closed_session()
        try:
            request = self._dialect.parse(body, session.memory)
            pending = await session.ask(request.chat, stream=request.stream)
        except RecursionError as error:
            raise RefusedError(400, "the body is nested too deeply; send it flatter", code="invalid_json") from error
        reply_id = self._dialect.reply_id(pending.id)
        head = ReplyHead(id=reply_id, created=int(time.time()), model=self._service.config.model_name)
        timeout_s = self._service.config.request_timeout_s
        late = RefusedError(504, f"no answer within {timeout_s:g} s; try again later", code="timeout")
        deadline = asyncio.get_running_loop().call_later(timeout_s, pending.abandon, late)
        try:
            if request.stream:
                return await self._stream(http, head, request, pending, session.memory)
            reply = await pending.wait_reply()
            _keep_history(session.memory, head, request, reply)
            return web.json_response(self._dialect.response(head, request, reply))
        finally:
            deadline.cancel()
            # Does nothing once the answer is there; else the agent went away, and its tokens are recorded as such.
            pending.abandon(RefusedError(499, "the agent closed the connection", code="cancelled"))

    async def _stream(
        self, http: web.Request, head: ReplyHead, request: ParsedRequest, pending: PendingReply, memory: ReplyMemory
    ) -> web.StreamResponse:
        words = self._dialect.stream(head, request)
        # Waited for before any byte is sent, so that a request that fails gets a proper status.
        deltas = await pending.wait_deltas()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        try:
            await response.prepare(http)
            await self._send(response, words.start())
            try:
                while deltas:
                    await self._send(response, [event for delta in deltas for event in words.delta(delta)])
                    deltas = await pending.wait_deltas()
                reply = await pending.wait_reply()
                # Before the end is sent: the next request may follow at once.
                _keep_history(memory, head, request, reply)
                last = words.end(reply)
            except RefusedError as refusal:
                last = words.error(refusal)
            await self._send(response, last)
            await response.write_eof()
        except (ConnectionResetError, TimeoutError):
            # The agent went away, or no longer reads; what was drawn for it is recorded all the same.
            if http.transport is not None:
                http.transport.abort()
        return response

    async def _send(self, response: web.StreamResponse, events: Sequence[Event]) -> None:
        async with asyncio.timeout(self._service.config.body_timeout_s):
            await response.write(_frame(events))

    async def _read_body(self, http: web.Request) -> dict[str, Any]:
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


def _word_errors(dialects: Sequence[Dialect]) -> Middleware:
    """Words aiohttp's own refusals (no such page, wrong method) as the dialect whose path it is words every error."""

    @web.middleware
    async def word_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            refusal = RefusedError(error.status, f"{request.method} {request.path}: {error.reason}", code="not_served")
            dialect = _find_dialect(dialects, request.path)
            return web.json_response(dialect.error(refusal), status=error.status)

    return word_errors


def _find_dialect(dialects: Sequence[Dialect], path: str) -> Dialect:
    """The dialect of the longest route that covers ``path``; the first one where none does."""
    covering = [(len(route.path), d) for d in dialects for route in d.routes if route.covers(path)]
    return max(covering, key=lambda found: found[0])[1] if covering else dialects[0]


def _keep_history(memory: ReplyMemory, head: ReplyHead, request: ParsedRequest, reply: Reply) -> None:
    if request.keep:
        memory.remember(head.id, (*request.chat.messages, reply.message))


def _frame(events: Sequence[Event]) -> bytes:
    return "".join(
        f"data: {data}\n\n" if name is None else f"event: {name}\ndata: {data}\n\n" for name, data in events
    ).encode()

"""The gateway's routes: one handler for every wire format, and the few pages beside them."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from aiohttp import web

from forgejax.chat.reply import Delta, Reply, list_deltas
from forgejax.errors import GatewayError
from forgejax.gateway.asked import make_asked
from forgejax.gateway.dialects import Dialect
from forgejax.gateway.dialects.base import Event, Page, ParsedRequest, ReplyHead, ReplyStream, remember_reply
from forgejax.gateway.history.retries import RetryHints
from forgejax.gateway.http.bodies import read_body
from forgejax.gateway.http.deliveries import Deliveries
from forgejax.gateway.http.doors import allow_origin, list_paths, word_errors
from forgejax.gateway.keys import KEYED, get_logger
from forgejax.gateway.pending import PendingReply
from forgejax.gateway.refusals import RefusedError
from forgejax.gateway.service import Service
from forgejax.gateway.session_table import SessionFinder
from forgejax.gateway.sessions import SessionLog
from forgejax.gateway.side_calls.canned import Answering

_log = get_logger(__name__)
_SSE = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
_STATUS_S = 0.05  # a stream waits so long for its first token before it answers 200


def build_app(
    service: Service, sessions: SessionFinder, dialects: Sequence[Dialect], deliveries: Deliveries
) -> web.Application:
    """An application that serves ``sessions`` in every one of ``dialects``.

    Raises GatewayError where there is none, or two of them have a route in common.
    """
    _check_routes(dialects)
    config, metrics = service.config, service.metrics
    app = web.Application(client_max_size=config.limits.body_bytes, middlewares=[word_errors(dialects, metrics)])
    app.on_response_prepare.append(allow_origin)
    for dialect in dialects:
        handler = ChatHandler(service, sessions, dialect, deliveries)
        for route in dialect.routes:
            for path in list_paths(route.path):
                app.router.add_route(route.method, path, handler.handle)
        for page in dialect.pages:
            for path in list_paths(page.path):
                app.router.add_route(page.method, path, handler.serve(page))
    model = {
        "id": config.model_name,
        "object": "model",
        "type": "model",
        "display_name": config.model_name,
        "created": 0,
        "created_at": "1970-01-01T00:00:00Z",
        "owned_by": "forgejax",
        "context_length": service.context_length,
        "max_model_len": service.context_length,
    }

    async def list_models(_: web.Request) -> web.Response:
        name = config.model_name
        page = {"object": "list", "data": [model], "first_id": name, "last_id": name, "has_more": False}
        return web.json_response(page)

    async def show_model(http: web.Request) -> web.Response:
        # Agents are answered under whatever name they ask for, so every name is the policy's.
        return web.json_response(model | {"id": http.match_info["name"].rstrip("/")})

    async def show_health(_: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def show_metrics(_: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), headers={"Content-Type": metrics.content_type})

    app.router.add_get("/", show_health)  # and HEAD, which some agents send first
    app.router.add_get("/health", show_health)
    app.router.add_get(KEYED, show_health)
    app.router.add_get("/metrics", show_metrics)
    for path in list_paths("/v1/models"):
        app.router.add_get(path, list_models)
    for path in list_paths("/v1/models/{name:.+}"):
        app.router.add_get(path, show_model)
    return app


def _check_routes(dialects: Sequence[Dialect]) -> None:
    if not dialects:
        raise GatewayError("the gateway was given no dialect; give one at least, as those in DIALECTS")
    speakers: dict[tuple[str, str], str] = {}
    for dialect in dialects:
        taken = [(route.method, route.path) for route in dialect.routes]
        for key in taken + [(page.method, page.path) for page in dialect.pages]:
            if key in speakers:
                raise GatewayError(
                    f"{' '.join(key)} is a route of the dialects {speakers[key]} and {dialect.name}; "
                    "give each route to one of them"
                )
            speakers[key] = dialect.name


class ChatHandler:
    """Reads a request, samples for its session and writes the answer in its wire format."""

    def __init__(self, service: Service, sessions: SessionFinder, dialect: Dialect, deliveries: Deliveries) -> None:
        self._service = service
        self._sessions = sessions
        self._dialect = dialect
        self._deliveries = deliveries

    async def handle(self, http: web.Request) -> web.StreamResponse:
        """Answers a request for a reply."""
        arrived = time.monotonic()
        try:
            session = self._find_session(http)
            with self._admit(http, session):
                return await self._answer(http, session, await read_body(http, self._service.config))
        except RecursionError as error:
            raise RefusedError(400, "the body is nested too deeply; send it flatter", code="invalid_json") from error
        finally:
            self._service.metrics.request_s.observe(time.monotonic() - arrived)

    def serve(self, page: Page) -> Any:
        """A handler of a page that samples nothing."""

        async def answer(http: web.Request) -> web.Response:
            session = self._find_session(http)
            with self._admit(http, session):
                body = await read_body(http, self._service.config) if page.method in ("POST", "PUT") else {}
                self._service.limits.check_body(body)
                return web.json_response(await page.answer(session, body, dict(http.match_info)))

        return answer

    def _find_session(self, http: web.Request) -> SessionLog:
        key = http.match_info.get("key") or self._dialect.credential(http.headers)
        return self._sessions.find(key, self._dialect.credential_form)

    def _admit(self, http: web.Request, session: SessionLog) -> AbstractContextManager[None]:
        limits = self._service.config.limits
        size = limits.body_bytes if http.content_length is None else min(http.content_length, limits.body_bytes)
        return self._service.limits.admit(session.budget, size)

    async def _answer(self, http: web.Request, session: SessionLog, body: dict[str, Any]) -> web.StreamResponse:
        if session.refusal is not None:
            raise session.refusal
        self._service.limits.check_body(body)
        request = self._dialect.parse(body, session.memory)
        for field in request.ignored:
            self._service.metrics.ignored.labels(self._dialect.name, field).inc()
        try:
            hints = RetryHints.read(http.headers)
            pending = await session.ask(make_asked(self._service.side_calls, self._dialect, request, hints))
        except RefusedError as refusal:
            if request.stream and refusal.code in self._dialect.streamed_failures:
                return await self._stream_refusal(http, request, refusal)
            raise
        head = ReplyHead(
            id=self._dialect.reply_id(pending.id),
            created=int(time.time()),
            model=self._service.config.model_name,
            prompt_tokens=pending.prompt_tokens,
        )
        timeout_s = self._service.config.request_timeout_s
        late = RefusedError(504, f"no answer within {timeout_s:g} s; try again later", code="timeout")
        deadline = asyncio.get_running_loop().call_later(timeout_s, pending.abandon, late)
        delivered = False
        try:
            if request.stream:
                response, delivered = await self._stream(http, head, request, pending, session)
                return response
            reply = await pending.wait_reply()
            answer = self._dialect.response(head, request, reply)
            if not session.closed:
                remember_reply(session.memory, head, request, reply, answer)
            whole = web.json_response(answer)
            await whole.prepare(http)
            await whole.write_eof()
            delivered = True
            return whole
        except ConnectionResetError as error:
            raise RefusedError(499, "the agent closed the connection", code="cancelled") from error
        finally:
            deadline.cancel()
            if pending.answered:
                self._deliveries.note_answer(http.transport, pending, written=delivered)
            # Does nothing once the answer is there; else the agent went away, and its tokens are recorded as such.
            pending.abandon(RefusedError(499, "the agent closed the connection", code="cancelled"))

    async def _stream_refusal(
        self, http: web.Request, request: ParsedRequest, refusal: RefusedError
    ) -> web.StreamResponse:
        reply_id = self._dialect.reply_id(f"refused-{secrets.token_hex(8)}")
        head = ReplyHead(id=reply_id, created=int(time.time()), model=self._service.config.model_name)
        words = self._dialect.stream(head, request)
        response = web.StreamResponse(headers=_SSE)
        await response.prepare(http)
        await self._send(response, _frame([*words.start(), *words.error(refusal)]))
        await response.write_eof()
        return response

    async def _stream(
        self, http: web.Request, head: ReplyHead, request: ParsedRequest, pending: Answering, session: SessionLog
    ) -> tuple[web.StreamResponse, bool]:
        """The response, and whether all of it was written."""
        words = self._dialect.stream(head, request)
        # An engine that fails at once gets a proper status; else the headers must not wait for the first token.
        first = await pending.wait_deltas(_STATUS_S)
        response = web.StreamResponse(headers=_SSE)
        try:
            await response.prepare(http)
            await self._send(response, _frame(words.start()))
            try:
                reply = await self._stream_deltas(response, words, pending, first)
                # Before the end is sent: the next request may follow at once.
                if not session.closed:
                    answer = self._dialect.response(head, request, reply)
                    remember_reply(session.memory, head, request, reply, answer)
                last = words.end(reply)
            except RefusedError as refusal:
                last = words.error(refusal)
            except (ConnectionResetError, TimeoutError):
                raise
            except Exception:  # noqa: BLE001 (a bug of ours is the agent's 500 and our log's traceback)
                _log.exception("request %s failed within its stream", pending.id)
                last = words.error(RefusedError(500, "the gateway failed; its log says why", code="internal_error"))
            # In one piece, so that whoever has read the last event has read all.
            async with asyncio.timeout(self._service.config.body_timeout_s):
                await response.write_eof(_frame(last))
        except (ConnectionResetError, TimeoutError):
            # The agent went away, or no longer reads; what was drawn for it is recorded all the same.
            if http.transport is not None:
                http.transport.abort()
            return response, False
        return response, True

    async def _stream_deltas(
        self, response: web.StreamResponse, words: ReplyStream, pending: Answering, first: Sequence[Delta]
    ) -> Reply:
        deltas = first
        if pending.replayed:
            deltas = list_deltas(await pending.wait_reply())
        while deltas:
            if deltas is PendingReply.SILENCE:
                await self._send(response, b": still drawing\n\n")
            else:
                await self._send(response, _frame(event for delta in deltas for event in words.delta(delta)))
            deltas = await pending.wait_deltas(self._service.config.heartbeat_s)
        return await pending.wait_reply()

    async def _send(self, response: web.StreamResponse, data: bytes) -> None:
        if data:
            async with asyncio.timeout(self._service.config.body_timeout_s):
                await response.write(data)


def _frame(events: Iterable[Event]) -> bytes:
    return "".join(
        f"data: {data}\n\n" if name is None else f"event: {name}\ndata: {data}\n\n" for name, data in events
    ).encode()

"""Sessions: whose request it is, what it is sampled with, and the turns that are recorded."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, replace

from forgejax.chat.format import ChatFormat
from forgejax.chat.messages import ChatRequest
from forgejax.chat.reply import Reply
from forgejax.chat.reply_builder import ReplyBuilder
from forgejax.chat.template import TemplateError
from forgejax.chat.tool_calls import PlainTextFormat, ToolCallFormat
from forgejax.errors import GatewayError
from forgejax.gateway.config import GatewayConfig
from forgejax.gateway.conversation import Conversation, Prompt
from forgejax.gateway.metrics import GatewayMetrics
from forgejax.gateway.pending import Flight
from forgejax.gateway.refusals import RefusedError
from forgejax.types import Completion, Sampler, SampleRequest, SessionSpec, Turn

_CLOSED_KEPT = 64  # sessions that can be closed again; their turns take memory
_KEYS_KEPT = 1024  # of sessions closed before those
_LONG_CHARACTERS = 20_000  # some 10 ms of encoding


@dataclass(frozen=True, kw_only=True)
class Service:
    """What every session shares. ``tool_format`` is None where the policy knows no way to call tools."""

    sampler: Sampler
    chat_format: ChatFormat
    tool_format: ToolCallFormat | None
    context_length: int
    config: GatewayConfig
    metrics: GatewayMetrics


class SessionLog:
    """One session: asks the engine for it and records every completion the engine returns, in exactly one turn.

    Turns are numbered by the arrival of their request; requests that brought no token leave a gap until ``turns``.
    """

    def __init__(self, service: Service, spec: SessionSpec) -> None:
        self.id = secrets.token_hex(8)
        self.api_key = f"fjx-{secrets.token_urlsafe(24)}"
        self._service = service
        self._spec = spec
        self._conversation = Conversation(service.chat_format)
        self._arrived = 0
        self._flights: set[Flight] = set()
        self._turns: dict[int, Turn] = {}  # by number; index and parent are numbers, too
        self._closed_with: tuple[Turn, ...] | None = None
        self.closed = False

    async def ask(self, chat: ChatRequest) -> Flight:
        """Sends a request on its way. Raises RefusedError where it cannot be sampled."""
        requested_at = time.monotonic()
        tool_format = self._tool_format(chat)
        number = self._arrived
        self._arrived += 1
        prompt = await self._prompt(chat)
        request = self._sample_request(chat, prompt, number)
        service = self._service
        if prompt.branch is not None:
            service.metrics.branches.labels(prompt.branch).inc()
        builder = ReplyBuilder(service.chat_format, tool_format, chat, number)

        def landed(completion: Completion, reply: Reply, abandoned: bool) -> None:
            self._conversation.answered(number, prompt, completion, None if abandoned else reply.message)
            if len(completion.token_ids) > 0:
                self._turns[number] = Turn(
                    index=number,
                    completion=completion,
                    parent=prompt.parent,
                    requested_at=requested_at,
                    finished_at=time.monotonic(),
                    requested_law=chat.law,
                    untrainable=_untrainable(completion, abandoned),
                    tool_calls=builder.calls,
                    malformed_tool_calls=len(builder.malformed),
                )
            _count(service.metrics, completion, builder)

        flight = Flight(
            sampler=service.sampler,
            request=request,
            builder=builder,
            live=chat.stream or bool(chat.stop),
            grace_s=service.config.cancel_grace_s,
            landed=landed,
        )
        self._flights.add(flight)
        service.metrics.in_flight.inc()
        flight.task.add_done_callback(lambda _: self._left(flight))
        return flight

    async def close(self) -> tuple[Turn, ...]:
        """Ends the open requests and gives the turns, renumbered 0, 1, 2, ..."""
        self.closed = True
        tasks = [flight.task for flight in self._flights]
        for flight in tuple(self._flights):
            flight.abandon(session_closed())
        if tasks:
            # Twice the grace: an engine that ignores even the cancellation must not hold up the episode.
            await asyncio.wait(tasks, timeout=2 * self._service.config.cancel_grace_s)
        if self._closed_with is None:
            self._closed_with = self.turns()
        return self._closed_with

    def turns(self) -> tuple[Turn, ...]:
        index_of = {number: index for index, number in enumerate(sorted(self._turns))}
        return tuple(
            replace(turn, index=index_of[number], parent=None if turn.parent is None else index_of.get(turn.parent))
            for number, turn in sorted(self._turns.items())
        )

    async def _prompt(self, chat: ChatRequest) -> Prompt:
        """The prompt's ids; a long one is made on another thread, so that other sessions need not wait for it."""
        try:
            if sum(len(message["content"]) for message in chat.messages) < _LONG_CHARACTERS:
                return self._conversation.prompt(chat)
            prompt = await asyncio.to_thread(self._conversation.prompt, chat)
        except TemplateError as error:
            raise RefusedError(400, str(error), code="invalid_messages", param="messages") from error
        if self.closed:
            raise session_closed()
        return prompt

    def _tool_format(self, chat: ChatRequest) -> ToolCallFormat:
        if not chat.tools:
            return PlainTextFormat()
        if self._service.tool_format is None:
            raise RefusedError(
                400,
                "tools were sent, and the policy's chat template writes tool calls in no known format; set "
                "gateway.tool_format to the format the policy was trained on, or send no tools",
                code="tools_not_served",
                param="tools",
            )
        return self._service.tool_format

    def _left(self, flight: Flight) -> None:
        self._flights.discard(flight)
        self._service.metrics.in_flight.dec()
        if flight.abandoned:
            self._service.metrics.cancelled.inc()

    def _sample_request(self, chat: ChatRequest, prompt: Prompt, number: int) -> SampleRequest:
        room = self._service.context_length - len(prompt.ids)
        if room < 1:
            raise RefusedError(
                400,
                f"the prompt has {len(prompt.ids)} tokens and the context {self._service.context_length}, which leaves "
                "no room to answer; send fewer or shorter messages",
                code="context_length_exceeded",
                param="messages",
            )
        config = self._service.config
        asked = chat.max_tokens if chat.max_tokens is not None else config.max_tokens_default
        bounds = (room, asked, config.max_tokens_limit)
        return SampleRequest(
            request_id=f"{self.id}-{number}",
            prompt_ids=prompt.ids,
            max_tokens=min(bound for bound in bounds if bound is not None),
            law=chat.law if self._spec.law is None else self._spec.law,
            stop_ids=self._service.chat_format.stop_ids,
            seed=self._seed(chat, number),
            purpose=self._spec.purpose,
        )

    def _seed(self, chat: ChatRequest, number: int) -> int | None:
        if self._spec.seed is not None:
            return turn_seed(self._spec.seed, number)
        return None if chat.seed is None else chat.seed & 0x7FFFFFFF


class SessionTable:
    """Every open session, the last closed ones, and the keys of more, so that late requests are told what happened."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._by_key: dict[str, SessionLog] = {}
        self._by_id: dict[str, SessionLog] = {}
        self._closed: OrderedDict[str, SessionLog] = OrderedDict()
        self._late_keys: OrderedDict[str, None] = OrderedDict()

    def open(self, spec: SessionSpec) -> SessionLog:
        session = SessionLog(self._service, spec)
        self._by_key[session.api_key] = session
        self._by_id[session.id] = session
        self._service.metrics.sessions.inc()
        return session

    def find(self, api_key: str | None) -> SessionLog:
        """The open session of a key. Raises RefusedError: 410 for one that is closed, 401 for no or an unknown key."""
        session = None if api_key is None else self._by_key.get(api_key)
        if session is not None and not session.closed:
            return session
        if session is not None or api_key in self._late_keys:
            raise session_closed()
        if self._service.config.allow_anonymous:
            return SessionLog(self._service, SessionSpec(purpose="evaluation"))
        given = "no API key was sent" if api_key is None else "the API key is unknown"
        raise RefusedError(
            401, f"{given}; send the session's key as 'Authorization: Bearer KEY'", code="invalid_api_key"
        )

    async def close(self, session_id: str) -> tuple[Turn, ...]:
        """Closes a session and gives its turns; again the same turns for one closed lately."""
        session = self._by_id.get(session_id)
        if session is None:
            raise GatewayError(f"there is no session {session_id}; it was never opened, or closed long ago")
        if session.closed:
            return await session.close()
        turns = await session.close()
        self._service.metrics.sessions.dec()
        self._closed[session_id] = session
        if len(self._closed) > _CLOSED_KEPT:
            _, oldest = self._closed.popitem(last=False)
            del self._by_key[oldest.api_key], self._by_id[oldest.id]
            self._late_keys[oldest.api_key] = None
            if len(self._late_keys) > _KEYS_KEPT:
                self._late_keys.popitem(last=False)
        return turns

    async def close_all(self) -> None:
        await asyncio.gather(*(self.close(id_) for id_, session in tuple(self._by_id.items()) if not session.closed))


def session_closed() -> RefusedError:
    return RefusedError(410, "this session has ended; nothing more is answered under its key", code="session_closed")


def turn_seed(seed: int, number: int) -> int:
    """The seed of a session's request ``number``: independent between requests, equal between equal runs."""
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF


def _untrainable(completion: Completion, abandoned: bool) -> str | None:
    if abandoned:
        return "cancelled"
    return "sampling_law" if completion.law.truncated else None


def _count(metrics: GatewayMetrics, completion: Completion, builder: ReplyBuilder) -> None:
    metrics.turns.labels(completion.finish_reason.value).inc()
    metrics.prompt_tokens.inc(len(completion.prompt_ids))
    metrics.cached_tokens.inc(completion.cached_tokens)
    metrics.completion_tokens.inc(len(completion.token_ids))
    metrics.queued_s.observe(completion.queued_s)
    metrics.tool_calls.labels("well_formed").inc(builder.calls)
    metrics.tool_calls.labels("malformed").inc(len(builder.malformed))

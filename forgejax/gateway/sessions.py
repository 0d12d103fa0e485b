"""A session: what its requests are sampled with, the turns that are recorded, and what it remembers."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from dataclasses import dataclass, replace

from forgejax.chat.format import ChatFormat
from forgejax.chat.messages import ChatRequest
from forgejax.chat.reply import Reply
from forgejax.chat.reply_builder import ReplyBuilder
from forgejax.chat.template import TemplateError
from forgejax.chat.tool_calls import PlainTextFormat, ToolCallFormat
from forgejax.gateway.config import GatewayConfig
from forgejax.gateway.conversation import Conversation, LocatedRequest, Prompt
from forgejax.gateway.memory import ReplyMemory
from forgejax.gateway.metrics import GatewayMetrics
from forgejax.gateway.pending import PendingReply
from forgejax.gateway.refusals import OverflowRefusedError, RefusedError, refuse_closed_session
from forgejax.gateway.retries import AnswerLog, RetryHints
from forgejax.types import Completion, Sampler, SampleRequest, SessionSpec, Turn

_LONG_CHARACTERS = 20_000  # some 10 ms of encoding
_UNDELIVERED = "undelivered"


@dataclass(frozen=True, kw_only=True)
class Service:
    """What every session shares. ``tool_format`` is None where the policy knows no way to call tools; ``tell_tools``
    says that the chat template prints none, so that the policy must be told of them."""

    sampler: Sampler
    chat_format: ChatFormat
    tool_format: ToolCallFormat | None
    tell_tools: bool
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
        example = None if service.tool_format is None or not service.tell_tools else service.tool_format.example
        self._conversation = Conversation(service.chat_format, example)
        self._answers = AnswerLog()
        self._arrived = 0
        self._pending: set[PendingReply] = set()
        self._turns: dict[int, Turn] = {}  # by number; index and parent are numbers, too
        self._closed_with: tuple[Turn, ...] | None = None
        self.closed = False
        self.memory = ReplyMemory()

    async def ask(self, chat: ChatRequest, *, stream: bool, hints: RetryHints) -> PendingReply:
        """Sends a request on its way, or gives the recorded answer of one that is sent again. Raises RefusedError
        where it cannot be sampled.

        With ``stream`` its deltas come while they are drawn, else when the reply is complete.
        """
        requested_at = time.monotonic()
        tool_format = self._choose_tool_format(chat)
        located = self._conversation.locate(chat)
        recorded = self._answers.find(located, hints)
        if recorded is not None:
            self._service.metrics.retries.inc()
            recorded.replayed = True
            return recorded
        number = self._arrived
        self._arrived += 1
        prompt = await self._render_prompt(located)
        if chat.calls == "required":
            prompt = self._conversation.force_beginning(prompt, _open_call(chat, tool_format))
        request = self._make_request(chat, prompt, number, live=stream or bool(chat.stop))
        service = self._service
        if prompt.branch is not None:
            service.metrics.branches.labels(prompt.branch).inc()
        signature = f"turn-{self.id}-{number}"
        builder = ReplyBuilder(
            service.chat_format, tool_format, chat, number=number, signature=signature, thinking=prompt.thinking
        )

        def record(completion: Completion, reply: Reply, abandoned: bool) -> None:
            said = None if abandoned else reply.message
            self._conversation.add_turn(number, prompt, completion, said, signature)
            if len(completion.token_ids) > 0:
                malformed = len(builder.malformed)
                self._turns[number] = Turn(
                    index=number,
                    completion=completion,
                    parent=prompt.parent,
                    requested_at=requested_at,
                    finished_at=time.monotonic(),
                    requested_law=chat.law,
                    untrainable=_judge_untrainable(completion, abandoned),
                    tool_calls=_count_well_formed(reply),
                    malformed_tool_calls=malformed,
                )
            _count(service.metrics, completion, reply, builder)

        pending = PendingReply(
            sampler=service.sampler,
            request=request,
            builder=builder,
            begun=builder.begin(prompt.forced),
            live=not request.repeatable,
            grace_s=service.config.cancel_grace_s,
            record=record,
        )
        self._answers.add(located, hints, number, pending)
        self._pending.add(pending)
        service.metrics.in_flight.inc()
        pending.task.add_done_callback(lambda _: self._drop(pending))
        return pending

    async def count_tokens(self, chat: ChatRequest) -> int:
        """How many tokens the prompt of ``chat`` would have. Raises RefusedError."""
        self._choose_tool_format(chat)
        return len((await self._render_prompt(self._conversation.locate(chat))).ids)

    async def close(self) -> tuple[Turn, ...]:
        """Ends the open requests and gives the turns, renumbered 0, 1, 2, ..."""
        self.closed = True
        self.memory.forget()
        tasks = [pending.task for pending in self._pending]
        for pending in tuple(self._pending):
            pending.abandon(refuse_closed_session())
        if tasks:
            # Twice the grace: an engine that ignores even the cancellation must not hold up the episode.
            await asyncio.wait(tasks, timeout=2 * self._service.config.cancel_grace_s)
        if self._closed_with is None:
            self._closed_with = self.turns()
            self._conversation.forget()
            self._answers.forget()
        return self._closed_with

    def turns(self) -> tuple[Turn, ...]:
        index_of = {number: index for index, number in enumerate(sorted(self._turns))}
        followed = {turn.parent for turn in self._turns.values()}
        unread = self._answers.list_undelivered() - followed  # whoever went on from a reply has read it
        return tuple(
            replace(
                turn,
                index=index_of[number],
                parent=None if turn.parent is None else index_of.get(turn.parent),
                untrainable=turn.untrainable or (_UNDELIVERED if number in unread else None),
            )
            for number, turn in sorted(self._turns.items())
        )

    async def _render_prompt(self, located: LocatedRequest) -> Prompt:
        """The prompt's ids; a long one is made on another thread, so that other sessions need not wait for it."""
        chat = located.chat
        try:
            if _measure(chat) < _LONG_CHARACTERS:
                return self._conversation.make_prompt(located)
            prompt = await asyncio.to_thread(self._conversation.make_prompt, located)
        except TemplateError as error:
            raise RefusedError(400, str(error), code="invalid_messages", param="messages") from error
        if self.closed:
            raise refuse_closed_session()
        return prompt

    def _choose_tool_format(self, chat: ChatRequest) -> ToolCallFormat:
        if not chat.tools or chat.calls == "none":
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

    def _drop(self, pending: PendingReply) -> None:
        self._pending.discard(pending)
        self._service.metrics.in_flight.dec()
        if pending.abandoned:
            self._service.metrics.cancelled.inc()

    def _make_request(self, chat: ChatRequest, prompt: Prompt, number: int, *, live: bool) -> SampleRequest:
        room = self._service.context_length - len(prompt.ids)
        if room < 1:
            raise OverflowRefusedError(len(prompt.ids), self._service.context_length)
        config = self._service.config
        asked = chat.max_tokens if chat.max_tokens is not None else config.max_tokens_default
        bounds = (room, asked, config.max_tokens_limit)
        return SampleRequest(
            request_id=f"{self.id}-{number}",
            session_id=self.id,
            prompt_ids=prompt.ids,
            max_tokens=min(bound for bound in bounds if bound is not None),
            law=chat.law if self._spec.law is None else self._spec.law,
            stop_ids=self._service.chat_format.stop_ids,
            seed=self._choose_seed(chat, number),
            purpose=self._spec.purpose,
            repeatable=not live,
        )

    def _choose_seed(self, chat: ChatRequest, number: int) -> int | None:
        if self._spec.seed is not None:
            return derive_seed(self._spec.seed, number)
        return None if chat.seed is None else chat.seed & 0x7FFFFFFF


def derive_seed(seed: int, number: int) -> int:
    """The seed of a session's request ``number``: independent between requests, equal between equal runs."""
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") & 0x7FFFFFFF


def _open_call(chat: ChatRequest, tool_format: ToolCallFormat) -> str:
    """The beginning of a call that must be made: its name as well, where there is one tool to call."""
    names = [tool["function"]["name"] for tool in chat.callable_tools]
    return tool_format.open_call(names[0] if len(names) == 1 else None)


def _measure(chat: ChatRequest) -> int:
    """Roughly the characters of a prompt."""
    said = sum(len(m.text) + len(m.reasoning) + sum(len(c.raw) for c in m.tool_calls) for m in chat.messages)
    return said + sum(len(str(tool)) for tool in chat.tools)


def _judge_untrainable(completion: Completion, abandoned: bool) -> str | None:
    if abandoned:
        return "cancelled"
    return "sampling_law" if completion.law.truncated else None


def _count_well_formed(reply: Reply) -> int:
    return sum(call.problem is None for call in reply.message.tool_calls)


def _count(metrics: GatewayMetrics, completion: Completion, reply: Reply, builder: ReplyBuilder) -> None:
    metrics.turns.labels(completion.finish_reason.value).inc()
    metrics.prompt_tokens.inc(len(completion.prompt_ids))
    metrics.cached_tokens.inc(completion.cached_tokens)
    metrics.completion_tokens.inc(len(completion.token_ids))
    metrics.queued_s.observe(completion.queued_s)
    metrics.tool_calls.labels("well_formed").inc(_count_well_formed(reply))
    metrics.tool_calls.labels("malformed").inc(len(builder.malformed))

"""A session: its requests on their way through the engine, the turns that are recorded, and what it remembers."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from forgejax.chat.messages import ChatRequest, Message
from forgejax.chat.reply import Reply
from forgejax.chat.reply_builder import ReplyBuilder
from forgejax.chat.template import TemplateError
from forgejax.chat.tool_calls import ToolCallFormat
from forgejax.gateway.asked import AskedRequest
from forgejax.gateway.history.conversation import Conversation, LocatedRequest, Prompt
from forgejax.gateway.history.retries import AnswerLog
from forgejax.gateway.history.turns import (
    count_well_formed,
    judge_untrainable,
    measure_chat,
    measure_text,
    measure_turn,
    name_branch,
    renumber_turns,
)
from forgejax.gateway.keys import make_key
from forgejax.gateway.memory import ReplyMemory
from forgejax.gateway.pending import PendingReply
from forgejax.gateway.records.base import RecordedDraw
from forgejax.gateway.refusals import RefusedError, refuse_closed_session, refuse_late_session
from forgejax.gateway.sampling import bind_reply, choose_call_format, make_sample_request, open_call
from forgejax.gateway.service import Service
from forgejax.gateway.side_calls.canned import Answering, CannedReply
from forgejax.types import Completion, SampleRequest, SessionSpec, Turn

_LONG_CHARACTERS = 20_000  # some 10 ms of encoding


class SessionLog:
    """One session: asks the engine for it and records every completion the engine returns, in exactly one turn.

    Turns are numbered by the arrival of their request; requests that brought no token leave a gap until ``turns``. One
    that is not ``kept`` is let go of after its request, and nothing of it counts as stored.
    """

    def __init__(
        self, service: Service, spec: SessionSpec, *, session_id: str | None = None, kept: bool = True
    ) -> None:
        self.id = secrets.token_hex(8) if session_id is None else session_id
        self.api_key = make_key()
        self.budget = service.limits.make_budget(f"session {self.id} of task {spec.task_id or 'unnamed'}")
        self._kept = kept
        self._late: RefusedError | None = None
        self._timer: asyncio.TimerHandle | None = None
        if spec.deadline_s is not None:
            self._timer = asyncio.get_running_loop().call_later(spec.deadline_s, self._expire)
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
        self._canned = 0
        self._record = service.records.open(self.id, spec)

    @property
    def refusal(self) -> RefusedError | None:
        """Why nothing is answered any more: the session is closed, or its deadline has passed."""
        return refuse_closed_session() if self.closed else self._late

    async def ask(self, asked: AskedRequest) -> Answering:
        """Sends a request on its way, or gives the recorded answer of one that is sent again, or that of a rule for
        side calls. Raises RefusedError where it cannot be sampled.

        Where it streams, its deltas come while they are drawn, else when the reply is complete.
        """
        ask = self._record.begin(asked, self._answers.list_undelivered(), self._answers.list_left())
        rule = asked.side_call
        if rule is not None:
            self._service.metrics.side_calls.labels(rule.name, "canned" if rule.canned else "policy").inc()
        if rule is not None and rule.canned:
            self._record.can(ask, rule)
            self._canned += 1
            return CannedReply(f"{self.id}-side{self._canned}", rule.answer)
        try:
            return await self._sample(asked, ask)
        except RefusedError as refusal:
            self._record.refuse(ask, refusal)
            raise

    async def _sample(self, asked: AskedRequest, ask: int) -> PendingReply:
        requested_at = time.monotonic()
        chat = asked.chat
        tool_format = choose_call_format(self._service, chat)
        located = self._conversation.locate(chat)
        recorded = self._answers.find(located, asked.hints)
        if recorded is not None:
            self._service.metrics.retries.inc()
            recorded.replayed = True
            self._record.repeat(ask, int(recorded.id.rpartition("-")[2]))
            return recorded
        number = self._arrived
        self._arrived += 1
        try:
            prompt = await self._render_prompt(located)
            if chat.calls == "required":
                prompt = self._conversation.force_beginning(prompt, open_call(chat, tool_format))
            grammar = await bind_reply(self._service, chat, tool_format, prompt)
        except asyncio.CancelledError:
            self._record.fail(ask, number, "cancelled")
            raise
        if grammar is not None and self.refusal is not None:
            raise self.refusal
        live = asked.stream or bool(chat.stop)
        request = make_sample_request(
            self._service, self._spec, chat, prompt, grammar, session_id=self.id, number=number, live=live
        )
        pending = self._send(
            asked, located, tool_format, prompt, request, ask=ask, number=number, requested_at=requested_at
        )
        self._answers.add(located, asked.hints, number, pending)
        return pending

    def _send(
        self,
        asked: AskedRequest,
        located: LocatedRequest,
        tool_format: ToolCallFormat,
        prompt: Prompt,
        request: SampleRequest,
        *,
        ask: int,
        number: int,
        requested_at: float,
    ) -> PendingReply:
        chat, service = asked.chat, self._service
        if prompt.branch is not None and asked.side_call is None:
            service.metrics.branches.labels(prompt.branch).inc()
        signature = f"turn-{self.id}-{number}"
        builder = ReplyBuilder(
            service.chat_format, tool_format, chat, number=number, signature=signature, thinking=prompt.thinking
        )
        side_reason = None if asked.side_call is None else asked.side_call.reason

        def record(completion: Completion, reply: Reply, abandoned: bool) -> None:
            said = None if abandoned else reply.message
            self._conversation.add_turn(number, prompt, completion, said, signature)
            turn = None
            if len(completion.token_ids) > 0:
                turn = Turn(
                    index=number,
                    completion=completion,
                    parent=prompt.parent,
                    requested_at=requested_at,
                    finished_at=time.monotonic(),
                    requested_law=chat.law,
                    branch=name_branch(prompt.branch, asked.body),
                    untrainable=side_reason or judge_untrainable(request, completion, abandoned),
                    tool_calls=count_well_formed(reply),
                    malformed_tool_calls=len(builder.malformed),
                )
                self._turns[number] = turn
            drawn = RecordedDraw(
                number=number, prompt=prompt, request=request, completion=completion, turn=turn, abandoned=abandoned
            )
            self._record.draw(ask, drawn)
            service.metrics.count_turn(completion, count_well_formed(reply), len(builder.malformed))
            service.metrics.bound.inc(request.grammar is not None)
            self._store(measure_turn(completion, located))

        pending = PendingReply(
            sampler=service.sampler,
            request=request,
            builder=builder,
            begun=builder.begin(prompt.forced),
            live=not request.repeatable,
            grace_s=service.config.cancel_grace_s,
            record=record,
        )
        self._pending.add(pending)
        service.metrics.in_flight.inc()
        pending.task.add_done_callback(lambda task: self._drop(pending, task, ask, number))
        return pending

    async def count_tokens(self, chat: ChatRequest) -> int:
        """How many tokens the prompt of ``chat`` would have. Raises RefusedError."""
        choose_call_format(self._service, chat)
        return len((await self._render_prompt(self._conversation.locate(chat))).ids)

    def remember(self, reply_id: str, history: Sequence[Message], reply: Message, body: Mapping[str, Any]) -> None:
        """Keeps a reply under its id, for agents that send only what is new."""
        if self.refusal is None:
            self.memory.remember(reply_id, (*history, reply), body)
            self._store(measure_text(history))

    async def close(self) -> tuple[Turn, ...]:
        """Ends the open requests and gives the turns, renumbered 0, 1, 2, ..."""
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        self.memory.forget()
        tasks = [pending.task for pending in self._pending]
        for pending in tuple(self._pending):
            pending.abandon(refuse_closed_session())
        if tasks:
            # Twice the grace: an engine that ignores even the cancellation must not hold up the episode.
            await asyncio.wait(tasks, timeout=2 * self._service.config.cancel_grace_s)
        if self._closed_with is None:
            self._closed_with = self.turns()
            self._record.close(self._answers.list_undelivered())
            self._conversation.forget()
            self._answers.forget()
            self._service.limits.release(self.budget)
        return self._closed_with

    def _expire(self) -> None:
        self._late = refuse_late_session()
        for pending in tuple(self._pending):
            pending.abandon(self._late)

    def _store(self, added: int) -> None:
        if self._kept and not self.closed:
            self._service.limits.store(self.budget, added)

    def turns(self) -> tuple[Turn, ...]:
        return renumber_turns(self._turns, self._answers.list_undelivered())

    async def _render_prompt(self, located: LocatedRequest) -> Prompt:
        """The prompt's ids; a long one is made on another thread, so that other sessions need not wait for it."""
        chat = located.chat
        try:
            if measure_chat(chat) < _LONG_CHARACTERS:
                return self._conversation.make_prompt(located)
            prompt = await asyncio.to_thread(self._conversation.make_prompt, located)
        except TemplateError as error:
            raise RefusedError(400, str(error), code="invalid_messages", param="messages") from error
        if self.refusal is not None:
            raise self.refusal
        return prompt

    def _drop(self, pending: PendingReply, task: asyncio.Task[Reply], ask: int, number: int) -> None:
        self._pending.discard(pending)
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or error is not None:
            self._record.fail(ask, number, "cancelled" if error is None else str(error))
        self._service.metrics.in_flight.dec()
        if pending.abandoned:
            self._service.metrics.cancelled.inc()

"""Plays the lines of a record to a session, in their order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from forgejax.errors import EngineError, GatewayError
from forgejax.gateway.asked import make_asked
from forgejax.gateway.dialects.base import Dialect, ReplyHead, remember_reply
from forgejax.gateway.history.retries import RetryHints
from forgejax.gateway.pending import PendingReply
from forgejax.gateway.records.lines import AskLine, CloseLine, FailedLine, OpenLine, TurnLine
from forgejax.gateway.records.reader import RecordedSession
from forgejax.gateway.records.witness import Witness
from forgejax.gateway.refusals import RefusedError
from forgejax.gateway.service import Service
from forgejax.gateway.sessions import SessionLog
from forgejax.types import Completion, FinishReason, OnTokens, SampleRequest

_WAIT_S = 60.0
_GONE = RefusedError(499, "the agent closed the connection", code="cancelled")


@dataclass(kw_only=True, eq=False)
class PlayedAsk:
    """A request. ``pending`` is there once the sampler was asked for it; ``problem`` is what it was refused with."""

    task: asyncio.Task[None] | None = None
    pending: PendingReply | None = None
    problem: str | None = None


class Prompter:
    """A sampler that draws what it is told to: ``answers`` wait for it by request id, and ``abandoned`` are called when
    it is there. ``news`` is set whenever something was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, asyncio.Future[Completion]] = {}
        self.abandoned: dict[str, Callable[[], None]] = {}
        self.news = asyncio.Event()

    async def sample(self, request: SampleRequest, on_tokens: OnTokens | None = None) -> Completion:
        """See ``types.Sampler``."""
        answer = self.answers[request.request_id] = asyncio.get_running_loop().create_future()
        self.news.set()
        completion = await answer
        if on_tokens is not None and len(completion.token_ids):
            on_tokens(completion.token_ids.tolist())
        if request.request_id in self.abandoned:
            self.abandoned[request.request_id]()
        return replace(completion, prompt_ids=request.prompt_ids, law=request.law)


class Player:
    """Every request finds the turns that were there when it came: each line waits until what it tells of has happened.

    ``session`` must ask ``prompter`` and tell ``witness``.
    """

    def __init__(
        self,
        recorded: RecordedSession,
        service: Service,
        session: SessionLog,
        *,
        prompter: Prompter,
        witness: Witness,
        dialects: Mapping[str, Dialect],
    ) -> None:
        self._recorded, self._service, self._session = recorded, service, session
        self._prompter, self._witness, self._dialects = prompter, witness, dialects
        self.asks: dict[int, PlayedAsk] = {}

    async def play(self) -> None:
        """Plays all lines. Raises GatewayError where a request does not get on."""
        for line in self._recorded.lines:
            if isinstance(line, OpenLine):
                raise GatewayError(f"the record of session {line.session} begins twice; give one file a session")
            if isinstance(line, CloseLine):
                self._mark(line.unread, ())
            elif isinstance(line, AskLine):
                self._mark(line.unread, line.left)
                await self._ask(line)
            else:
                await self._end(line.ask, line if isinstance(line, TurnLine | FailedLine) else None)

    def _mark(self, unread: Iterable[int], left: Iterable[int]) -> None:
        for ask in self.asks.values():
            if ask.pending is not None:
                number = int(ask.pending.id.rpartition("-")[2])
                ask.pending.undelivered, ask.pending.left = number in unread, number in left

    async def _ask(self, line: AskLine) -> None:
        if line.dialect not in self._dialects:
            raise GatewayError(
                f"request {line.ask} was made in the dialect {line.dialect}; known are {', '.join(self._dialects)}"
            )
        ask = self.asks[line.ask] = PlayedAsk()
        ask.task = asyncio.create_task(self._serve(line, self._dialects[line.dialect], ask))
        await asyncio.sleep(0)  # by now it has found its place among the turns there are

    async def _serve(self, line: AskLine, dialect: Dialect, ask: PlayedAsk) -> None:
        session, body = self._session, self._recorded.bodies[line.ask]
        self._witness.next_ask = line.ask
        try:
            request = dialect.parse(body, session.memory)
            hints = RetryHints(count=line.retries, key=line.key)
            pending = await session.ask(make_asked(self._service.side_calls, dialect, request, hints))
            if isinstance(pending, PendingReply) and pending.id not in self._prompter.answers and not pending.answered:
                await self._wait_until(lambda: pending.id in self._prompter.answers, line.ask)
            if isinstance(pending, PendingReply):
                ask.pending = pending
                self._prompter.news.set()
            reply = await pending.wait_reply()
            head = ReplyHead(
                id=dialect.reply_id(pending.id),
                created=0,
                model=self._service.config.model_name,
                prompt_tokens=pending.prompt_tokens,
            )
            remember_reply(session.memory, head, request, reply, dialect.response(head, request, reply))
        except RefusedError as refusal:
            ask.problem = refusal.message
        finally:
            self._prompter.news.set()

    async def _end(self, number: int, line: TurnLine | FailedLine | None) -> None:
        """Lets a request end as it did: with a completion, a failure, or without having been sampled."""
        ask = self.asks[number]
        task = ask.task
        assert task is not None
        if ask.pending is None and isinstance(line, FailedLine) and line.why == "cancelled":
            task.cancel()  # be it that its schema still compiles, as it may have done then
        await self._wait_until(lambda: task.done() or ask.pending is not None, number)
        pending = ask.pending
        if pending is not None and not pending.task.done():
            answer = self._prompter.answers[pending.id]
            if isinstance(line, TurnLine):
                completion = self._recorded.completions[line.number]
                if line.abandoned and completion.finish_reason is not FinishReason.CANCELLED:
                    self._prompter.abandoned[pending.id] = lambda: pending.abandon(_GONE)
                answer.set_result(completion)
            elif line is None or line.why != "cancelled":
                answer.set_exception(EngineError("it was not sampled then" if line is None else line.why))
            else:
                pending.abandon(_GONE)
        await self._wait_until(task.done, number)
        if not task.cancelled():
            task.result()

    async def _wait_until(self, condition: Callable[[], bool], ask: int) -> None:
        try:
            async with asyncio.timeout(_WAIT_S):
                while not condition():
                    self._prompter.news.clear()
                    await self._prompter.news.wait()
        except TimeoutError as error:
            raise GatewayError(f"request {ask} did not get on within {_WAIT_S:g} s when it was played again") from error

"""A request on its way through the engine."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from forgejax.chat.reply import Delta, Reply, TextDelta
from forgejax.chat.reply_builder import ReplyBuilder
from forgejax.errors import EngineError, OverloadedError
from forgejax.gateway.refusals import RefusedError, refuse_overloaded
from forgejax.types import Completion, FinishReason, Sampler, SampleRequest

_ENGINE_RETRY_S = 2.0

RecordReply = Callable[[Completion, Reply, bool], None]
"""Records what the engine returned: the completion, the reply, and whether the request was abandoned."""


class PendingReply:
    """One request, sampled in a task of its own, so that an agent that goes away does not lose the tokens drawn for it.

    Belongs to the event loop it was made on; only the tokens may arrive on another thread (the engine's). With
    ``live`` the reply is built while it is drawn (to stream it, or to see a stop string), else when it is complete.
    ``begun`` is what of the reply is there before anything is drawn. ``record`` is called once for every completion the
    engine returned. Sessions keep these to the end, for what is asked again: once sampled, the request is let go of.
    """

    SILENCE: Sequence[Delta] = (TextDelta(part=-1, text=""),)
    """Stands for no deltas where there may be more; known by identity."""

    def __init__(
        self,
        *,
        sampler: Sampler,
        request: SampleRequest,
        builder: ReplyBuilder,
        begun: Sequence[Delta] = (),
        live: bool,
        grace_s: float,
        record: RecordReply,
    ) -> None:
        self._grace_s = grace_s
        self._loop = asyncio.get_running_loop()
        self._deltas: deque[Delta] = deque(begun)
        self._news = asyncio.Event()
        self.id = request.request_id
        self.prompt_tokens = len(request.prompt_ids)
        self._drawn = False
        self._abandoned: RefusedError | None = None
        self.undelivered = False  # the answer was complete, and the agent went away without it
        self.left = False  # the connection it was answered on is closed
        self.replayed = False  # this is a recorded answer, asked for again
        self.task = asyncio.create_task(self._sample(sampler, request, builder, record, live))
        self.task.add_done_callback(self._wake)

    @property
    def abandoned(self) -> bool:
        return self._abandoned is not None

    @property
    def answered(self) -> bool:
        """Whether the whole reply is there."""
        return not self.abandoned and self.task.done() and not self.task.cancelled() and self.task.exception() is None

    def abandon(self, why: RefusedError) -> None:
        """Ends the request; whoever waits for it gets ``why``.

        An engine that has begun to draw is asked to stop at its next token and hands back what it drew; one that has
        not, or does not stop within the grace, is cancelled.
        """
        if self._abandoned is None and not self.task.done():
            self._abandoned = why
            if self._drawn:
                self._loop.call_later(self._grace_s, self.task.cancel)
            else:
                self.task.cancel()

    async def wait_reply(self) -> Reply:
        """Waits for the whole reply. Raises RefusedError if there is none."""
        await asyncio.wait({self.task})
        return self._take_result()

    async def wait_deltas(self, silence_s: float | None = None) -> Sequence[Delta]:
        """Waits for more of the reply; an empty list is the end, and ``SILENCE`` that there was nothing for
        ``silence_s``. Raises RefusedError if the request fails."""
        while not self._deltas:
            if self.task.done():
                self._take_result()
                return []
            try:
                async with asyncio.timeout(silence_s):
                    await self._news.wait()
            except TimeoutError:
                return self.SILENCE
            self._news.clear()
        return [self._deltas.popleft() for _ in range(len(self._deltas))]

    async def _sample(
        self, sampler: Sampler, request: SampleRequest, builder: ReplyBuilder, record: RecordReply, live: bool
    ) -> Reply:
        def take_tokens(ids: Sequence[int]) -> bool:
            self._drawn = True
            if self._abandoned is not None:
                return True
            if not live:
                return False
            deltas = builder.feed(ids)
            if deltas:
                self._deltas.extend(deltas)
                self._loop.call_soon_threadsafe(self._news.set)
            return builder.stopped

        completion = await sampler.sample(request, take_tokens)
        deltas, reply = builder.finish(completion)
        self._deltas.extend(deltas)
        if completion.finish_reason is FinishReason.CANCELLED and self._abandoned is None:
            self._abandoned = RefusedError(503, "the engine cancelled the request; try again", code="engine_error")
        record(completion, reply, self._abandoned is not None)
        return reply

    def _wake(self, task: asyncio.Task[Reply]) -> None:
        self._news.set()
        if self.abandoned and not task.cancelled():
            task.exception()  # nobody may be left to ask for it

    def _take_result(self) -> Reply:
        if self._abandoned is not None:
            raise self._abandoned
        if self.task.cancelled():
            raise RefusedError(503, "the engine cancelled the request; try again", code="engine_error")
        error = self.task.exception()
        if isinstance(error, OverloadedError):
            raise refuse_overloaded("the engine", error.retry_after_s) from error
        if isinstance(error, EngineError):
            raise RefusedError(
                503, f"the engine failed: {error}", code="engine_error", retry_after_s=_ENGINE_RETRY_S
            ) from error
        return self.task.result()

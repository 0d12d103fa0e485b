"""The engine's own thread: continuous batching, cancellation, weight swaps in flight, prefix reuse, the token account.

It takes the place of JetStream's ``Driver``. Every request submitted here ends in exactly one way: a Completion, an
EngineError, or a cancelled future.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from forgejax.errors import EngineError
from forgejax.grammar import GrammarCompiler
from forgejax.rollout.driver.counters import Counters, DriverMetrics
from forgejax.rollout.driver.decoder import Decoder
from forgejax.rollout.driver.endings import Endings
from forgejax.rollout.driver.inbox import Inbox
from forgejax.rollout.driver.job import Job, OnDraw
from forgejax.rollout.driver.masks import prepare_grammar, start_matcher, start_watch
from forgejax.rollout.driver.request_log import RequestLog
from forgejax.rollout.driver.scheduler import Scheduler
from forgejax.rollout.engine.engine import PolicyEngine
from forgejax.rollout.engine.weights import PublishedWeights
from forgejax.types import Completion, FinishReason, SampleRequest

_logger = logging.getLogger(__name__)


class Driver:
    """Serves requests with one engine, from ``start`` to ``stop``. All public methods may be called from any thread."""

    def __init__(
        self,
        engine: PolicyEngine,
        params: Any = None,
        version: int = 0,
        request_log: RequestLog | None = None,
        grammars: GrammarCompiler | None = None,
    ):
        """``params`` are copied to the engine's device (None: random ones). The request log stays the caller's.

        Without ``grammars``, of the policy's vocabulary, requests with a grammar or stop strings are refused.
        """
        self.engine, self.request_log, self.grammars = engine, request_log, grammars
        self._box = engine.load_params(params, version)
        self._scheduler = Scheduler(engine.config.slots)
        self._counters = Counters()
        self._inbox = Inbox(self._scheduler, engine.config, engine.policy.vocab_size)
        self._endings = Endings(self._inbox, self._counters, request_log)
        self._thread = threading.Thread(target=self._run, name="rollout-driver", daemon=True)

    # -- Any thread ------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Begins to serve; once."""
        self._inbox.accept()
        self._thread.start()
        return self

    def submit(self, request: SampleRequest, on_draw: OnDraw | None = None) -> Future[Completion]:
        """Queues a request. Cancelling the future frees its slot and pages before the next step, also in mid-prompt.

        Raises EngineError at once for a request that cannot be served, OverloadedError where too many wait; the future
        raises EngineError for one that was lost. A grammar is compiled here unless ``prepare`` was awaited.
        """
        matcher, watch = start_matcher(self.grammars, request), start_watch(self.grammars, request)
        return self._inbox.submit(request, on_draw, matcher, watch).future

    async def prepare(self, request: SampleRequest) -> None:
        """Does what of ``submit`` takes time, while the event loop goes on. Raises EngineError."""
        await prepare_grammar(self.grammars, request)

    def publish(self, params: Any, version: int) -> None:
        """Copies new weights to the engine; each token drawn by a later decode step is theirs.

        When this returns the caller may donate its buffers. Open completions keep their keys and values and go on.
        """
        self._box.publish(params, version)

    @property
    def healthy(self) -> bool:
        """Whether requests are served: False before ``start``, after ``stop`` and after a failure."""
        return self._inbox.refusal is None and self._thread.is_alive()

    @property
    def version(self) -> int:
        """The version published last."""
        return self._box.current.version

    @property
    def weights(self) -> PublishedWeights:
        """Those published last, on the engine's device."""
        return self._box.current

    def metrics(self) -> DriverMetrics:
        active, waiting = self._inbox.count()
        return self._counters.take_snapshot(
            healthy=self.healthy,
            version=self.version,
            slots=self.engine.config.slots,
            pages=self.engine.config.pool_pages - 1,
            active=active,
            waiting=waiting,
        )

    def stop(self, timeout_s: float = 30.0) -> None:
        """Ends the thread; open requests get an EngineError. Idempotent. Raises EngineError if the thread hangs."""
        self._inbox.close("the engine was stopped")
        if self._thread.ident is None:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._endings.abandon("the engine was stopped and its thread hangs")
            raise EngineError(
                f"the engine's thread did not end within {timeout_s} s: a device program or callback hangs"
            )

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- The driver's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        cause, failures, returned = "the engine was stopped", 0, 0
        try:
            while (failure := self._serve()) is not None:
                cause = f"the engine failed: {failure!r}"
                done = sum(self._counters.returned.values())
                failures = failures + 1 if done == returned else 1
                returned = done
                # What the project raises on purpose would come again.
                if isinstance(failure, EngineError) or failures > self.engine.config.max_restarts:
                    break
                self._endings.lose_open(cause)
                self._counters.restarts += 1
            else:
                cause = "the engine was stopped"
        finally:
            self._endings.abandon(cause)

    def _serve(self) -> Exception | None:
        """Serves with slots of its own until the inbox is closed (None) or something fails; gives what did."""
        try:
            decoder = Decoder(self.engine, self._scheduler, self._counters)
            while self._inbox.fetch():
                begun = time.monotonic()
                self._turn(decoder)
                self._counters.busy_s += time.monotonic() - begun
            decoder.check_integrity()
        except Exception as error:
            _logger.exception("the rollout driver failed; its open requests are lost")
            return error.with_traceback(None)  # which holds the memory of the slots
        return None

    def _turn(self, decoder: Decoder) -> None:
        """One round: new weights, ended requests out, waiting ones in, masks, one decode step."""
        if self._box.current is not decoder.weights:
            decoder.use(self._box.current)
        self._drop_ended(decoder)
        decoder.admit()
        for job, why in decoder.mask():
            self._endings.lose(job, why)
        finished = decoder.step()
        now = time.monotonic()
        for slot, reason in finished:
            self._endings.settle(decoder.finish(slot), reason, now)
        if not self._scheduler.active and not self._scheduler.waiting:
            decoder.check_integrity()

    def _drop_ended(self, decoder: Decoder) -> None:
        """Frees the requests whose callers went away or whose deadline has passed."""
        now, limit = time.monotonic(), self.engine.config.request_deadline_s

        def has_ended(job: Job) -> bool:
            return job.future.cancelled() or job.submitted_at < now - limit

        dropped = self._scheduler.drop_waiting(has_ended)
        dropped += decoder.drop([slot for slot, job in self._scheduler.active.items() if has_ended(job)])
        for job in dropped:
            if job.future.cancelled():
                self._endings.settle(job, FinishReason.CANCELLED, now)
            else:
                self._endings.lose(
                    job, f"its deadline of {limit} s has passed; raise engine.request_deadline_s or ask for less"
                )

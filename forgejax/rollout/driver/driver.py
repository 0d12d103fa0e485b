"""The engine's own thread: continuous batching, cancellation, weight swaps in flight, prefix reuse, the token account.

It takes the place of JetStream's ``Driver``. Every request submitted here ends in exactly one way: a Completion, an
EngineError, or a cancelled future.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

import numpy as np

from forgejax.errors import EngineError
from forgejax.rollout.driver.counters import Counters, DriverMetrics
from forgejax.rollout.driver.prompts import Prompts
from forgejax.rollout.driver.request_log import LoggedRequest, RequestLog
from forgejax.rollout.driver.scheduler import Draw, Job, OnDraw, Scheduler
from forgejax.rollout.engine.engine import PolicyEngine
from forgejax.rollout.engine.settings import Run, SlotSettings, runs
from forgejax.rollout.engine.weights import Weights
from forgejax.types import Completion, FinishReason, SampleRequest, TokenIds

_logger = logging.getLogger(__name__)
_IDLE_S = 1.0
_LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)  # less counts as 0 on the device


class Driver:
    """Serves requests with one engine, from ``start`` to ``stop``. All public methods may be called from any thread."""

    def __init__(
        self, engine: PolicyEngine, params: Any = None, version: int = 0, request_log: RequestLog | None = None
    ):
        """``params`` are copied to the engine's device (None: random ones). The request log stays the caller's."""
        self.engine, self.request_log = engine, request_log
        config = engine.config
        self._box = engine.load_params(params, version)
        self._scheduler = Scheduler(config.slots)
        self._prompts = Prompts(engine)
        self._counters = Counters()
        self._random = np.random.default_rng(config.seed)
        self._wake = threading.Condition()
        self._inbox: list[Job] = []
        self._open: dict[str, Job] = {}  # every request that has not ended, by id
        self._refusal: str | None = "the engine has not been started; call start()"
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="rollout-driver", daemon=True)

    # -- Any thread ------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Begins to serve; once."""
        with self._wake:
            self._refusal = None
        self._thread.start()
        return self

    def submit(self, request: SampleRequest, on_draw: OnDraw | None = None) -> Future[Completion]:
        """Queues a request. Cancelling the future frees its slot before the next decode step.

        Raises EngineError at once for a request that cannot be served; the future raises it for one that was lost.
        """
        job = Job(
            request=request,
            prompt_ids=self._checked_prompt(request),
            on_draw=on_draw,
            submitted_at=time.monotonic(),
        )
        with self._wake:
            if self._refusal is not None:
                raise EngineError(f"request {request.request_id}: {self._refusal}")
            if len(self._inbox) + self._scheduler.waiting >= self.engine.config.max_queued:
                raise EngineError(
                    f"request {request.request_id}: {self.engine.config.max_queued} requests are waiting already; "
                    "ask again later or raise engine.max_queued"
                )
            if request.request_id in self._open:
                raise EngineError(f"request {request.request_id} is open already; give every request an id of its own")
            self._open[request.request_id] = job
            self._inbox.append(job)
            self._wake.notify()
        return job.future

    def publish(self, params: Any, version: int) -> None:
        """Copies new weights to the engine; each token drawn by a later decode step is theirs.

        When this returns the caller may donate its buffers. Open completions keep their keys and values and go on.
        """
        self._box.publish(params, version)

    @property
    def healthy(self) -> bool:
        """Whether requests are served: False before ``start``, after ``stop`` and after a failure."""
        return self._refusal is None and self._thread.is_alive()

    @property
    def version(self) -> int:
        """The version published last."""
        return self._box.current.version

    def metrics(self) -> DriverMetrics:
        with self._wake:
            return self._counters.snapshot(
                healthy=self.healthy,
                version=self.version,
                slots=self.engine.config.slots,
                active=len(self._scheduler.active),
                waiting=self._scheduler.waiting + len(self._inbox),
            )

    def stop(self, timeout_s: float = 30.0) -> None:
        """Ends the thread; open requests get an EngineError. Idempotent. Raises EngineError if the thread hangs."""
        with self._wake:
            self._stopping = True
            self._refusal = self._refusal or "the engine was stopped"
            self._wake.notify()
        if self._thread.ident is None:
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._abandon("the engine was stopped and its thread hangs")
            raise EngineError(
                f"the engine's thread did not end within {timeout_s} s: a device program or callback hangs"
            )

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _checked_prompt(self, request: SampleRequest) -> TokenIds:
        config, vocab = self.engine.config, self.engine.policy.vocab_size
        ids = np.asarray(request.prompt_ids)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise EngineError(f"request {request.request_id}: its prompt is not a flat array of token ids")
        if len(ids) >= config.max_context:
            raise EngineError(
                f"request {request.request_id}: the prompt has {len(ids)} tokens and the context holds "
                f"{config.max_context}, prompt and completion together; shorten it or raise engine.max_context"
            )
        if ids.min() < 0 or ids.max() >= vocab:
            raise EngineError(
                f"request {request.request_id}: its prompt has ids from {ids.min()} to {ids.max()}; the policy knows 0 "
                f"to {vocab - 1}"
            )
        if len(request.stop_ids) > config.max_stop_ids:
            raise EngineError(
                f"request {request.request_id}: {len(request.stop_ids)} stop ids given, {config.max_stop_ids} expected "
                "at most; raise engine.max_stop_ids"
            )
        if any(not 0 <= stop_id < 2**31 for stop_id in request.stop_ids):
            raise EngineError(
                f"request {request.request_id}: its stop ids are {sorted(request.stop_ids)}; expected 0 to {2**31 - 1}"
            )
        if 0.0 < request.law.temperature < _LEAST_TEMPERATURE:
            raise EngineError(
                f"request {request.request_id}: temperature {request.law.temperature} is below "
                f"{_LEAST_TEMPERATURE:g}; give 0 to take the likeliest token"
            )
        return np.ascontiguousarray(ids, np.int32)

    # -- The driver's thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._state = self.engine.init_decode_state()
            self._use(self._box.current)
            while self._next_jobs():
                begun = time.monotonic()
                self._turn()
                self._counters.busy_s += time.monotonic() - begun
        except Exception as error:
            _logger.exception("the rollout driver failed; its open requests are lost")
            self._failure = error
        finally:
            cause = f"the engine failed: {self._failure!r}" if self._failure else "the engine was stopped"
            self._abandon(cause)

    def _next_jobs(self) -> bool:
        """Takes what was submitted, waiting while there is nothing to do; False when it is time to end."""
        with self._wake:
            while not (self._stopping or self._inbox or self._scheduler.active or self._scheduler.waiting):
                self._wake.wait(_IDLE_S)
            for job in self._inbox:
                self._scheduler.enqueue(job)
            self._inbox.clear()
            return not self._stopping

    def _turn(self) -> None:
        """One round: new weights, ended requests out, waiting ones in, one decode step."""
        if self._box.current is not self._weights:
            self._use(self._box.current)
        self._drop_ended()
        self._admit()
        if self._scheduler.active:
            self._step()

    def _use(self, weights: Weights) -> None:
        self._weights = weights
        self._prompts.use(weights)

    def _drop_ended(self) -> None:
        """Frees the requests whose callers went away or whose deadline has passed."""
        now = time.monotonic()
        expired_before = now - self.engine.config.request_deadline_s

        def ended(job: Job) -> bool:
            return job.future.cancelled() or job.submitted_at < expired_before

        dropped = self._scheduler.drop_waiting(ended)
        slots = [slot for slot, job in self._scheduler.active.items() if ended(job)]
        self._end_on_device(slots)
        dropped += [self._scheduler.release(slot) for slot in slots]
        for job in dropped:
            if job.future.cancelled():
                self._settle(job, FinishReason.CANCELLED, now)
            else:
                limit = self.engine.config.request_deadline_s
                self._lose(
                    job, f"its deadline of {limit} s has passed; raise engine.request_deadline_s or ask for less"
                )

    def _admit(self) -> None:
        computed = 0
        while computed < self.engine.config.prefill_tokens_per_step:
            admitted = self._scheduler.admit()
            if admitted is None:
                return
            computed += self._prefill(*admitted)

    def _prefill(self, slot: int, job: Job) -> int:
        """Brings a request into its slot; returns how many prompt tokens had to be computed."""
        ids = job.prompt_ids
        job.started_at = time.monotonic()
        prefilled = self._prompts.prefill(ids)
        job.cached_tokens = prefilled.cached_tokens
        job.only_weights = self._weights
        job.oldest_version = self._weights.version if len(ids) > 1 else None
        seed = job.request.seed if job.request.seed is not None else int(self._random.integers(2**63))
        settings = SlotSettings(budget=self._budget(job), law=job.request.law, stop_ids=job.request.stop_ids, seed=seed)
        self._state = self.engine.insert(prefilled.prefix, self._state, slot, settings)
        self._counters.requests += 1
        self._counters.prompt_tokens += len(ids)
        self._counters.cached_tokens += job.cached_tokens
        return len(ids) - job.cached_tokens

    def _budget(self, job: Job) -> int:
        return min(job.request.max_tokens, self.engine.config.max_context - len(job.prompt_ids))

    def _step(self) -> None:
        """Draws a run of tokens for every active slot."""
        slots = sorted(self._scheduler.active)
        self._state, result = self.engine.generate(self._weights, self._state, self._scheduler.rows)
        self._counters.steps += 1
        finished: list[tuple[int, FinishReason]] = []
        for run in runs(result, slots):
            reason = self._take(run, self._scheduler.active[run.slot])
            if reason is not None:
                finished.append((run.slot, reason))
        self._end_on_device([slot for slot, _ in finished])
        now = time.monotonic()
        for slot, reason in finished:
            job = self._scheduler.active[slot]
            self._keep(slot, job)
            self._scheduler.release(slot)
            self._settle(job, reason, now)

    def _take(self, run: Run, job: Job) -> FinishReason | None:
        """Enters a run into the account and its job; says why the generation is over, if it is."""
        count = len(run.token_ids)
        self._counters.sampled[job.request.purpose] += count
        version = self._weights.version
        if job.only_weights is not self._weights:
            job.only_weights = None
        job.oldest_version = version if job.oldest_version is None else min(job.oldest_version, version)
        draw = Draw(
            token_ids=run.token_ids,
            logprobs=run.logprobs,
            versions=np.full(count, version, np.int32),
            oldest_versions=np.full(count, job.oldest_version, np.int32),
        )
        job.add(draw)
        if count == 0 or not np.isfinite(run.logprobs).all():
            raise EngineError(
                f"request {job.request.request_id}: policy version {version} gave {count} tokens with log-probs "
                f"{run.logprobs.tolist()}; expected finite ones: are the published weights finite?"
            )
        asked_to_stop = job.on_draw is not None and self._tell(job, draw)
        if int(run.token_ids[-1]) in job.request.stop_ids or asked_to_stop:
            return FinishReason.STOP
        if job.drawn >= self._budget(job):
            return FinishReason.LENGTH
        return FinishReason.REPETITION if self._repeats(job, draw) else None

    def _tell(self, job: Job, draw: Draw) -> bool:
        """Calls the caller's callback; if it raises, only its own request is lost."""
        assert job.on_draw is not None
        try:
            return job.on_draw(draw) is True
        except Exception as error:
            _logger.exception("request %s: its token callback failed", job.request.request_id)
            job.callback_error = error
            return True

    def _repeats(self, job: Job, draw: Draw) -> bool:
        certain = np.exp(draw.logprobs) > self.engine.config.repetition_probability
        for each in certain:
            job.certain_run = job.certain_run + 1 if each else 0
            if job.certain_run >= self.engine.config.repetition_tokens:
                return True
        return False

    def _keep(self, slot: int, job: Job) -> None:
        """Keeps the keys and values of a finished completion for the session's next turn.

        Not if other weights had a part in them, be they of the same version. The last token drawn was never fed.
        """
        if job.only_weights is self._weights:
            ids = np.concatenate([job.prompt_ids, job.sampled_ids()])[:-1]
            self._prompts.keep(self._state.rows, slot, ids)

    def _end_on_device(self, slots: list[int]) -> None:
        if slots:
            kept = np.ones(self.engine.config.slots, np.bool_)
            kept[slots] = False
            self._state = self.engine.release(self._state, kept)

    # -- Endings: each job passes through exactly one of these -------------------------------------------------------

    def _settle(self, job: Job, reason: FinishReason, now: float) -> None:
        """Gives the caller what was drawn, unless it went away or its callback failed."""
        if job.callback_error is not None:
            self._lose(job, f"its token callback raised {job.callback_error!r}")
            return
        if not self._claim(job):
            return
        wanted = job.future.set_running_or_notify_cancel()
        try:
            self._record(job, reason if wanted else FinishReason.CANCELLED)
        except EngineError as error:
            self._counters.failed[job.request.purpose] += job.drawn
            if wanted:
                job.future.set_exception(error)
            raise
        account = self._counters.returned if wanted else self._counters.cancelled
        account[job.request.purpose] += job.drawn
        if wanted:
            job.future.set_result(job.completion(reason, now))

    def _lose(self, job: Job, why: str) -> None:
        if not self._claim(job):
            return
        self._counters.failed[job.request.purpose] += job.drawn
        if job.future.set_running_or_notify_cancel():
            job.future.set_exception(EngineError(f"request {job.request.request_id}: {why}"))
        self._record(job, "failed")

    def _claim(self, job: Job) -> bool:
        """Whether the job is still open; it no longer is afterwards."""
        with self._wake:
            return self._open.pop(job.request.request_id, None) is not None

    def _record(self, job: Job, reason: str) -> None:
        if self.request_log is not None:
            self.request_log.append(
                LoggedRequest(
                    request_id=job.request.request_id,
                    purpose=job.request.purpose,
                    finish_reason=str(reason),
                    prompt_ids=job.prompt_ids,
                    sampled_ids=job.sampled_ids(),
                )
            )

    def _abandon(self, cause: str) -> None:
        """Refuses everything from now on and fails what is open."""
        with self._wake:
            self._refusal = cause
            jobs = list(self._open.values())
            self._inbox.clear()
        for job in jobs:
            with contextlib.suppress(EngineError):  # the request log may be what failed
                self._lose(job, cause)

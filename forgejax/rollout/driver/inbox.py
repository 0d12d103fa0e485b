"""The door between the callers' threads and the driver's: what is accepted, and what has not ended yet."""

from __future__ import annotations

import threading
import time

import numpy as np

from forgejax.errors import EngineError, OverloadedError
from forgejax.grammar import StopWatch, TextMatcher
from forgejax.rollout.driver.job import Job, OnDraw
from forgejax.rollout.driver.scheduler import Scheduler
from forgejax.rollout.engine.config import EngineConfig
from forgejax.types import SampleRequest, TokenIds

_IDLE_S = 1.0
_RETRY_AFTER_S = 1.0  # a queue this long moves on by many requests in a second
_LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)  # less counts as 0 on the device


class Inbox:
    """Every open request of one driver, and those of them that its thread has not fetched. Any thread may call.

    ``refusal``: why nothing is accepted, or None.
    """

    def __init__(self, scheduler: Scheduler, config: EngineConfig, vocab_size: int):
        self._scheduler, self._config, self._vocab_size = scheduler, config, vocab_size
        self._wake = threading.Condition()
        self._fresh: list[Job] = []
        self._open: dict[str, Job] = {}  # every request that has not ended, by id
        self._closing = False
        self.refusal: str | None = "the engine has not been started; call start()"

    def accept(self) -> None:
        """Requests are accepted from now on."""
        with self._wake:
            self.refusal = None

    def submit(
        self,
        request: SampleRequest,
        on_draw: OnDraw | None,
        matcher: TextMatcher | None = None,
        watch: StopWatch | None = None,
    ) -> Job:
        """Opens a request, with what follows its text for its grammar and its stop strings. Raises EngineError for one
        that cannot be served, OverloadedError now."""
        job = Job(
            request=request,
            prompt_ids=_check_request(request, self._config, self._vocab_size),
            budget=min(request.max_tokens, self._config.max_context - len(request.prompt_ids)),
            on_draw=on_draw,
            submitted_at=time.monotonic(),
            matcher=matcher,
            watch=watch,
        )
        with self._wake:
            if self.refusal is not None:
                raise EngineError(f"request {request.request_id}: {self.refusal}")
            if len(self._open) >= self._config.slots + self._config.max_waiting:
                raise OverloadedError(
                    f"request {request.request_id}: {self._config.max_waiting} requests are waiting already; "
                    "ask again later or raise engine.max_waiting",
                    _RETRY_AFTER_S,
                )
            if request.request_id in self._open:
                raise EngineError(f"request {request.request_id} is open already; give every request an id of its own")
            self._open[request.request_id] = job
            self._fresh.append(job)
            self._wake.notify()
        return job

    def fetch(self) -> bool:
        """Moves what was submitted to the scheduler, waiting while there is nothing to do; False when it is closed."""
        with self._wake:
            while not (self._closing or self._fresh or self._scheduler.active or self._scheduler.waiting):
                self._wake.wait(_IDLE_S)
            for job in self._fresh:
                self._scheduler.enqueue(job)
            self._fresh.clear()
            return not self._closing

    def close(self, why: str) -> None:
        """Nothing is accepted from now on, and the next ``fetch`` says so; a reason given before stays. Idempotent."""
        with self._wake:
            self._closing = True
            self.refusal = self.refusal or why
            self._wake.notify()

    def claim(self, job: Job) -> bool:
        """Whether the job is still open; it no longer is afterwards."""
        with self._wake:
            return self._open.pop(job.request.request_id, None) is not None

    def abandon(self, why: str) -> list[Job]:
        """Refuses everything from now on; gives what is open, for the caller to end."""
        with self._wake:
            self.refusal = why
        return self.clear()

    def clear(self) -> list[Job]:
        """Forgets what waits and what decodes; gives what is open, for the caller to end."""
        with self._wake:
            self._fresh.clear()
            self._scheduler.clear()
            return list(self._open.values())

    def count(self) -> tuple[int, int]:
        """How many requests decode and how many wait."""
        with self._wake:
            return len(self._scheduler.active), self._scheduler.waiting + len(self._fresh)


def _check_request(request: SampleRequest, config: EngineConfig, vocab_size: int) -> TokenIds:
    """The prompt as the engine takes it. Raises EngineError saying what is wrong with the request."""
    ids = np.asarray(request.prompt_ids)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise EngineError(f"request {request.request_id}: its prompt is not a flat array of token ids")
    if len(ids) >= config.max_context:
        raise EngineError(
            f"request {request.request_id}: the prompt has {len(ids)} tokens and the context holds "
            f"{config.max_context}, prompt and completion together; shorten it or raise engine.max_context"
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise EngineError(
            f"request {request.request_id}: its prompt has ids from {ids.min()} to {ids.max()}; the policy knows 0 "
            f"to {vocab_size - 1}"
        )
    if len(request.stop_ids) > config.max_stop_ids:
        raise EngineError(
            f"request {request.request_id}: {len(request.stop_ids)} stop ids given, {config.max_stop_ids} expected "
            "at most; raise engine.max_stop_ids"
        )
    biased = [id_ for id_, _ in request.law.logit_bias]
    if len(biased) > config.max_biased_ids:
        raise EngineError(
            f"request {request.request_id}: a bias for {len(biased)} tokens given, for {config.max_biased_ids} "
            "expected at most; raise engine.max_biased_ids"
        )
    if biased and biased[-1] >= vocab_size:
        raise EngineError(
            f"request {request.request_id}: a bias for token {biased[-1]} given; the policy knows 0 to {vocab_size - 1}"
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

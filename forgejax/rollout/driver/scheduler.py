"""Open requests: who waits, who decodes in which slot, and what each has drawn."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from forgejax.rollout.engine.weights import Weights
from forgejax.types import Completion, FinishReason, SampleRequest, TokenIds


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A run of newly drawn tokens of one request; the arrays are parallel."""

    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int32]
    oldest_versions: NDArray[np.int32]


OnDraw = Callable[[Draw], bool | None]
"""Called in the driver's thread with each run; returning True ends the generation after the run's last token."""


@dataclass(kw_only=True, eq=False)
class Job:
    """One open request. Only the driver's thread touches it after its submission."""

    request: SampleRequest
    prompt_ids: TokenIds
    on_draw: OnDraw | None
    submitted_at: float
    future: Future[Completion] = field(default_factory=Future)
    started_at: float | None = None
    only_weights: Weights | None = None  # those that computed all its keys and values, if one set did
    oldest_version: int | None = None  # of the keys and values this job's next token will see
    cached_tokens: int = 0
    certain_run: int = 0  # tokens in a row above the repetition probability
    callback_error: Exception | None = None
    drawn: int = 0  # tokens in ``draws``
    draws: list[Draw] = field(default_factory=list)

    def add(self, draw: Draw) -> None:
        self.draws.append(draw)
        self.drawn += len(draw.token_ids)

    def sampled_ids(self) -> NDArray[np.int32]:
        return np.concatenate([np.zeros(0, np.int32), *(draw.token_ids for draw in self.draws)])

    def completion(self, reason: FinishReason, now: float) -> Completion:
        """What the caller gets: everything drawn so far."""

        def joined(name: str, dtype: type[np.generic]) -> NDArray[np.generic]:
            return np.concatenate([np.zeros(0, dtype), *(getattr(draw, name) for draw in self.draws)])

        started_at = now if self.started_at is None else self.started_at
        return Completion(
            request_id=self.request.request_id,
            prompt_ids=self.prompt_ids,
            token_ids=self.sampled_ids(),
            logprobs=joined("logprobs", np.float32),  # type: ignore[arg-type]
            versions=joined("versions", np.int32),  # type: ignore[arg-type]
            oldest_versions=joined("oldest_versions", np.int32),  # type: ignore[arg-type]
            finish_reason=reason,
            law=self.request.law,
            cached_tokens=self.cached_tokens,
            queued_s=started_at - self.submitted_at,
            generate_s=now - started_at,
        )


class Scheduler:
    """First come, first served over a fixed number of slots; the lowest free slot is taken first.

    Low slots are filled first because a decode step over the first few slots costs less than one over all.
    """

    def __init__(self, slots: int):
        self._waiting: deque[Job] = deque()
        self._free = list(range(slots))
        self.active: dict[int, Job] = {}

    def enqueue(self, job: Job) -> None:
        self._waiting.append(job)

    def admit(self) -> tuple[int, Job] | None:
        """Gives the longest-waiting job the lowest free slot; None if there is no job or no slot."""
        if not self._waiting or not self._free:
            return None
        slot, job = heapq.heappop(self._free), self._waiting.popleft()
        self.active[slot] = job
        return slot, job

    def release(self, slot: int) -> Job:
        """Frees a slot and gives back the job that held it."""
        heapq.heappush(self._free, slot)
        return self.active.pop(slot)

    def drop_waiting(self, ended: Callable[[Job], bool]) -> list[Job]:
        """Takes the waiting jobs that have ended out of the queue."""
        kept: deque[Job] = deque()
        dropped: list[Job] = []
        for job in self._waiting:
            (dropped if ended(job) else kept).append(job)
        self._waiting = kept
        return dropped

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def rows(self) -> int:
        """How many of the first slots a decode step has to serve."""
        return max(self.active) + 1 if self.active else 0

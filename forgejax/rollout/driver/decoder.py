"""The slots of one engine, and the jobs that decode in them."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from forgejax.rollout.driver.counters import Counters
from forgejax.rollout.driver.job import Job
from forgejax.rollout.driver.masks import SlotMasks
from forgejax.rollout.driver.scheduler import Scheduler
from forgejax.rollout.engine.engine import PolicyEngine
from forgejax.rollout.engine.settings import SlotSettings, split_draws
from forgejax.rollout.engine.weights import PublishedWeights
from forgejax.types import FinishReason


class Decoder:
    """Brings jobs into slots, draws for them and takes them out again. Belongs to the driver's thread.

    Made there too: it takes the memory of all slots. ``use`` comes first.
    """

    def __init__(self, engine: PolicyEngine, scheduler: Scheduler, counters: Counters):
        self._engine, self._scheduler, self._counters = engine, scheduler, counters
        self._cache = engine.make_cache()
        self._state = engine.init_decode_state()
        self._random = np.random.default_rng(engine.config.seed)
        self._masks = SlotMasks(engine.config.slots, engine.policy.vocab_size)
        self._mask_SW: NDArray[np.uint32] | None = None  # of the next step
        self.weights: PublishedWeights | None = None

    def use(self, weights: PublishedWeights) -> None:
        """From now on these weights draw."""
        self.weights = weights
        self._cache.use(weights)

    def admit(self) -> None:
        """Brings waiting jobs into free slots, until enough prompt tokens were computed for one turn."""
        computed = 0
        while computed < self._engine.config.prefill_tokens_per_step:
            admitted = self._scheduler.admit(self._reserve)
            if admitted is None:
                return
            computed += self._prefill(*admitted)

    def mask(self) -> list[tuple[Job, str]]:
        """Says what the next ``step`` may draw; frees the slots whose grammar has failed and says why."""
        self._mask_SW, failed = self._masks.fill(self._scheduler.active)
        return list(zip(self.drop(list(failed)), failed.values(), strict=True))

    def step(self) -> list[tuple[int, FinishReason]]:
        """Draws a run of tokens for every active slot; those that are over draw no more and are yet to be freed.

        ``mask`` comes before.
        """
        assert self.weights is not None
        slots = sorted(self._scheduler.active)
        self._state, result = self._engine.generate(self.weights, self._state, self._scheduler.rows, self._mask_SW)
        self._counters.steps += 1
        finished: list[tuple[int, FinishReason]] = []
        for drawn in split_draws(result, slots):
            job = self._scheduler.active[drawn.slot]
            self._counters.sampled[job.request.purpose] += len(drawn.token_ids)
            reason = job.take(drawn, self.weights, self._engine.config)
            if reason is not None:
                finished.append((drawn.slot, reason))
        self._freeze([slot for slot, _ in finished])
        return finished

    def finish(self, slot: int) -> Job:
        """Frees a slot that is over. What lies in it is kept for the session's next turn.

        Not if other weights had a part in it, be they of the same version. The last token drawn was never fed.
        """
        job = self._scheduler.active[slot]
        if job.only_weights is self.weights:
            self._cache.share(self._state.kv, slot, np.concatenate([job.prompt_ids, job.join_ids()])[:-1])
        return self._free(slot)

    def drop(self, slots: list[int]) -> list[Job]:
        """Frees slots in the middle of their generations."""
        self._freeze(slots)
        return [self._free(slot) for slot in slots]

    def check_integrity(self) -> None:
        """Raises AssertionError if the account of keys and values does not add up."""
        self._cache.check_integrity()

    def _reserve(self, slot: int, job: Job) -> bool:
        return self._cache.reserve(slot, job.prompt_ids, job.budget)

    def _prefill(self, slot: int, job: Job) -> int:
        """Brings a job into the slot reserved for it; returns how many prompt tokens had to be computed."""
        assert self.weights is not None
        request, ids = job.request, job.prompt_ids
        job.started_at = time.monotonic()
        prompt = self._cache.extend(slot, ids)
        job.start(self.weights, prompt.cached_tokens)
        seed = request.seed if request.seed is not None else int(self._random.integers(2**63))
        settings = SlotSettings(budget=job.budget, law=request.law, stop_ids=request.stop_ids, seed=seed)
        self._state = self._engine.insert(prompt.sequence, self._state, slot, settings)
        self._counters.requests += 1
        self._counters.prompt_tokens += len(ids)
        self._counters.cached_tokens += prompt.cached_tokens
        return len(ids) - prompt.cached_tokens

    def _freeze(self, slots: list[int]) -> None:
        if slots:
            kept = np.ones(self._engine.config.slots, np.bool_)
            kept[slots] = False
            self._state = self._engine.release(self._state, kept)

    def _free(self, slot: int) -> Job:
        self._cache.release(slot)
        return self._scheduler.release(slot)

"""The slots of one engine, and the jobs that decode in them."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forgejax.rollout.driver.counters import Counters
from forgejax.rollout.driver.job import Job
from forgejax.rollout.driver.masks import SlotMasks
from forgejax.rollout.driver.scheduler import Scheduler
from forgejax.rollout.engine.engine import PolicyEngine
from forgejax.rollout.engine.settings import SlotSettings, split_draws
from forgejax.rollout.engine.weights import PublishedWeights
from forgejax.types import FinishReason, TokenIds


@dataclass(frozen=True, kw_only=True)
class _Filling:
    """The job whose prompt is being computed. One at a time: the next one finds what this one computes."""

    slot: int
    ids: TokenIds


class Decoder:
    """Brings jobs into slots, draws for them and takes them out again. Belongs to the driver's thread.

    Made there too: it takes the memory of all pages. ``use`` comes first.
    """

    def __init__(self, engine: PolicyEngine, scheduler: Scheduler, counters: Counters):
        self._config, self._scheduler, self._counters = engine.config, scheduler, counters
        self._slots = engine.make_slots()
        self._filling: _Filling | None = None
        self._order = itertools.count()
        self._random = np.random.default_rng(engine.config.seed)
        self._masks = SlotMasks(engine.config.slots, engine.policy.vocab_size)
        self._mask_SW: NDArray[np.uint32] | None = None  # of the next step
        self.weights: PublishedWeights | None = None

    def use(self, weights: PublishedWeights) -> None:
        """From now on these weights compute and draw, and nothing that others computed is found."""
        self.weights = weights
        self._slots.cache.forget()

    def admit(self) -> None:
        """Brings waiting jobs into free slots and computes their prompts, as many tokens as one turn allows."""
        computed, limit = 0, self._config.prefill_tokens_per_step
        while computed < limit:
            if self._filling is None:
                admitted = self._scheduler.admit(self._begin)
                if admitted is None:
                    break
                self._filling = _Filling(slot=admitted[0], ids=admitted[1].known_ids())
            todo = len(self._filling.ids) - 1 - self._scheduler.active[self._filling.slot].computed
            if computed and computed + min(todo, self._slots.pick_bucket(max(todo, 1))) > limit:
                break  # a chunk is not cut to fit: it waits for the next turn
            computed += self._fill(self._filling)
        self._counters.computed_tokens += computed

    def mask(self) -> list[tuple[Job, str]]:
        """Says what the next ``step`` may draw; frees the slots whose grammar has failed and says why."""
        self._mask_SW, failed = self._masks.fill(self._scheduler.active)
        return list(zip(self.drop(list(failed)), failed.values(), strict=True))

    def step(self) -> list[tuple[int, FinishReason]]:
        """Draws a run of tokens for every active slot; those that are over draw no more and are yet to be freed.

        ``mask`` comes before.
        """
        assert self.weights is not None
        self._make_room()
        slots = sorted(self._running())
        self._counters.held_pages, self._counters.kept_pages = self._slots.cache.held, self._slots.cache.kept
        if not slots:
            self._slots.wait()  # else the device would be asked for a whole prompt before anybody can be cancelled
            return []
        result = self._slots.generate(self.weights, slots[-1] + 1, self._mask_SW)
        self._counters.steps += 1
        finished: list[tuple[int, FinishReason]] = []
        for drawn in split_draws(result, slots):
            job = self._scheduler.active[drawn.slot]
            self._counters.sampled[job.request.purpose] += len(drawn.token_ids)
            reason = job.take(drawn, self.weights, self._config)
            if reason is not None:
                finished.append((drawn.slot, reason))
        self._slots.stop([slot for slot, _ in finished])
        return finished

    def finish(self, slot: int) -> Job:
        """Frees a slot that is over. What lies in it, but for the last token drawn, is kept for the next turn.

        Not if other weights had a part in it, be they of the same version.
        """
        self._give_back(slot)
        return self._scheduler.release(slot)

    def drop(self, slots: list[int]) -> list[Job]:
        """Frees slots in the middle of their prompts or generations."""
        self._slots.stop(slots)
        return [self.finish(slot) for slot in slots]

    def check_integrity(self) -> None:
        """Raises AssertionError if the account of keys and values does not add up, or slots hold them for no job."""
        self._slots.cache.check_integrity()
        if not self._scheduler.active and self._slots.cache.held:
            raise AssertionError(f"KV pages: {self._slots.cache.held} are held and no request is active")

    def _running(self) -> dict[int, Job]:
        """The jobs that draw."""
        filled = None if self._filling is None else self._filling.slot
        return {slot: job for slot, job in self._scheduler.active.items() if slot != filled}

    def _begin(self, slot: int, job: Job) -> bool:
        """Makes room for a job's tokens, where a page is left for each job that draws."""
        assert self.weights is not None
        cached = self._slots.begin(slot, job.known_ids(), spare=len(self._scheduler.active))
        if cached is None:
            return False
        if job.started_at is None:
            self._counters.requests += 1
            self._counters.prompt_tokens += len(job.prompt_ids)
            self._counters.cached_tokens += cached
            job.order = next(self._order)
            job.seed = job.request.seed if job.request.seed is not None else int(self._random.integers(2**63))
        job.start(self.weights, cached, time.monotonic())
        return True

    def _fill(self, filling: _Filling) -> int:
        """Computes the next chunk of a job's tokens; behind the last one it draws. Gives how many were computed."""
        assert self.weights is not None
        slot, ids, job, count = filling.slot, filling.ids, self._scheduler.active[filling.slot], 0
        if job.computed < len(ids) - 1:
            count = self._slots.extend(self.weights, slot, ids[:-1], job.computed)
            job.compute(self.weights, count)
        if job.computed == len(ids) - 1:
            if job.only_weights is self.weights:
                self._slots.cache.share(slot, ids[:-1])
            assert job.seed is not None
            settings = SlotSettings(
                budget=job.budget - job.drawn, law=job.request.law, stop_ids=job.request.stop_ids, seed=job.seed
            )
            self._slots.start(slot, int(ids[-1]), len(ids) - 1, settings)
            self._filling = None
        return count

    def _make_room(self) -> None:
        """Room for one step's tokens in every slot that draws; where it runs out, the youngest jobs give theirs."""
        for slot, job in sorted(self._running().items(), key=lambda item: item[1].order):
            known = len(job.prompt_ids) + job.drawn
            needed = min(known - 1 + self._config.tokens_per_step, len(job.prompt_ids) + job.budget)
            while slot in self._scheduler.active and not self._slots.grow(slot, needed):
                self._preempt(max(self._scheduler.active, key=lambda each: self._scheduler.active[each].order))

    def _preempt(self, slot: int) -> None:
        """Takes a job's slot and pages away; it goes on later, from what is still kept or is computed again."""
        self._slots.stop([slot])
        self._give_back(slot)
        self._scheduler.preempt(slot)
        self._counters.preemptions += 1

    def _give_back(self, slot: int) -> None:
        """Releases a slot's pages. What one set of weights computed alone is kept while there is room."""
        job, filling = self._scheduler.active[slot], self._filling is not None and self._filling.slot == slot
        if job.only_weights is self.weights:
            ids = job.known_ids()
            self._slots.cache.share(slot, ids[: job.computed] if filling else ids[:-1])
        if filling:
            self._filling = None
        self._slots.cache.release(slot)

"""The slots of one engine, and the jobs that decode in them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forgejax.rollout.driver.counters import Counters
from forgejax.rollout.driver.job import Job
from forgejax.rollout.driver.masks import SlotMasks
from forgejax.rollout.driver.scheduler import Scheduler
from forgejax.rollout.driver.speculation import Speculation, StepKind, count_plain_tokens
from forgejax.rollout.engine.engine import PolicyEngine
from forgejax.rollout.engine.settings import SlotDraw, SlotSettings, split_draws
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
        self._speculation = Speculation(engine.config, counters)
        self._filling: _Filling | None = None
        self._computed = 0  # tokens of prompts since the last step
        self._order = itertools.count()
        self._random = np.random.default_rng(engine.config.seed)
        self._masks = SlotMasks(engine.config.slots, engine.policy.vocab_size)
        self._mask_SW: NDArray[np.uint32] | None = None  # of the next step
        self.weights: PublishedWeights | None = None

    def use(self, weights: PublishedWeights) -> None:
        """From now on these weights compute and draw; of what others computed a session may find its own at most."""
        self.weights = weights
        self._slots.cache.serve(weights.version)

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
        self._computed = computed

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
        jobs = self._running()
        slots = sorted(jobs)
        self._counters.held_pages, self._counters.kept_pages = self._slots.cache.held, self._slots.cache.kept
        if not slots:
            self._slots.wait()  # else the device would be asked for a whole prompt before anybody can be cancelled
            return []
        finished: list[tuple[int, FinishReason]] = []
        for every in self._draw(slots, jobs):
            job = jobs[every.slot]
            drawn = job.cut(every)
            self._counters.sampled[job.request.purpose] += len(drawn.token_ids)
            reason = job.take(drawn, self.weights, self._config)
            if reason is not None:
                finished.append((drawn.slot, reason))
        self._slots.stop([slot for slot, _ in finished])
        return finished

    def _draw(self, slots: list[int], jobs: Mapping[int, Job]) -> list[SlotDraw]:
        """One step of the device for these slots: of drafts where that is quicker, else token by token."""
        assert self.weights is not None
        kind = StepKind(rows=self._config.pick_rows(slots[-1] + 1), masked=self._mask_SW is not None)
        drafts, began = self._speculation.propose(jobs, kind), time.monotonic()
        if drafts is None:
            result = self._slots.generate(self.weights, kind.rows, self._mask_SW)
        else:
            result = self._slots.check(self.weights, kind.rows, drafts, self._mask_SW)
        draws = list(split_draws(result, slots))
        self._counters.steps += 1
        if not self._computed:  # else the device had prompts to compute before
            self._speculation.time(
                kind,
                checked=drafts is not None,
                seconds=time.monotonic() - began,
                drawn=sum(len(each.token_ids) for each in draws),
                plain_tokens=count_plain_tokens(jobs, kind, self._config),
            )
        if drafts is not None:
            for each in draws:
                self._speculation.count(jobs[each.slot], int(drafts[1][each.slot]), len(each.token_ids))
        return draws

    def finish(self, slot: int) -> Job:
        """Frees a slot that is over. What lies in it, but for the last token drawn, is kept for the next turn.

        For its own session alone if other weights had a part in it, be they of the same version.
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
        session, spare = job.request.session_id, len(self._scheduler.active)
        begun = self._slots.begin(slot, job.known_ids(), spare, session)
        if begun is None:
            return False
        if job.started_at is None:
            self._counters.requests += 1
            self._counters.prompt_tokens += len(job.prompt_ids)
            self._counters.cached_tokens += begun.cached_tokens
            self._counters.carried_tokens += begun.cached_tokens if begun.oldest is not None else 0
            job.order = next(self._order)
            job.seed = job.request.seed if job.request.seed is not None else int(self._random.integers(2**63))
        job.start(self.weights, begun.cached_tokens, time.monotonic(), oldest=begun.oldest)
        return True

    def _fill(self, filling: _Filling) -> int:
        """Computes the next chunk of a job's tokens; behind the last one it draws. Gives how many were computed."""
        assert self.weights is not None
        slot, ids, job, count = filling.slot, filling.ids, self._scheduler.active[filling.slot], 0
        if job.computed < len(ids) - 1:
            count = self._slots.extend(self.weights, slot, ids[:-1], job.computed)
            job.compute(self.weights, count)
        if job.computed == len(ids) - 1:
            self._share(slot, job, ids[:-1])
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
            needed = min(known - 1 + self._config.step_room, len(job.prompt_ids) + job.budget)
            while slot in self._scheduler.active and not self._slots.grow(slot, needed):
                self._preempt(max(self._scheduler.active, key=lambda each: self._scheduler.active[each].order))

    def _preempt(self, slot: int) -> None:
        """Takes a job's slot and pages away; it goes on later, from what is still kept or is computed again."""
        self._slots.stop([slot])
        self._give_back(slot)
        self._scheduler.preempt(slot)
        self._counters.preemptions += 1

    def _give_back(self, slot: int) -> None:
        """Releases a slot's pages. What they hold is kept for later requests while there is room."""
        job, filling = self._scheduler.active[slot], self._filling is not None and self._filling.slot == slot
        ids = job.known_ids()
        self._share(slot, job, ids[: job.computed] if filling else ids[:-1])
        if filling:
            self._filling = None
        self._slots.cache.release(slot)

    def _share(self, slot: int, job: Job, ids: TokenIds) -> None:
        """Keeps what a slot holds of ``ids``, for everybody if the weights that serve computed it alone."""
        if len(ids):
            oldest = None if job.only_weights is self.weights else job.oldest_version
            self._slots.cache.share(slot, ids, job.request.session_id, oldest)

"""An engine's turns taken one by one, without a thread: what a driver does, in a test's own time."""

from __future__ import annotations

from typing import Any

from forgejax.grammar import GrammarCompiler
from forgejax.rollout.driver.counters import Counters
from forgejax.rollout.driver.decoder import Decoder
from forgejax.rollout.driver.job import Job
from forgejax.rollout.driver.masks import start_matcher, start_watch
from forgejax.rollout.driver.scheduler import Scheduler
from forgejax.types import Completion, SampleRequest
from tests.rollout import tiny


class Turns:
    """A decoder and what it has done."""

    def __init__(self, grammars: GrammarCompiler | None = None, **settings: Any):
        self.engine, self.counters, self._grammars = tiny.engine(**settings), Counters(), grammars
        self.scheduler = Scheduler(self.engine.config.slots)
        self.decoder = Decoder(self.engine, self.scheduler, self.counters)
        self.box = self.engine.load_params(tiny.params())
        self.decoder.use(self.box.current)
        self.ended: dict[str, Completion] = {}

    def ask(self, *requests: SampleRequest) -> list[Job]:
        jobs = [
            Job(
                request=request,
                prompt_ids=request.prompt_ids,
                budget=min(request.max_tokens, self.engine.config.max_context - len(request.prompt_ids)),
                on_draw=None,
                submitted_at=0.0,
                matcher=start_matcher(self._grammars, request),
                watch=start_watch(self._grammars, request),
            )
            for request in requests
        ]
        for job in jobs:
            self.scheduler.enqueue(job)
        return jobs

    def take(self) -> None:
        """One turn."""
        self.decoder.admit()
        assert self.decoder.mask() == []
        for slot, reason in self.decoder.step():
            job = self.decoder.finish(slot)
            self.ended[job.request.request_id] = job.complete(reason, 1.0)
        self.decoder.check_integrity()

    def publish(self, params: Any, version: int) -> None:
        """New weights, from the next turn on."""
        self.box.publish(params, version)
        self.decoder.use(self.box.current)

    def finish(self) -> dict[str, Completion]:
        while self.scheduler.active or self.scheduler.waiting:
            self.take()
        return self.ended

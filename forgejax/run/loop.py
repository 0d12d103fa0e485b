"""The training loop.

take groups -> credit, prefix trees, packing (Grain, ahead of time) -> step -> publish -> log the step before -> save
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import grain

from forgejax.chat import ChatFormat
from forgejax.environments import ReasoningGymTasks
from forgejax.errors import TrainingError
from forgejax.learner import Learner
from forgejax.pool.pool import Pool
from forgejax.report.evaluation import evaluation_row
from forgejax.report.live.progress import Progress
from forgejax.rollout import Driver
from forgejax.run.actors import RolloutService
from forgejax.run.books import Books, StepData
from forgejax.run.checkpoint import Checkpoints
from forgejax.run.config import RunConfig
from forgejax.run.evaluate import Evaluated, examples


@dataclass(kw_only=True)
class Trainer:
    """A run that is ready to go: weights warm, engine and agents up. Its methods belong to the training thread."""

    config: RunConfig
    learner: Learner
    service: RolloutService
    driver: Driver
    pool: Pool
    tasks: ReasoningGymTasks
    chat: ChatFormat
    batches: grain.DatasetIterator[StepData]
    checkpoints: Checkpoints
    books: Books
    progress: Progress
    step: int = 0
    stopping: bool = False

    def train(self) -> None:
        """Trains until ``run.steps`` steps are done, or until ``stop`` is called; ends with a checkpoint."""
        log = _nothing
        self.books.mark()
        while self.step < self.config.steps and (data := self._take()) is not None:
            metrics = self.learner.update(data.training.packed, version=self.step)
            self.step += 1
            self._publish()
            log()
            log = self.books.open_step(data, self.step, metrics)
            if self._due(self.config.probe_every):
                completions = self.service.probe(self.books.probes(data.training.packed, self.step))
                self.books.enter_probes(completions, self.step)
            if self._due(self.config.checkpoint_every):
                log = _done(log)
                self.save()
            if self._due(self.config.eval_every) and self.step < self.config.steps:
                log = _done(log)
                self.evaluate()
        log()
        self.save()

    def evaluate(self) -> Evaluated:
        """Plays the held-out tasks on the current weights; measures the sampler/trainer gap on what was drawn."""
        tasks = self.tasks.eval_tasks
        with self.progress.phase("evaluating", f"{len(tasks)} held-out tasks after step {self.step}"):
            evaluation = self.service.evaluate(tasks)
            self.pool.count_tokens("evaluation", evaluation.sampled_tokens)
            self.books.measure_gap(evaluation.turns, self.step)
        self.books.metrics.write(evaluation_row(evaluation.result, step=self.step))
        outcome = evaluation.result.overall.reward
        if outcome is not None:
            self.progress.note(f"held-out outcome after step {self.step}: {outcome:.3f}")
        self.books.mark()
        return Evaluated(result=evaluation.result, examples=examples(evaluation, tasks, self.chat))

    def save(self) -> None:
        """A checkpoint of this step, unless it has one."""
        if self.checkpoints.latest == self.step:
            return
        oldest = self.checkpoints.oldest  # until the new one is on the disk, a crash goes back to one of these
        self.books.stamp()
        self.checkpoints.save(self.step, self.learner.state, self.books.tally.to_mapping(), self.batches)
        if oldest is not None:
            self.pool.forget(oldest)

    def stop(self) -> None:
        """Asks the loop to end after the step it is in. Any thread, or a signal handler, may call it."""
        self.stopping = True
        self.pool.close()

    def _take(self) -> StepData | None:
        """The next batch; None once the run is stopping."""
        self.service.check()
        asked_at = time.monotonic()
        data = None if self.stopping else next(self.batches, None)
        if data is None and not self.stopping:  # the pool was closed, and not by us
            self.service.check()
            raise TrainingError("the data pool was closed while the run goes on")
        if data is not None:
            self.books.took(data, asked_at)
        return data

    def _publish(self) -> None:
        """This step's weights to the engine; only then do the groups that made them make room for new ones."""
        self.driver.publish(self.learner.state.params, self.step)  # copied when it returns
        self.pool.publish(self.step)
        self.pool.retire(self.step - 1)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0


def _nothing() -> None:
    pass


def _done(log: Callable[[], None]) -> Callable[[], None]:
    log()
    return _nothing

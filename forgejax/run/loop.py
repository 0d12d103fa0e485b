"""The training loop.

take groups -> credit, prefix trees, packing (Grain, ahead of time) -> step -> publish -> log the step before -> save
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from forgejax.chat import ChatFormat
from forgejax.environments import Environment
from forgejax.errors import CheckpointError, EngineError, ForgejaxError, StorageFullError, TrainingError
from forgejax.learner import Learner, PackedStep
from forgejax.pool.pool import Pool
from forgejax.report.live.progress import Progress
from forgejax.rollout import Engines
from forgejax.run.account import Account, RunAccount, RunSums
from forgejax.run.actors import RolloutService
from forgejax.run.audit import Audit
from forgejax.run.checkpoint import Checkpoints
from forgejax.run.config import RunConfig
from forgejax.run.evaluate import Evaluated, describe_masked, load_evaluated, pick_examples, save_evaluated
from forgejax.run.rows import StepRows
from forgejax.run.steps import StepData, StepSource
from forgejax.types import Failure


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run leaves to be reported, as plain data. ``finished`` is False for a run that was interrupted.

    ``eval_tasks``: held-out tasks that the evaluations scored; of two evaluations, the one that scored fewer.
    ``failures``: the last episode that failed, of each kind. ``params_digest``: a checksum of the weights trained.
    """

    before: Evaluated | None
    after: Evaluated | None
    finished: bool
    steps: int
    eval_tasks: int
    sums: RunSums
    account: Account
    staleness_max: int
    disorder_max: int
    cache_hit_rate: float
    compiles: int
    batch_shapes: int
    params_digest: str
    failures: tuple[Failure, ...] = ()


@dataclass(kw_only=True)
class Trainer:
    """A run that is ready to go: weights warm, engines and agents up. Its methods belong to the training thread."""

    config: RunConfig
    learner: Learner
    engines: Engines
    service: RolloutService
    pool: Pool
    environment: Environment
    chat: ChatFormat
    steps: StepSource
    checkpoints: Checkpoints
    account: RunAccount
    audit: Audit
    rows: StepRows
    progress: Progress
    step: int = 0
    missed_evaluation: bool = False  # of the step it goes on from
    stopping: bool = False
    _open_row: Callable[[], None] | None = field(default=None, init=False)  # ends what is to be said of the step before
    _logged: int = field(default=0, init=False)  # the last step of which everything is said

    def run(self, before_file: Path) -> Outcome:
        """Evaluates, trains, evaluates again, and closes the account.

        ``before_file`` keeps the first evaluation for the attempts that go on with this run.
        """
        with self.progress.phase("compiling", "the engine"):
            owner = self.account.name_owner("warm-up", self.step)
            self.account.count_probes(self.service.warm_up(owner), owner)
        before = self._evaluate_before(before_file)
        if self.missed_evaluation and not self.stopping:
            self.evaluate()
        self.service.start_groups()
        with self.progress.phase("training", f"{self.config.steps - self.step} steps"):
            try:
                self.train()
            except (StorageFullError, EngineError) as error:
                raise type(error)(f"{error}; {self.checkpoints.describe_safe()}") from error
        finished = self.step >= self.config.steps
        self.service.stop_groups()
        self.pool.close()
        after = self.evaluate("last-evaluation") if finished else None
        finished = after is not None
        self.pool.rewind(self.step)  # what was prefetched and never trained goes back into the account
        self.checkpoints.wait()
        self.account.count_time()
        return self._outcome(before, after, finished=finished)

    def train(self) -> None:
        """Trains until ``run.steps`` steps are done, or until ``stop`` is called; ends with a checkpoint.

        It also does where agents, engines or the pool end it, which concerns no step that is done.
        """
        self.rows.mark()
        self._logged = self.step
        try:
            while self.step < self.config.steps and (data := self._take()) is not None:
                metrics = self.learner.update(data.training.packed, version=self.step)
                self.step += 1
                self._publish()
                self._close_row()
                self._open_row = partial(self._log, data, self.step, self.rows.open(data, self.step, metrics))
                if self._due(self.config.probe_every):
                    self._probe(data.training.packed)
                if self._due(self.config.checkpoint_every):
                    self.save()
                if self._due(self.config.eval_every) and self.step < self.config.steps:
                    self._close_row()
                    self.evaluate()
        except CheckpointError:
            raise  # it has said what cannot be saved
        except ForgejaxError:
            self._rescue()
            raise
        self.save()

    def evaluate(self, what: str = "evaluation") -> Evaluated | None:
        """Plays the held-out tasks on the current weights; measures the sampler/trainer gap on what was drawn.

        None where ``stop`` broke it off. ``what`` names its tokens: another one after the same step needs another name,
        as the last one of a run without steps does.
        """
        tasks = self.environment.held_out
        with self.progress.phase("evaluating", f"{len(tasks)} held-out tasks after step {self.step}"):
            owner = self.account.name_owner(what, self.step)
            with self.progress.wait(partial(self._describe_evaluation, self.service.tally.played, len(tasks))):
                evaluation = self.service.evaluate(tasks, owner)
            self.account.count_evaluation(evaluation.sampled_tokens, owner)
            if not evaluation.complete:
                return None
            self.audit.measure_gap(evaluation.turns, self.step)
        self.rows.write_evaluation(evaluation.result, self.step)
        overall = evaluation.result.overall
        if overall.reward is not None:
            self.progress.note(f"held-out outcome after step {self.step}: {overall.reward:.3f}")
        if overall.masked:
            self.progress.note(
                f"{overall.masked} of the {overall.masked + overall.episodes} episodes could not be scored, so this "
                f"evaluation is one of {overall.tasks} of the {len(tasks)} tasks: {describe_masked(evaluation)}"
            )
        self.rows.mark()
        return Evaluated(result=evaluation.result, examples=pick_examples(evaluation, tasks, self.chat))

    def save(self) -> None:
        """A checkpoint of this step, unless it has one, once its row is written."""
        self._close_row()
        if self.checkpoints.latest == self.step:
            return
        oldest = self.checkpoints.oldest  # until the new one is on the disk, a crash goes back to one of these
        self.account.count_time()
        self.checkpoints.save(self.step, self.learner.state, self.account.sums.to_mapping(), self.steps)
        if oldest is not None:
            self.engines.trim(self.pool.forget(oldest))

    def stop(self) -> None:
        """Asks the loop to end after the step or in the evaluation it is in. Any thread may call it."""
        self.stopping = True
        self.pool.close()
        self.service.interrupt()

    def _take(self) -> StepData | None:
        """The next step's data; None once the run is stopping."""
        self.service.check()
        self.checkpoints.check()
        asked_at = time.monotonic()
        with self.progress.wait(self._describe_wait):
            data = None if self.stopping else self.steps.next()
        if data is None and not self.stopping:  # the pool was closed, and not by us
            self.service.check()
            raise TrainingError("the data pool was closed while the run goes on")
        if data is not None:
            self.rows.took(data, asked_at)
        return data

    def _describe_wait(self) -> str:
        return f"step {self.step + 1}: {self.pool.describe_filling()}, {self.service.tally.describe_running()}"

    def _describe_evaluation(self, played_before: int, tasks: int) -> str:
        tally = self.service.tally
        episodes = tasks * self.config.eval_samples
        return f"{tally.played - played_before} of {episodes} episodes played, {tally.describe_running()}"

    def _publish(self) -> None:
        """This step's weights to the engines; only then do the groups that made them make room for new ones."""
        self.engines.publish(self.learner.weights, self.step)  # copied when it returns
        self.pool.publish(self.step)
        self.pool.retire(self.step - 1)

    def _log(self, data: StepData, step: int, complete_row: Callable[[], None]) -> None:
        """Ends what is to be said of a step: its row, whether its ids are the engines', whether it was sound."""
        complete_row()
        self.audit.compare_ids(data.training.packed)
        self._logged = step
        skipped = self.account.sums.skipped_in_a_row
        if skipped >= self.config.max_skipped:
            raise TrainingError(
                f"{skipped} steps in a row had a loss or gradient that is not finite; lower "
                "step.optimizer.learning_rate, or resume from the last checkpoint with --resume"
            )

    def _close_row(self) -> None:
        if self._open_row is not None:
            close, self._open_row = self._open_row, None
            close()

    def _rescue(self) -> None:
        """Saves the last step of a run that something else has ended.

        Not where the steps themselves became unsound, and not where one of them could not be written down: a checkpoint
        must hold the figures of all that it was trained on.
        """
        try:
            self._close_row()
            if self._logged < self.step:
                self.progress.note(f"step {self.step} is not saved: the row of step {self._logged + 1} is not written")
            elif self.account.sums.skipped_in_a_row < self.config.max_skipped:
                self.save()
                self.checkpoints.wait()
                self.progress.note(f"step {self.step} is saved; go on from it with --resume once the cause is mended")
        except (ForgejaxError, OSError, ValueError) as error:
            self.progress.note(f"step {self.step} could not be saved: {error}")

    def _probe(self, packed: PackedStep) -> None:
        owner = self.account.name_owner("probe", self.step)
        completions = self.service.probe(self.audit.probes(packed, owner, self.step))
        self.account.count_probes(completions, owner)
        self.audit.measure_probes(completions, self.step)

    def _evaluate_before(self, file: Path) -> Evaluated | None:
        """The evaluation of the first parameters, which ``file`` keeps for a run that goes on from later ones."""
        before = load_evaluated(file)
        if self.step == 0 and not self.stopping:
            before = self.evaluate()
            if before is not None:
                save_evaluated(file, before)
        return before

    def _outcome(self, before: Evaluated | None, after: Evaluated | None, *, finished: bool) -> Outcome:
        groups = self.pool.snapshot()
        scored = [each.result.overall.tasks for each in (before, after) if each is not None]
        return Outcome(
            before=before,
            after=after,
            finished=finished,
            steps=self.step,
            eval_tasks=min(scored, default=0),
            sums=dataclasses.replace(self.account.sums),
            account=self.account.close(),
            staleness_max=groups.staleness_max,
            disorder_max=groups.disorder_max,
            cache_hit_rate=self.engines.account().cache_hit_rate,
            compiles=self.rows.compiles.count,
            batch_shapes=len(self.learner.batch_shapes),
            params_digest=self.learner.digest(),
            failures=self.rows.episodes.failures,
        )

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

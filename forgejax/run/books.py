"""The books of a run: what every step did, whether ids drifted, how far sampler and trainer disagree."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from forgejax.errors import TrainingError
from forgejax.gateway.metrics import GatewayMetrics
from forgejax.learner import Learner, Metrics, PackedStep, Sample, TrainingBatch, drift_tokens, pack
from forgejax.learner.packing.drift import trained_ids
from forgejax.learner.packing.samples import turn_sample, untrainable_reason
from forgejax.pool.pool import Pool
from forgejax.report.live.progress import Progress
from forgejax.report.sinks.jsonl import MetricsWriter
from forgejax.rollout import Driver, RequestLog
from forgejax.run.compiles import Compiles
from forgejax.run.config import TrainConfig
from forgejax.run.tally import Tally, fresh_gaps
from forgejax.types import Completion, SampleRequest, Turn

_PROBES = 4
_PROBE_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class StepData:
    """One step's packed batch, the figures of the groups it came from, and when (``time.monotonic()``) packing them
    began and ended."""

    number: int
    training: TrainingBatch
    figures: Mapping[str, float]
    packing_began: float
    packing_ended: float


@dataclass(kw_only=True)
class Books:
    """Written by the training thread alone.

    ``sampled_before``: tokens drawn by earlier attempts at this run. ``counted_at``: the moment up to which the tally
    has the run's wall clock.
    """

    config: TrainConfig
    learner: Learner
    driver: Driver
    requests: RequestLog
    pool: Pool
    metrics: MetricsWriter
    progress: Progress
    gateway: GatewayMetrics
    tally: Tally
    compiles: Compiles
    sampled_before: int = 0
    counted_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._waited: dict[str, float] = {}
        self.mark()

    def took(self, data: StepData, asked_at: float) -> None:
        """Counts what the trainer has waited for a batch since it asked: in all, and for its packing alone.

        The rest of the wait is for groups that agents had not finished.
        """
        now = time.monotonic()
        late = max(0.0, min(now, data.packing_ended) - max(asked_at, data.packing_began))
        self._waited = {
            "time/wait_s": now - asked_at,
            "time/packing_wait_s": late,
            "time/packing_s": data.packing_ended - data.packing_began,
        }
        self.tally.count_wait(now - asked_at, packing_s=late)

    def open_step(self, data: StepData, step: int, metrics: Metrics) -> Callable[[], None]:
        """Begins the entry of the step that has just been dispatched, the ``step``-th.

        The call that is returned completes it; it waits for the devices, so it is made once the next step is under way:
        ``time/step_s`` lasts until then, and holds the next step's wait instead of its own.
        """

        counted = {
            **self._waited,
            "process/compiles": self.compiles.count,
            "learner/batch_shapes": len(self.learner.batch_shapes),
        }

        def close() -> None:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            seconds, sampled = self._since_mark()
            self.tally.train_s += seconds
            self._enter(data, values)
            row = {
                "step": step,
                **data.figures,
                **{f"learner/{name}": value for name, value in values.items()},
                **self._rates(data, values, seconds, sampled),
                **counted,
                **{f"gateway/{name}": value for name, value in self.gateway.counts().items()},
                **self._levels(),
            }
            self.metrics.write(row)
            self.progress.step(row)
            self._require_sound_steps()

        return close

    def mark(self) -> None:
        """Rates are measured from here: called where training begins or goes on after something else."""
        self._marked = (time.monotonic(), self._sampled())

    def measure_gap(self, turns: Iterable[Turn], version: int) -> None:
        """Scores what the sampler drew with the learner's current weights, of ``version``."""
        packing = self.config.packing
        samples: list[Sample] = [
            turn_sample(turn, 1.0)
            for turn in turns
            if len(turn.completion.token_ids) and untrainable_reason(turn, packing) is None
        ]
        if samples:
            packed = pack([samples], packing, row_shards=self.learner.row_shards)
            scored = [np.asarray(scores) for scores in self.learner.score(packed)]
            self.tally.count_gaps(fresh_gaps(scored, packed, version))

    def probes(self, packed: PackedStep, step: int) -> list[SampleRequest]:
        """Requests for a few completions of prompts the step trained on, so that a gap is never measured on nothing."""
        parts = packed.parts
        return [
            SampleRequest(
                request_id=f"probe-{self.pool.attempt}-{step}-{number}",
                prompt_ids=trained_ids(parts[placement.batch], placement)[0],
                max_tokens=_PROBE_TOKENS,
                law=self.config.sampling,
                purpose="probe",
            )
            for number, placement in enumerate(packed.placements[:_PROBES])
        ]

    def enter_probes(self, completions: Sequence[Completion], version: int) -> None:
        """Counts the probes' tokens and measures the gap on them."""
        self.pool.count_tokens("probe", sum(len(completion.token_ids) for completion in completions))
        law = self.config.sampling
        self.measure_gap(
            (
                Turn(index=0, completion=each, parent=None, requested_at=0.0, finished_at=0.0, requested_law=law)
                for each in completions
            ),
            version,
        )

    def stamp(self) -> None:
        """Brings the tally's wall clock up to now."""
        now = time.monotonic()
        self.tally.wall_s += now - self.counted_at
        self.counted_at = now

    def _enter(self, data: StepData, values: Mapping[str, float]) -> None:
        packed = data.training.packed
        terms, skipped = round(values["trained_terms"]), values["skipped"] > 0
        self.tally.count_step(terms=terms, skipped=skipped)
        self.tally.count_packing(packed.stats)
        if skipped:
            self.progress.note(f"step {data.number + 1} was not finite and has been skipped")
        records = {}
        for request_id in {placement.request_id for placement in packed.placements}:
            found = self.requests.find(request_id)
            if found is not None:
                records[request_id] = (found.prompt_ids, found.sampled_ids)
        self.tally.drift_tokens += drift_tokens(packed, records)

    def _since_mark(self) -> tuple[float, int]:
        """Seconds and sampled tokens since the last mark, which moves to now."""
        began, sampled = self._marked
        self.mark()
        return max(self._marked[0] - began, 1e-9), self._marked[1] - sampled

    def _sampled(self) -> int:
        return sum(self.driver.metrics().tokens_sampled.values())

    def _rates(self, data: StepData, values: Mapping[str, float], seconds: float, sampled: int) -> dict[str, float]:
        stats = data.training.packed.stats
        return {
            "learner/tree_ratio": stats.tree_token_ratio,
            "learner/pair_ratio": stats.attention_pair_ratio,
            "learner/row_fill": stats.row_fill,
            "learner/pair_imbalance": stats.pair_imbalance,
            "learner/logprob_gap": self.tally.gap_max,
            "throughput/sampled": sampled / seconds,
            "throughput/trained_unmerged": values["trained_terms"] / seconds,
            "throughput/fed_unmerged": stats.unmerged_tokens / seconds,
            "throughput/fed_merged": stats.tree_tokens / seconds,
            "time/step_s": seconds,
        }

    def _levels(self) -> dict[str, float]:
        engine, pool = self.driver.metrics(), self.pool.snapshot()
        return {
            "pool/head": pool.head,
            "pool/in_flight": pool.in_flight,
            "pool/waiting": pool.finished_waiting,
            "pool/staleness": pool.staleness_max,
            "pool/disorder": pool.disorder_max,
            "engine/cache_hit": engine.cache_hit_rate,
            "engine/active": engine.active,
            "engine/waiting": engine.waiting,
        }

    def _require_sound_steps(self) -> None:
        skipped = self.tally.skipped_in_a_row
        if skipped >= self.config.run.max_skipped:
            raise TrainingError(
                f"{skipped} steps in a row had a loss or gradient that is not finite; lower "
                "step.optimizer.learning_rate, or resume from the last checkpoint with --resume"
            )

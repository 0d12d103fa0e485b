"""The figures of a step as one row of metrics."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax

from forgejax.gateway.metrics import GatewayMetrics
from forgejax.learner import Learner, Metrics
from forgejax.pool.pool import Pool
from forgejax.report.evaluation import EvaluationResult, make_evaluation_row
from forgejax.report.live.progress import Progress
from forgejax.report.sinks import Sinks
from forgejax.rollout import Engines
from forgejax.run.account import RunSums
from forgejax.run.steps import StepData

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class Compiles:
    """Counts the programs that jax compiles in this process, in any thread, until it is closed.

    There is one for each new shape and none for each new input, if all is well. A program that is loaded from the
    persistent compilation cache counts as well.
    """

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        with self._lock:
            self.count += event == _COMPILE_EVENT


@dataclass(kw_only=True)
class StepRows:
    """Makes and writes the rows, and adds the steps to ``sums``; for the training thread alone."""

    learner: Learner
    engines: Engines
    pool: Pool
    gateway: GatewayMetrics
    compiles: Compiles
    sums: RunSums
    sinks: Sinks
    progress: Progress

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
        self.sums.count_wait(now - asked_at, packing_s=late)

    def open(self, data: StepData, step: int, metrics: Metrics) -> Callable[[], None]:
        """Begins the row of the step that has just been dispatched, the ``step``-th.

        The call that is returned completes it; it waits for the devices, so it is made once the next step is under way:
        ``time/step_s`` lasts until then, and holds the next step's wait instead of its own.
        """
        counted = {
            **self._waited,
            "process/compiles": self.compiles.count,
            "learner/batch_shapes": len(self.learner.batch_shapes),
        }

        def complete() -> None:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            seconds, sampled = self._since_mark()
            self._count(data, values, seconds)
            row = {
                "step": step,
                **data.figures,
                **{f"learner/{name}": value for name, value in values.items()},
                **self._rates(data, values, seconds, sampled),
                **counted,
                **{f"gateway/{name}": value for name, value in self.gateway.counts().items()},
                **self._levels(),
            }
            self.sinks.write(row)

        return complete

    def write_evaluation(self, result: EvaluationResult, step: int) -> None:
        """The figures of an evaluation after ``step`` steps, beside those of the step."""
        self.sinks.write(make_evaluation_row(result, step=step))

    def mark(self) -> None:
        """Rates are measured from here: called where training begins or goes on after something else."""
        self._marked = (time.monotonic(), self.engines.account().sampled)

    def _since_mark(self) -> tuple[float, int]:
        """Seconds and sampled tokens since the last mark, which moves to now."""
        began, sampled = self._marked
        self.mark()
        return max(self._marked[0] - began, 1e-9), self._marked[1] - sampled

    def _count(self, data: StepData, values: Mapping[str, float], seconds: float) -> None:
        skipped = values["skipped"] > 0
        self.sums.train_s += seconds
        self.sums.count_step(terms=round(values["trained_terms"]), skipped=skipped)
        self.sums.count_packing(data.training.packed.stats)
        if skipped:
            self.progress.note(f"step {data.number + 1} was not finite and has been skipped")

    def _rates(self, data: StepData, values: Mapping[str, float], seconds: float, sampled: int) -> dict[str, float]:
        stats = data.training.packed.stats
        return {
            "learner/tree_ratio": stats.tree_token_ratio,
            "learner/pair_ratio": stats.attention_pair_ratio,
            "learner/row_fill": stats.row_fill,
            "learner/pair_imbalance": stats.pair_imbalance,
            "learner/logprob_gap": self.sums.gap_max,
            "throughput/sampled": sampled / seconds,
            "throughput/trained_unmerged": values["trained_terms"] / seconds,
            "throughput/fed_unmerged": stats.unmerged_tokens / seconds,
            "throughput/fed_merged": stats.tree_tokens / seconds,
            "time/step_s": seconds,
        }

    def _levels(self) -> dict[str, float]:
        engines, pool = self.engines.account(), self.pool.snapshot()
        return {
            "pool/head": pool.head,
            "pool/in_flight": pool.in_flight,
            "pool/waiting": pool.finished_waiting,
            "pool/staleness": pool.staleness_max,
            "pool/disorder": pool.disorder_max,
            "engine/cache_hit": engines.cache_hit_rate,
            "engine/active": engines.active,
            "engine/waiting": engines.waiting,
        }

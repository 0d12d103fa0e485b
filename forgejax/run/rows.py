"""The figures of a step as one row of metrics."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax

from forgejax.agents import EpisodeTally
from forgejax.gateway.metrics import GatewayMetrics
from forgejax.learner import Learner, Metrics
from forgejax.pool.pool import Pool
from forgejax.report.evaluation import EvaluationResult, make_evaluation_row
from forgejax.report.live.progress import Progress
from forgejax.report.names import (
    ATTEMPT,
    DROPPED_SHARE,
    EPISODES,
    FAILED_SHARE,
    MASKED,
    NOT_TRAINED,
    PACKING_WAIT_S,
    STEP_S,
    STEPS_OF_A_RATE,
    TRAIN_S,
    WAIT_S,
)
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
    """Makes and writes the rows, and adds the steps to ``sums``; for the training thread alone.

    The time of a step runs from where the one before it had been published, or from ``mark``, to where it is itself.
    ``time/step_s`` is ``time/between_s`` (probes, checkpoints), ``time/wait_s`` (for data; ``time/packing_wait_s`` of
    it for packing) and ``time/train_s`` (the update, until its weights are with the engines) together.
    """

    learner: Learner
    engines: Engines
    pool: Pool
    gateway: GatewayMetrics
    episodes: EpisodeTally
    compiles: Compiles
    sums: RunSums
    sinks: Sinks
    progress: Progress

    def __post_init__(self) -> None:
        self._waited: dict[str, float] = {}
        self._given_at = time.monotonic()
        self._groups = self._count_groups()
        self._trained = self._groups.pop("trained")
        self._decided: deque[tuple[int, int]] = deque(maxlen=STEPS_OF_A_RATE)  # groups trained and lost, row by row
        self._episodes = self.episodes.counts()
        self.mark()

    def took(self, data: StepData, asked_at: float) -> None:
        """Counts what the trainer has waited for a batch since it asked: in all, and for its packing alone.

        The rest of the wait is for groups that agents had not finished.
        """
        self._given_at = time.monotonic()
        waited = max(0.0, self._given_at - asked_at)
        late = max(0.0, min(self._given_at, data.packing_ended) - max(asked_at, data.packing_began))
        self._waited = {
            "time/between_s": max(0.0, asked_at - self._marked[0]),
            WAIT_S: waited,
            PACKING_WAIT_S: late,
            "time/packing_s": data.packing_ended - data.packing_began,
        }
        self.sums.count_wait(waited, packing_s=late)

    def open(self, data: StepData, step: int, metrics: Metrics) -> Callable[[], None]:
        """Begins the row of the ``step``-th step, whose weights have just been published: it ends here.

        The call that is returned completes it; it waits for the devices, so it is made once the next step is under way.
        """
        seconds, sampled = self._since_mark()
        counted = {
            **self._waited,
            TRAIN_S: max(0.0, self._marked[0] - self._given_at),
            STEP_S: seconds,
            "throughput/sampled": sampled / seconds,
            ATTEMPT: self.pool.attempt,
            "process/compiles": self.compiles.count,
            "learner/batch_shapes": len(self.learner.batch_shapes),
            **{f"gateway/{name}": value for name, value in self.gateway.counts().items()},
            **self._levels(),
        }
        ended = self._since_last_row()

        def complete() -> None:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            self._count(data, values, seconds, ended)
            row = {
                "step": step,
                **data.figures,
                **{f"learner/{name}": value for name, value in values.items()},
                **self._merging(data, values, seconds),
                **counted,
                **ended.figures(),
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

    def _since_last_row(self) -> RowCounts:
        groups, episodes = self._count_groups(), self.episodes.counts()
        trained = groups.pop("trained")
        lost = _subtract(groups, self._groups)
        self._decided.append((trained - self._trained, sum(lost.values())))
        recent = sum(trained + lost for trained, lost in self._decided)
        ended = RowCounts(
            groups_not_trained=lost,
            dropped_share=sum(lost for _, lost in self._decided) / recent if recent else None,
            episodes=_subtract(episodes.ended, self._episodes.ended),
            masked=_subtract(episodes.masked, self._episodes.masked),
            failed_share=self.episodes.failed_share,
        )
        self._trained, self._groups, self._episodes = trained, groups, episodes
        return ended

    def _count_groups(self) -> dict[str, int]:
        pool = self.pool.snapshot()
        return {"trained": pool.groups_trained, **pool.groups_not_trained}

    def _count(self, data: StepData, values: Mapping[str, float], seconds: float, ended: RowCounts) -> None:
        skipped = values["skipped"] > 0
        self.sums.train_s += seconds
        self.sums.count_step(terms=round(values["trained_terms"]), skipped=skipped)
        self.sums.count_packing(data.training.packed.stats)
        self.sums.count_episodes(ended.episodes, ended.masked)
        if skipped:
            self.progress.note(f"step {data.number + 1} was not finite and has been skipped")

    def _merging(self, data: StepData, values: Mapping[str, float], seconds: float) -> dict[str, float]:
        stats = data.training.packed.stats
        return {
            "learner/tree_ratio": stats.tree_token_ratio,
            "learner/pair_ratio": stats.attention_pair_ratio,
            "learner/row_fill": stats.row_fill,
            "learner/pair_imbalance": stats.pair_imbalance,
            "learner/logprob_gap": self.sums.gap_max or 0.0,
            **{
                f"gap_{depth}/{name}": value
                for depth, gap in self.sums.gaps.items()
                for name, value in {"mean": gap.mean, "p99": gap.p99, "max": gap.largest, "ess": gap.ess}.items()
            },
            "throughput/trained_unmerged": values["trained_terms"] / seconds,
            "throughput/fed_unmerged": stats.unmerged_tokens / seconds,
            "throughput/fed_merged": stats.tree_tokens / seconds,
        }

    def _levels(self) -> dict[str, float]:
        engines, pool = self.engines.account(), self.pool.snapshot()
        return {
            "pool/head": pool.head,
            "pool/in_flight": pool.in_flight,
            "pool/waiting": pool.finished_waiting,
            "pool/disorder": pool.disorder_max,
            "engine/cache_hit": engines.cache_hit_rate,
            "engine/active": engines.active,
            "engine/waiting": engines.waiting,
            **self.engines.figures(),
        }


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """What became of groups and training episodes between one row and the next, by reason; nothing that is 0.

    The shares are those of the groups of the last rows and of the recent episodes; None of none.
    """

    groups_not_trained: Mapping[str, int]
    dropped_share: float | None
    episodes: Mapping[str, int]
    masked: Mapping[str, int]
    failed_share: float | None

    def figures(self) -> dict[str, float]:
        """As metrics."""
        shares = {FAILED_SHARE: self.failed_share, DROPPED_SHARE: self.dropped_share}
        return {
            **{f"{EPISODES}{reason}": count for reason, count in self.episodes.items()},
            **{f"{MASKED}{reason}": count for reason, count in self.masked.items()},
            **{f"{NOT_TRAINED}{reason}": count for reason, count in self.groups_not_trained.items()},
            **{name: share for name, share in shares.items() if share is not None},
        }


def _subtract(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    counts = {name: count - before.get(name, 0) for name, count in now.items()}
    return {name: count for name, count in counts.items() if count > 0}

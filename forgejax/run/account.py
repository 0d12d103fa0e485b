"""The account of a run: where sampled tokens are counted as they come, and where it is closed at the end."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Self

import msgspec
import numpy as np

from forgejax.learner import PackStats
from forgejax.learner.gap import GapFigures, count_by_depth
from forgejax.pool.ledger import IN_FLIGHT_AT_END, UNUSED_AT_END, PoolSnapshot, TokenAccount
from forgejax.pool.pool import Pool
from forgejax.rollout import EngineAccount, Engines
from forgejax.types import Completion

_IDLE_S = 30.0
_LOOK_S = 0.005


@dataclasses.dataclass(kw_only=True)
class RunSums:
    """The lineage of the current parameters in sums that no other package keeps; they travel with the checkpoints.

    ``trained_tokens`` is what the device-side term mask counted; ``skipped_tokens`` those of steps that were not
    finite. ``unaudited_tokens`` were trained and have no sound record to be compared with. ``train_s`` is the wall
    clock of the steps; ``wait_s`` what of it the trainer waited for data, and ``packing_wait_s`` what it would not
    have waited had packing taken no time. The gap is |trainer - sampler| of a token's log-probability, over
    ``gap_tokens`` tokens drawn by the very weights that scored them; ``gaps`` has it by depth of context. ``episodes``
    are those of training that had ended by the last step, by stop reason; ``masked_episodes`` by what they are masked
    for.
    """

    steps: int = 0
    wall_s: float = 0.0
    trained_tokens: int = 0
    skipped_tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    drift_tokens: int = 0
    unaudited_tokens: int = 0
    tree_tokens: int = 0
    unmerged_tokens: int = 0
    gaps: dict[str, GapFigures] = dataclasses.field(default_factory=dict)
    train_s: float = 0.0
    wait_s: float = 0.0
    packing_wait_s: float = 0.0
    episodes: dict[str, int] = dataclasses.field(default_factory=dict)
    masked_episodes: dict[str, int] = dataclasses.field(default_factory=dict)

    def count_step(self, *, terms: int, skipped: bool) -> None:
        """The device's figures of one step. A skipped step trained nothing."""
        self.steps += 1
        if skipped:
            self.skipped_tokens += terms
            self.skipped_steps += 1
        else:
            self.trained_tokens += terms
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def count_packing(self, stats: PackStats) -> None:
        self.tree_tokens += stats.tree_tokens
        self.unmerged_tokens += stats.unmerged_tokens

    def count_wait(self, seconds: float, *, packing_s: float) -> None:
        self.wait_s += seconds
        self.packing_wait_s += packing_s

    def count_episodes(self, ended: Mapping[str, int], masked: Mapping[str, int]) -> None:
        self.episodes = dict(Counter(self.episodes) + Counter(ended))
        self.masked_episodes = dict(Counter(self.masked_episodes) + Counter(masked))

    def count_gaps(self, differences: np.ndarray, depths: np.ndarray) -> None:
        """Trainer minus sampler of some tokens, and how deep in their contexts they stand."""
        self.gaps = count_by_depth(self.gaps, differences, depths)

    @property
    def gap_tokens(self) -> int:
        return sum(band.tokens for band in self.gaps.values())

    @property
    def gap_max(self) -> float | None:
        return max((band.largest for band in self.gaps.values()), default=None)

    @property
    def gap_mean(self) -> float | None:
        return sum(band.total for band in self.gaps.values()) / self.gap_tokens if self.gaps else None

    @property
    def tree_token_ratio(self) -> float | None:
        return self.unmerged_tokens / self.tree_tokens if self.tree_tokens else None

    def to_mapping(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_mapping(cls, saved: dict[str, Any]) -> RunSums:
        """Raises msgspec.ValidationError for what ``to_mapping`` did not write."""
        return msgspec.convert(saved, cls)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """What became of every sampled token and every dispatched group, over all attempts at the run.

    In a sound run ``sampled == trained + sum(not_trained.values())``, of tokens and of groups (``dispatched``) alike.
    Counts by reason are above 0 and in the order of their names.
    """

    tokens_sampled: int
    tokens_trained: int
    tokens_not_trained: Mapping[str, int]
    groups_dispatched: int
    groups_trained: int
    groups_not_trained: Mapping[str, int]


@dataclasses.dataclass(kw_only=True)
class RunAccount:
    """The account while the run is up; for the training thread alone.

    Two sides that know nothing of each other meet in it: what the engines drew, by their own records, and what the
    pool was told. An *owner* names what tokens were drawn for on both sides. ``counted_at``: the moment
    (``time.monotonic()``) up to which ``sums`` has the run's wall clock.
    """

    engines: Engines
    pool: Pool
    sums: RunSums
    counted_at: float

    @classmethod
    def open(cls, engines: Engines, pool: Pool, sums: RunSums, *, counted_at: float) -> Self:
        """Counts as lost what the engines' records have of owners that a crash cut off: the pool never heard of it."""
        pool.count_lost(engines.given_before())
        return cls(engines=engines, pool=pool, sums=sums, counted_at=counted_at)

    def name_owner(self, what: str, step: int) -> str:
        """The owner of what is drawn after a step in this attempt at the run."""
        return f"{what}-{self.pool.attempt}.{step}"

    def count_probes(self, completions: Iterable[Completion], owner: str) -> None:
        self._count("probe", sum(len(each.token_ids) for each in completions), owner)

    def count_evaluation(self, sampled_tokens: int, owner: str) -> None:
        self._count("evaluation", sampled_tokens, owner)

    def count_time(self) -> None:
        """Brings the wall clock of the sums up to now."""
        now = time.monotonic()
        self.sums.wall_s += max(0.0, now - self.counted_at)  # a clock that is set back costs the figure, not the report
        self.counted_at = now

    def close(self) -> Account:
        """The account at the end: the pool is closed and rewound to the last step, and nobody asks for more."""
        drawn = _await_idle(self.engines)
        self.engines.flush()
        return settle(drawn, self.pool.tokens(), self.pool.snapshot(), self.sums)

    def _count(self, reason: str, tokens: int, owner: str) -> None:
        self.engines.flush()  # the pool must not know of more than a crash leaves of the engines' records
        self.pool.count_tokens(reason, tokens, owner=owner)


def describe_unrecorded(engines: EngineAccount, tokens: TokenAccount) -> str | None:
    """What to tell where earlier attempts reported more tokens than the engines' records have; None where they did not.

    Records are on the disk before anything is reported by them, so they are missing only where a file was damaged.
    """
    missing = tokens.total + engines.inherited_cancelled + engines.inherited_failed - engines.inherited
    if missing <= 0:
        return None
    return (
        f"the engines' records hold {missing:,} tokens fewer than the journal: a request log was cut or removed. No "
        "weights are touched by this; the account of tokens stays open by as many, and what is trained without a "
        "record counts as drift"
    )


def _await_idle(engines: Engines) -> EngineAccount:
    """The engines' account once no request is open: those that were cancelled end with the engines' next step."""
    until = time.monotonic() + _IDLE_S
    while (drawn := engines.account()).active + drawn.waiting + drawn.open > 0 and time.monotonic() < until:
        time.sleep(_LOOK_S)
    return drawn


def settle(engines: EngineAccount, tokens: TokenAccount, groups: PoolSnapshot, sums: RunSums) -> Account:
    """The account of a run that has ended, from what each part of it counted for itself.

    What was drawn and given to nobody is known to the engines alone, over all attempts; what a skipped step would have
    trained, to the trainer. Finished groups that still wait are unused;
    those that the end of an attempt cut off, and that were not begun again, were in flight at the end.
    """
    not_trained = Counter(tokens.not_trained)
    not_trained["skipped_step"] += sums.skipped_tokens
    not_trained["cancelled"] += engines.inherited_cancelled + engines.cancelled
    not_trained["lost_replica"] += engines.lost
    not_trained["request_failed"] += engines.inherited_failed + engines.failed
    groups_not_trained = Counter(groups.groups_not_trained)
    groups_not_trained[UNUSED_AT_END] += groups.finished_waiting
    groups_not_trained[IN_FLIGHT_AT_END] += groups.waiting
    return Account(
        tokens_sampled=engines.inherited + engines.sampled,
        tokens_trained=sums.trained_tokens,
        tokens_not_trained=_without_zeros(not_trained),
        groups_dispatched=groups.groups_dispatched,
        groups_trained=groups.groups_trained,
        groups_not_trained=_without_zeros(groups_not_trained),
    )


def _without_zeros(counts: Mapping[str, int]) -> dict[str, int]:
    return {reason: count for reason, count in sorted(counts.items()) if count}

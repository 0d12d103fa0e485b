"""Sums over a run that no single package keeps; they travel with the checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from forgejax.learner import PackedBatch, PackedStep, PackStats


@dataclasses.dataclass(kw_only=True)
class Tally:
    """The lineage of the current parameters in sums.

    ``trained_tokens`` is what the device-side term mask counted; ``skipped_tokens`` those of steps that were not
    finite. ``train_s`` is the wall clock of the steps; ``wait_s`` what of it the trainer waited for data, and
    ``packing_wait_s`` what it would not have waited had packing taken no time. The gap is |trainer - sampler| of a
    token's log-probability, over ``gap_tokens`` tokens drawn by the very weights that scored them.
    """

    steps: int = 0
    wall_s: float = 0.0
    trained_tokens: int = 0
    skipped_tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    drift_tokens: int = 0
    tree_tokens: int = 0
    unmerged_tokens: int = 0
    gap_max: float = 0.0
    gap_sum: float = 0.0
    gap_tokens: int = 0
    train_s: float = 0.0
    wait_s: float = 0.0
    packing_wait_s: float = 0.0

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

    def count_gaps(self, gaps: np.ndarray) -> None:
        if gaps.size:
            self.gap_max = max(self.gap_max, float(gaps.max()))
            self.gap_sum += float(gaps.sum())
            self.gap_tokens += int(gaps.size)

    @property
    def gap_mean(self) -> float | None:
        return self.gap_sum / self.gap_tokens if self.gap_tokens else None

    @property
    def tree_token_ratio(self) -> float | None:
        return self.unmerged_tokens / self.tree_tokens if self.tree_tokens else None

    def to_mapping(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_mapping(cls, saved: dict[str, Any]) -> Tally:
        """Raises msgspec.ValidationError for what ``to_mapping`` did not write."""
        return msgspec.convert(saved, cls)


def fresh_gaps(scored: Sequence[np.ndarray], packed: PackedStep, version: int) -> np.ndarray:
    """|trainer - sampler| log-probability of the terms drawn by ``version`` alone, over all rows of a packed step.

    Args:
        scored: for each of the step's parts the trainer's log-probabilities [B, M] under the weights of ``version``.
        packed: the same terms with what the sampler recorded.
        version: tokens of other versions, or with older keys and values in their context, are left out.
    """
    gaps = [_fresh(scores, part.batch, version) for scores, part in zip(scored, packed.parts, strict=True)]
    return np.concatenate(gaps) if gaps else np.zeros(0)


def _fresh(scores: np.ndarray, batch: PackedBatch, version: int) -> np.ndarray:
    fresh = np.asarray(batch.term_mask)
    for drawn in (batch.version, batch.oldest_version):
        fresh = fresh & (np.asarray(drawn) == version)
    return np.abs(scores - np.asarray(batch.old_logp))[fresh]

"""From finished groups, or from samples, to what one step takes. Everything here is numpy.

Rewards become advantages (``credit``), a plan decides what lies where (``packing/plan``), and is laid into arrays
(``packing/lay``). Shapes come from a few buckets, so that a run compiles a handful of programs and never one per tree.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from forgejax.errors import TrainingError
from forgejax.learner.credit.credit import CreditConfig, assign_credit
from forgejax.learner.packing.batch import PackedStep
from forgejax.learner.packing.config import PackConfig
from forgejax.learner.packing.forest import Forest
from forgejax.learner.packing.lay import lay_plan
from forgejax.learner.packing.plan import plan_step
from forgejax.learner.packing.samples import Sample
from forgejax.types import Group


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """One optimizer step's data and its account.

    ``groups`` are the indices of the groups in it; ``untrained`` counts their sampled tokens that are not trained, by
    reason. Every sampled token of the groups is in ``untrained`` or in ``packed.stats.trained_tokens``.
    """

    packed: PackedStep
    groups: tuple[int, ...]
    untrained: Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackGroups:
    """Groups to a TrainingBatch: credit, merge, pack. Deterministic, so that a resumed pipeline gives the same."""

    credit: CreditConfig
    packing: PackConfig
    row_shards: int = 1

    def __call__(self, groups: Sequence[Group]) -> TrainingBatch:
        """Raises TrainingError if no token of the groups can be trained (``make_judge`` drops such groups earlier)."""
        credits = [assign_credit(group, self.credit, self.packing) for group in groups]
        untrained: Counter[str] = Counter()
        for found in credits:
            untrained.update(found.untrained)
        kept = [found.samples for found in credits if found.samples]
        if not kept:
            raise TrainingError(
                f"none of {len(groups)} groups has a token to train ({dict(untrained)}): judge groups before batching"
            )
        return TrainingBatch(
            packed=pack(kept, self.packing, row_shards=self.row_shards),
            groups=tuple(group.dispatch.index for group in groups),
            untrained=dict(untrained),
        )


def pack(groups: Sequence[Sequence[Sample]], config: PackConfig, *, row_shards: int = 1) -> PackedStep:
    """Merges and packs the samples of one optimizer step.

    All samples share one forest: what prefixes they have in common is computed once in each row, across groups too. An
    inner sequence may stand for a task's group, whose normaliser it is. The loss of the step is the sum over its
    micro-batches: the normaliser is counted once, over all samples, unmerged.

    Args:
        groups: at least one group, of at least one sample each, that ``config.fits``.
        config: the shape of a micro-batch.
        row_shards: how many shards of the mesh split the rows; every micro-batch has ``rows`` for each.

    Raises:
        ValueError: there is nothing to pack, or a sample is too long.
    """
    groups = [group for group in groups if group]
    if not groups:
        raise ValueError("no samples to pack; expected at least one group with a trained token")
    _check_lengths(groups, config)
    forest = Forest.of([sample for group in groups for sample in group], _normalise_weights(groups, config))
    return lay_plan(plan_step(forest, config, row_shards=row_shards), config)


def _check_lengths(groups: Sequence[Sequence[Sample]], config: PackConfig) -> None:
    for sample in (sample for group in groups for sample in group):
        if sample.fed_tokens > config.row_length and not config.fits(sample.fed_tokens, len(sample.token_ids)):
            raise ValueError(
                f"sample {sample.request_id} feeds {sample.fed_tokens} tokens and trains {len(sample.token_ids)}; "
                f"a row holds {config.row_length}, two do where packing.trunks is true and one holds what is trained: "
                "raise packing.row_length or leave the sample out"
            )


def _normalise_weights(groups: Sequence[Sequence[Sample]], config: PackConfig) -> Float[np.ndarray, " R"]:
    """The loss weight of each sample's terms: its own, over its group's Z, which counts unmerged trained tokens times
    the weight of their sample. By ``sample`` a sample's weight is first shared out over its tokens."""
    own = [np.array([sample.weight for sample in group]) for group in groups]
    lengths = [np.array([len(sample.token_ids) for sample in group]) for group in groups]
    if config.loss_norm == "sample":
        own = [weights / counts for weights, counts in zip(own, lengths, strict=True)]
    totals = np.array([weights @ counts for weights, counts in zip(own, lengths, strict=True)])
    normalisers = np.full(len(groups), totals.sum()) if config.loss_norm == "batch" else totals * len(groups)
    return np.concatenate([weights / max(z, 1e-30) for weights, z in zip(own, normalisers, strict=True)])

"""Packing: prefix trees into rows of static shape. Everything here is numpy.

Shapes come from a few buckets, so that a run compiles a handful of programs and never one per tree.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from forgejax.learner.packing.assembling import assemble, shape_of
from forgejax.learner.packing.batch import PackedBatch, PackedStep, PackedTrunk, PackStats
from forgejax.learner.packing.config import EDGE_BUCKETS, TERM_BUCKETS, PackConfig
from forgejax.learner.packing.filling import Row, balance
from forgejax.learner.packing.forest import Forest
from forgejax.learner.packing.phases import in_phases
from forgejax.learner.packing.samples import Sample
from forgejax.learner.packing.trunks import assemble_trunk, trunk_stats


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
    forest = Forest.of([sample for group in groups for sample in group], _weights(groups, config))
    return pack_forest(forest, config, row_shards=row_shards)


def pack_forest(forest: Forest, config: PackConfig, *, row_shards: int = 1) -> PackedStep:
    """Packs samples that are merged already; ``forest.weights`` have the normaliser."""
    rows, trunk_slots = in_phases(forest, config, row_shards)
    shape = shape_of(rows, config)
    balanced = balance(rows, config, row_shards)
    batches, placements = [], []
    for index, shards in enumerate(balanced):
        batch, placed = assemble([row for shard in shards for row in shard], index, shape, config)
        batches.append(batch)
        placements.extend(placed)
    trunks: list[PackedTrunk] = []
    index = len(batches)
    for slots in trunk_slots:
        trunk, placed = assemble_trunk(slots, index, config)
        trunks.append(trunk)
        placements.extend(placed)
        index += 1 + len(trunk.leaves)
    return PackedStep(
        batches=tuple(batches),
        placements=tuple(placements),
        stats=_stats(balanced, config) + trunk_stats(trunk_slots, config),
        trunks=tuple(trunks),
    )


def empty_batch(config: PackConfig, *, row_shards: int = 1) -> PackedBatch:
    """A full micro-batch of padding alone, in the shape of batches that train up to half of their tokens.

    Compiling for it serves those; which other buckets a run needs shows in its first steps.
    """
    T = config.row_length
    shape = int(EDGE_BUCKETS[1] * T), TERM_BUCKETS[0] * T
    return assemble([[] for _ in range(config.rows * row_shards)], 0, shape, config)[0]


def _check_lengths(groups: Sequence[Sequence[Sample]], config: PackConfig) -> None:
    for sample in (sample for group in groups for sample in group):
        if sample.fed_tokens > config.row_length and not config.fits(sample.fed_tokens, len(sample.token_ids)):
            raise ValueError(
                f"sample {sample.request_id} feeds {sample.fed_tokens} tokens and trains {len(sample.token_ids)}; "
                f"a row holds {config.row_length}, two do where packing.trunks is true and one holds what is trained: "
                "raise packing.row_length or leave the sample out"
            )


def _weights(groups: Sequence[Sequence[Sample]], config: PackConfig) -> Float[np.ndarray, " S"]:
    """The loss weight of each sample's terms: its own, over its group's Z, which counts unmerged trained tokens times
    the weight of their sample."""
    own = [np.array([sample.weight for sample in group]) for group in groups]
    totals = np.array(
        [weights @ [len(sample.token_ids) for sample in group] for weights, group in zip(own, groups, strict=True)]
    )
    normalisers = np.full(len(groups), totals.sum()) if config.loss_norm == "batch" else totals * len(groups)
    return np.concatenate([weights / max(z, 1e-30) for weights, z in zip(own, normalisers, strict=True)])


def _stats(batches: Sequence[Sequence[Sequence[Row]]], config: PackConfig) -> PackStats:
    rows = [row for shards in batches for shard in shards for row in shard]
    bins = [bin for row in rows for bin in row]
    fed = np.array([sample.fed_tokens for bin in bins for sample in bin.tree.samples], np.int64)
    # The shards of a micro-batch wait for the one with the most pairs.
    awaited = [
        len(shards) * max(sum(bin.pairs for row in shard for bin in row) for shard in shards) for shards in batches
    ]
    return PackStats(
        samples=len(fed),
        trained_tokens=sum(len(bin.tree.term_edge) for bin in bins),
        tree_tokens=sum(len(bin.tree.tokens) for bin in bins),
        unmerged_tokens=int(fed.sum()),
        tree_pairs=sum(bin.pairs for bin in bins),
        unmerged_pairs=int((fed * (fed + 1) // 2).sum()),
        awaited_pairs=sum(awaited),
        padded_tokens=len(rows) * config.row_length,
    )

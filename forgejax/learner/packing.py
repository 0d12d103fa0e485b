"""Packing: prefix trees into rows of static shape. Everything here is numpy.

Shapes come from a few buckets, so that a run compiles a handful of programs and never one per tree.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forgejax.learner.batch import PackedBatch, PackedStep, PackStats, Placement
from forgejax.learner.filling import Row, balance, fill
from forgejax.learner.pack_config import EDGE_BUCKETS, TERM_BUCKETS, PackConfig
from forgejax.learner.samples import Sample
from forgejax.learner.tree import build_tree
from forgejax.ops import tree_meta


def pack(groups: Sequence[Sequence[Sample]], config: PackConfig, *, row_shards: int = 1) -> PackedStep:
    """Merges and packs the samples of one optimizer step.

    Samples of one inner sequence share one tree; each may stand for a task's group. The loss of the step is the sum
    over its micro-batches: the normaliser is counted once, over all samples, unmerged.

    Args:
        groups: at least one group, of at least one sample each; no sample is fed more than ``row_length`` tokens.
        config: the shape of a micro-batch.
        row_shards: how many shards of the mesh split the rows; every micro-batch has ``rows`` for each.

    Raises:
        ValueError: there is nothing to pack, or a sample does not fit into a row.
    """
    groups = [group for group in groups if group]
    if not groups:
        raise ValueError("no samples to pack; expected at least one group with a trained token")
    _check_lengths(groups, config)
    rows = fill([build_tree(group) for group in groups], _scales(groups, config), config, row_shards)
    shape = _shape(rows, config)
    balanced = balance(rows, config.rows, row_shards)
    batches, placements = [], []
    for index, shards in enumerate(balanced):
        batch, placed = _assemble([row for shard in shards for row in shard], index, shape, config)
        batches.append(batch)
        placements.extend(placed)
    return PackedStep(batches=tuple(batches), placements=tuple(placements), stats=_stats(balanced, config))


def empty_batch(config: PackConfig, *, row_shards: int = 1) -> PackedBatch:
    """A full micro-batch of padding alone, in the shape of batches that train up to half of their tokens.

    Compiling for it serves those; which other buckets a run needs shows in its first steps.
    """
    T = config.row_length
    shape = int(EDGE_BUCKETS[1] * T), TERM_BUCKETS[0] * T
    return _assemble([[] for _ in range(config.rows * row_shards)], 0, shape, config)[0]


def _check_lengths(groups: Sequence[Sequence[Sample]], config: PackConfig) -> None:
    for sample in (sample for group in groups for sample in group):
        if sample.fed_tokens > config.row_length:
            raise ValueError(
                f"sample {sample.request_id} feeds {sample.fed_tokens} tokens; a row holds {config.row_length}: "
                "raise packing.row_length or leave the sample out"
            )


def _scales(groups: Sequence[Sequence[Sample]], config: PackConfig) -> list[float]:
    """1 / Z of each group, Z counted on unmerged trained tokens times their sample's weight."""
    totals = np.array([sum(sample.weight * len(sample.token_ids) for sample in group) for group in groups])
    if config.loss_norm == "batch":
        return [1.0 / max(totals.sum(), 1e-30)] * len(groups)
    return [1.0 / max(total * len(groups), 1e-30) for total in totals]


def _shape(rows: Sequence[Row], config: PackConfig) -> tuple[int, int]:
    """E and M: the smallest buckets that hold every row of the step."""
    edges = max(sum(len(bin.tree.edge_src) for bin in row) for row in rows)
    terms = max(sum(len(bin.tree.term_edge) for bin in row) for row in rows)
    T = config.row_length
    return (
        next(size for share in EDGE_BUCKETS if edges <= (size := int(share * T))),
        next(size for share in TERM_BUCKETS if terms <= (size := share * T)),
    )


def _assemble(
    rows: Sequence[Row], index: int, shape: tuple[int, int], config: PackConfig
) -> tuple[PackedBatch, list[Placement]]:
    """Copies the trees of each row behind one another."""
    B, T, (E, M) = len(rows), config.row_length, shape
    ints = {name: np.zeros((B, T), np.int32) for name in ("tokens", "positions", "samples_through")}
    ints |= {name: np.zeros((B, E), np.int32) for name in ("edge_src", "edge_tgt")}
    ints |= {name: np.zeros((B, M), np.int32) for name in ("term_edge", "version", "oldest_version")}
    floats = {name: np.zeros((B, M), np.float32) for name in ("old_logp", "advantage", "weight")}
    end = np.tile(np.arange(1, T + 1, dtype=np.int32), (B, 1))
    edge_temperature = np.ones((B, E), np.float32)
    term_sample = np.full((B, M), M - 1, np.int32)
    term_mask = np.zeros((B, M), np.bool_)
    lengths = np.zeros(B, np.int32)
    placements = []
    for row, bins in enumerate(rows):
        node = edge = term = sample_count = 0
        for bin in bins:
            tree, samples = bin.tree, bin.tree.samples
            nodes, edges = slice(node, node + len(tree.tokens)), slice(edge, edge + len(tree.edge_src))
            terms = slice(term, term + len(tree.term_edge))
            ints["tokens"][row, nodes] = tree.tokens
            ints["positions"][row, nodes] = tree.positions
            ints["samples_through"][row, nodes] = tree.samples_through
            end[row, nodes] = tree.end + node
            ints["edge_src"][row, edges] = tree.edge_src + node
            ints["edge_tgt"][row, edges] = tree.edge_tgt
            edge_temperature[row, edges] = tree.edge_temperature
            counts = np.array([len(sample.token_ids) for sample in samples])
            ints["term_edge"][row, terms] = tree.term_edge + edge
            ints["version"][row, terms] = np.concatenate([sample.versions for sample in samples])
            ints["oldest_version"][row, terms] = np.concatenate([sample.oldest_versions for sample in samples])
            floats["old_logp"][row, terms] = np.concatenate([sample.old_logp for sample in samples])
            floats["advantage"][row, terms] = np.repeat([sample.advantage for sample in samples], counts)
            floats["weight"][row, terms] = np.repeat(bin.weights, counts)
            term_sample[row, terms] = np.repeat(np.arange(len(samples)) + sample_count, counts)
            term_mask[row, terms] = True
            stops = term + counts.cumsum()
            placements += [
                Placement(request_id=sample.request_id, batch=index, row=row, start=int(stop - count), stop=int(stop))
                for sample, count, stop in zip(samples, counts, stops, strict=True)
            ]
            node, edge, term = nodes.stop, edges.stop, terms.stop
            sample_count += len(samples)
        lengths[row] = node
    batch = PackedBatch(
        **ints,
        **floats,
        attention=tree_meta(end, lengths, config.block_size),
        edge_temperature=edge_temperature,
        term_sample=term_sample,
        term_mask=term_mask,
    )
    return batch, placements


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

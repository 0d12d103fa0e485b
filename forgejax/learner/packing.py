"""Packing: prefix trees into rows of static shape. Everything here is numpy.

A group too large for a row is cut into ranges of its samples; the bins are spread over rows, the rows over
micro-batches and shards. Shapes come from geometric buckets, so that a run compiles a handful of programs and never one
per tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from forgejax.errors import ConfigError
from forgejax.learner.batch import PackedBatch, PackedStep, PackStats, Placement
from forgejax.learner.cutting import cut
from forgejax.learner.samples import Sample
from forgejax.learner.tree import PrefixTree, build_tree
from forgejax.ops import tree_meta

LossNorm = Literal["group", "batch"]
_EDGE_BUCKETS = (0.5, 1.0)  # of the row length
_TERM_BUCKETS = (1, 4, 16)  # of the row length: identical samples share edges but not terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Shape of a micro-batch, and what a row is thought to cost.

    ``rows`` is per row shard of the mesh. A row's cost, by which shards are balanced, is
    ``token_cost * tokens + pair_cost * query-key pairs``.
    """

    row_length: int = 512
    rows: int = 2
    block_size: int = 64
    token_cost: float = 1.0
    pair_cost: float = 0.005
    loss_norm: LossNorm = "group"

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.row_length < 2 or self.row_length % self.block_size:
            raise ConfigError(
                f"packing.row_length {self.row_length} is not a multiple of packing.block_size {self.block_size}"
            )
        if self.rows < 1:
            raise ConfigError(f"packing.rows is {self.rows}; expected at least 1 row a shard")
        if min(self.token_cost, self.pair_cost) < 0 or self.token_cost + self.pair_cost == 0:
            raise ConfigError("packing.token_cost and packing.pair_cost: expected a positive cost, none negative")

    @property
    def term_limit(self) -> int:
        """M of the largest bucket."""
        return _TERM_BUCKETS[-1] * self.row_length


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Bin:
    """A tree that goes into one row whole, and the loss weight of each of its samples' terms."""

    tree: PrefixTree
    weights: NDArray[np.float64]
    cost: float


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
    bins = [
        bin
        for group, weight in zip(groups, _scales(groups, config), strict=True)
        for bin in _bins(group, weight, config)
    ]
    rows = _balance(_fill(bins, config), config.rows, row_shards)
    shape = _shape(rows, config)
    per_batch = config.rows * row_shards
    batches, placements = [], []
    for index in range(len(rows) // per_batch):
        batch, placed = _assemble(rows[index * per_batch : (index + 1) * per_batch], index, shape, config)
        batches.append(batch)
        placements.extend(placed)
    return PackedStep(batches=tuple(batches), placements=tuple(placements), stats=_stats(bins, len(rows), config))


def empty_batch(config: PackConfig, *, row_shards: int = 1) -> PackedBatch:
    """A micro-batch of padding alone, in the smallest shapes: compiling for it serves the usual batch."""
    rows: list[list[_Bin]] = [[] for _ in range(config.rows * row_shards)]
    return _assemble(rows, 0, _shape(rows, config), config)[0]


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


def _bins(group: Sequence[Sample], scale: float, config: PackConfig) -> list[_Bin]:
    tree = build_tree(group)
    whole = len(tree.tokens) <= config.row_length and len(tree.edge_src) <= config.row_length
    if whole and len(tree.term_edge) <= config.term_limit:
        trees = [tree]
    else:
        ranges = cut(tree.samples, tree.shared, config.row_length, config.term_limit)
        trees = [build_tree(tree.samples[start:stop]) for start, stop in ranges]
    return [
        _Bin(
            tree=tree,
            weights=np.array([sample.weight * scale for sample in tree.samples]),
            cost=config.token_cost * len(tree.tokens) + config.pair_cost * tree.attention_pairs,
        )
        for tree in trees
    ]


def _fill(bins: Sequence[_Bin], config: PackConfig) -> list[list[_Bin]]:
    """First-fit decreasing over rows that hold ``row_length`` tokens, as many edges, and ``term_limit`` terms."""
    limit = np.array([config.row_length, config.row_length, config.term_limit])
    rows: list[list[_Bin]] = []
    free: list[NDArray[np.int64]] = []
    for bin in sorted(bins, key=lambda bin: -len(bin.tree.tokens)):
        need = np.array([len(bin.tree.tokens), len(bin.tree.edge_src), len(bin.tree.term_edge)])
        row = next((row for row, room in enumerate(free) if (need <= room).all()), None)
        if row is None:
            row = len(rows)
            rows.append([])
            free.append(limit.copy())
        rows[row].append(bin)
        free[row] = free[row] - need
    return rows


def _balance(rows: list[list[_Bin]], per_shard: int, shards: int) -> list[list[_Bin]]:
    """Orders rows so that the shards of every micro-batch cost about the same; fills up with empty rows.

    Shards wait for each other at the end of a micro-batch: rows of like cost go into the same one, and within it the
    dearest free row goes to the cheapest shard.
    """
    per_batch = per_shard * shards
    count = -(-len(rows) // per_batch) * per_batch
    cost = {id(row): sum(bin.cost for bin in row) for row in rows}
    queue = sorted(rows, key=lambda row: -cost[id(row)])
    ordered: list[list[_Bin]] = []
    for start in range(0, count, per_batch):
        slots: list[list[list[_Bin]]] = [[] for _ in range(shards)]
        loads = np.zeros(shards)
        for row in queue[start : start + per_batch]:
            shard = min((s for s in range(shards) if len(slots[s]) < per_shard), key=lambda s: loads[s])
            slots[shard].append(row)
            loads[shard] += cost[id(row)]
        for slot in slots:
            ordered.extend(slot + [[] for _ in range(per_shard - len(slot))])
    return ordered


def _shape(rows: Sequence[Sequence[_Bin]], config: PackConfig) -> tuple[int, int]:
    """E and M: the smallest buckets that hold every row of the step."""
    edges = max(sum(len(bin.tree.edge_src) for bin in row) for row in rows)
    terms = max(sum(len(bin.tree.term_edge) for bin in row) for row in rows)
    T = config.row_length
    return (
        next(size for share in _EDGE_BUCKETS if edges <= (size := int(share * T))),
        next(size for share in _TERM_BUCKETS if terms <= (size := share * T)),
    )


def _assemble(
    rows: Sequence[Sequence[_Bin]], index: int, shape: tuple[int, int], config: PackConfig
) -> tuple[PackedBatch, list[Placement]]:
    """Copies the trees of each row behind one another."""
    B, T, (E, M) = len(rows), config.row_length, shape
    ints = {name: np.zeros((B, T), np.int32) for name in ("tokens", "positions")}
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


def _stats(bins: Sequence[_Bin], rows: int, config: PackConfig) -> PackStats:
    fed = np.array([sample.fed_tokens for bin in bins for sample in bin.tree.samples], np.int64)
    return PackStats(
        samples=len(fed),
        trained_tokens=sum(len(bin.tree.term_edge) for bin in bins),
        tree_tokens=sum(len(bin.tree.tokens) for bin in bins),
        unmerged_tokens=int(fed.sum()),
        tree_pairs=sum(bin.tree.attention_pairs for bin in bins),
        unmerged_pairs=int((fed * (fed + 1) // 2).sum()),
        padded_tokens=rows * config.row_length,
    )

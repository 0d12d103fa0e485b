"""A plan's rows as the arrays of micro-batches, where each sample went, and what that saved. Everything is numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int

from forgejax.learner.packing.batch import PackedBatch, PackedStep, PackedTrunk, PackStats, Placement
from forgejax.learner.packing.config import EDGE_BUCKETS, TERM_BUCKETS, PackConfig
from forgejax.learner.packing.plan import BatchPlan, Bin, RowPlan, StepPlan, TrunkPlan
from forgejax.ops import tree_meta

Shape = tuple[int, int]
"""E and M of a micro-batch."""


def lay_plan(plan: StepPlan, config: PackConfig) -> PackedStep:
    """The arrays of every micro-batch. Batches of one plan share a shape, and so do the leaves of a trunk."""
    layer = _Layer(config)
    shape = choose_shape(_rows_of(plan.batches), config)
    batches = [layer.lay(rows_by_shard, shape) for rows_by_shard in plan.batches]
    trunks = [_lay_trunk(layer, trunk, config) for trunk in plan.trunks]
    return PackedStep(
        batches=tuple(batches), placements=tuple(layer.placements), stats=layer.stats, trunks=tuple(trunks)
    )


def lay_empty(config: PackConfig, *, row_shards: int = 1) -> PackedStep:
    """A full micro-batch of padding alone, in the shape of batches that train up to half of their tokens.

    Compiling for it serves those; which other buckets a run needs shows in its first steps.
    """
    layer = _Layer(config)
    shape = int(EDGE_BUCKETS[1] * config.row_length), TERM_BUCKETS[0] * config.row_length
    batch = layer.lay(((RowPlan(),) * config.rows,) * row_shards, shape)
    return PackedStep(batches=(batch,), placements=(), stats=layer.stats)


def choose_shape(rows: Iterable[RowPlan], config: PackConfig) -> Shape:
    """The smallest buckets that hold every row, of at least one.

    Raises:
        ValueError: a row has more edges or terms than the largest bucket.
    """
    rows = list(rows)
    edges = max((row.edges for row in rows), default=0)
    terms = max((row.terms for row in rows), default=0)
    edge_sizes = [max(1, int(share * config.row_length)) for share in EDGE_BUCKETS]
    term_sizes = [share * config.row_length for share in TERM_BUCKETS]
    return _smallest_bucket(edge_sizes, edges, "edges"), _smallest_bucket(term_sizes, terms, "terms")


class _Layer:
    """Lays one micro-batch after another; ``placements`` and ``stats`` are of all so far."""

    def __init__(self, config: PackConfig) -> None:
        self._config = config
        self._count = 0
        self.placements: list[Placement] = []
        self.stats = PackStats()

    def lay(self, plan: BatchPlan, shape: Shape) -> PackedBatch:
        """The arrays of a micro-batch, rows by shard."""
        arrays = _Arrays(sum(len(rows) for rows in plan), shape, self._config)
        for row, planned in enumerate(_rows_of([plan])):
            self.placements += arrays.lay_row(row, planned, batch=self._count)
        self.stats += _count_batch(plan, self._config)
        self._count += 1
        return arrays.batch(self._config.block)


class _Arrays:
    """The arrays of B rows, padding until a row is laid. Attributes are named as ``PackedBatch``'s."""

    def __init__(self, rows: int, shape: Shape, config: PackConfig) -> None:
        B, T, (E, M) = rows, config.row_length, shape
        self.tokens_BT, self.positions_BT, self.samples_through_BT = (np.zeros((B, T), np.int32) for _ in range(3))
        self.end_BT = np.tile(np.arange(1, T + 1, dtype=np.int32), (B, 1))
        self.lengths_B = np.zeros(B, np.int32)
        self.edge_src_BE, self.edge_tgt_BE = (np.zeros((B, E), np.int32) for _ in range(2))
        self.edge_temperature_BE = np.ones((B, E), np.float32)
        self.term_edge_BM, self.version_BM, self.oldest_version_BM = (np.zeros((B, M), np.int32) for _ in range(3))
        self.old_logp_BM, self.advantage_BM, self.weight_BM = (np.zeros((B, M), np.float32) for _ in range(3))
        self.term_sample_BM = np.full((B, M), M - 1, np.int32)
        self.term_mask_BM = np.zeros((B, M), np.bool_)

    def lay_row(self, row: int, plan: RowPlan, *, batch: int) -> list[Placement]:
        """Copies the trees of a row behind one another, and lays the row's trunk under them."""
        placements = []
        filled = _Filled()
        for bin in plan.bins:
            placed, filled = self._lay_bin(row, bin, filled, batch)
            placements += placed
        self.lengths_B[row] = filled.nodes
        if len(plan.path):
            self._lay_path(row, plan)
        return placements

    def _lay_bin(self, row: int, bin: Bin, filled: _Filled, batch: int) -> tuple[list[Placement], _Filled]:
        """The placements of a tree's samples, and how far the row is filled behind it."""
        tree = bin.forest.part(bin.start, bin.stop)
        samples = tree.samples
        behind = _Filled(
            nodes=filled.nodes + len(tree.tokens_T),
            edges=filled.edges + len(tree.edge_src_E),
            terms=filled.terms + len(tree.term_edge_M),
            samples=filled.samples + len(samples),
        )
        nodes = row, slice(filled.nodes, behind.nodes)
        edges = row, slice(filled.edges, behind.edges)
        terms = row, slice(filled.terms, behind.terms)
        self.tokens_BT[nodes] = tree.tokens_T
        self.positions_BT[nodes] = tree.positions_T
        self.samples_through_BT[nodes] = tree.samples_through_T
        self.end_BT[nodes] = tree.end_T + filled.nodes
        self.edge_src_BE[edges] = tree.edge_src_E + filled.nodes
        self.edge_tgt_BE[edges] = tree.edge_tgt_E
        self.edge_temperature_BE[edges] = tree.edge_temperature_E
        counts = np.array([len(sample.token_ids) for sample in samples])
        self.term_edge_BM[terms] = tree.term_edge_M + filled.edges
        self.version_BM[terms] = np.concatenate([sample.versions for sample in samples])
        self.oldest_version_BM[terms] = np.concatenate([sample.oldest_versions for sample in samples])
        self.old_logp_BM[terms] = np.concatenate([sample.old_logp for sample in samples])
        self.advantage_BM[terms] = np.repeat([sample.advantage for sample in samples], counts)
        self.weight_BM[terms] = np.repeat(bin.forest.weights_R[bin.start : bin.stop], counts)
        self.term_sample_BM[terms] = np.repeat(np.arange(filled.samples, behind.samples), counts)
        self.term_mask_BM[terms] = True
        stops = filled.terms + counts.cumsum()
        placements = [
            Placement(request_id=sample.request_id, batch=batch, row=row, start=int(stop - count), stop=int(stop))
            for sample, count, stop in zip(samples, counts, stops, strict=True)
        ]
        return placements, behind

    def _lay_path(self, row: int, plan: RowPlan) -> None:
        """A chain of tokens from node 0 on, on which the row's trees lie; samples that go on run through all of it."""
        here = row, slice(len(plan.path))
        self.tokens_BT[here] = plan.path
        self.positions_BT[here] = np.arange(len(plan.path))
        self.samples_through_BT[here] += plan.continued
        self.end_BT[here] = self.lengths_B[row] = len(plan.path)

    def batch(self, block: int) -> PackedBatch:
        return PackedBatch(
            tokens_BT=self.tokens_BT,
            positions_BT=self.positions_BT,
            samples_through_BT=self.samples_through_BT,
            attention=tree_meta(self.end_BT, self.lengths_B, block),
            edge_src_BE=self.edge_src_BE,
            edge_tgt_BE=self.edge_tgt_BE,
            edge_temperature_BE=self.edge_temperature_BE,
            term_edge_BM=self.term_edge_BM,
            term_sample_BM=self.term_sample_BM,
            term_mask_BM=self.term_mask_BM,
            old_logp_BM=self.old_logp_BM,
            advantage_BM=self.advantage_BM,
            weight_BM=self.weight_BM,
            version_BM=self.version_BM,
            oldest_version_BM=self.oldest_version_BM,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Filled:
    """How much of a row is laid."""

    nodes: int = 0
    edges: int = 0
    terms: int = 0
    samples: int = 0


def _lay_trunk(layer: _Layer, plan: TrunkPlan, config: PackConfig) -> PackedTrunk:
    trunk = layer.lay(plan.trunk, choose_shape(_rows_of([plan.trunk]), config))
    shape = choose_shape(_rows_of(plan.leaves), config)
    lengths_B = np.array([len(row.path) for row in _rows_of([plan.trunk])], np.int32)
    leaves = [
        _put_behind(layer.lay(leaf, shape), _rows_of([leaf]), trunk.attention.end, lengths_B, config)
        for leaf in plan.leaves
    ]
    return PackedTrunk(trunk=trunk, leaves=tuple(leaves))


def _put_behind(
    leaf: PackedBatch,
    rows: Sequence[RowPlan],
    trunk_end_BT: Int[np.ndarray, "B T"],
    trunk_lengths_B: Int[np.ndarray, " B"],
    config: PackConfig,
) -> PackedBatch:
    """The leaf batch, its tokens seeing their row's trunk before themselves."""
    T = trunk_end_BT.shape[1]
    lengths_B = np.array([T + row.tokens for row in rows], np.int32)
    end = np.concatenate([trunk_end_BT, leaf.attention.end + T], axis=1)
    seen = np.arange(T)[None, :] < trunk_lengths_B[:, None]
    end[:, :T] = np.where(seen, lengths_B[:, None], end[:, :T])
    return dataclasses.replace(leaf, attention=tree_meta(end, lengths_B, config.block, q_offset=T))


def _count_batch(plan: BatchPlan, config: PackConfig) -> PackStats:
    """The figures of one micro-batch; the shards wait for the one with the most pairs."""
    rows = _rows_of([plan])
    bins = [bin for row in rows for bin in row.bins]
    fed = np.concatenate([np.zeros(0, np.int64), *(bin.forest.fed[bin.start : bin.stop] for bin in bins)])
    fed += np.repeat([bin.forest.above for bin in bins], [bin.stop - bin.start for bin in bins]).astype(np.int64)
    return PackStats(
        samples=len(fed),
        trained_tokens=sum(row.terms for row in rows),
        tree_tokens=sum(row.tokens for row in rows),
        unmerged_tokens=int(fed.sum()),
        tree_pairs=sum(row.pairs for row in rows),
        unmerged_pairs=int((fed * (fed + 1) // 2).sum()),
        awaited_pairs=len(plan) * max(sum(row.pairs for row in shard) for shard in plan),
        padded_tokens=len(rows) * config.row_length,
    )


def _rows_of(plans: Iterable[BatchPlan]) -> list[RowPlan]:
    """The rows of micro-batches in the order of their arrays."""
    return [row for plan in plans for rows in plan for row in rows]


def _smallest_bucket(sizes: Sequence[int], needed: int, of: str) -> int:
    enough = [size for size in sizes if size >= needed]
    if not enough:
        raise ValueError(f"a row has {needed} {of}; the largest bucket holds {sizes[-1]}: fill it with fewer samples")
    return enough[0]

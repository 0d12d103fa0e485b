"""Which trees go into which row, and which rows into which micro-batch and shard."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from forgejax.learner.cutting import cut
from forgejax.learner.pack_config import PackConfig
from forgejax.learner.tree import PrefixTree, build_tree


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Bin:
    """A tree that goes into one row whole, and the loss weight of each of its samples' terms."""

    tree: PrefixTree
    weights: NDArray[np.float64]
    pairs: int
    cost: float

    @staticmethod
    def of(tree: PrefixTree, scale: float, config: PackConfig) -> Bin:
        pairs = tree.attention_pairs
        return Bin(
            tree=tree,
            weights=np.array([sample.weight * scale for sample in tree.samples]),
            pairs=pairs,
            cost=config.token_cost * len(tree.tokens) + config.pair_cost * pairs,
        )

    @property
    def size(self) -> tuple[int, int, int]:
        return len(self.tree.tokens), len(self.tree.edge_src), len(self.tree.term_edge)


Row = list[Bin]


def fill(trees: Sequence[PrefixTree], scales: Sequence[float], config: PackConfig, shards: int) -> list[Row]:
    """Spreads trees over rows that hold ``row_length`` tokens, as many edges, and ``term_limit`` terms.

    Trees stay whole where they can. Where that leaves so much room that cutting them at the ends of rows, which repeats
    some ancestors, saves rows of the padded micro-batches, they are cut. Linear in the number of samples, and bins
    times rows.
    """
    whole = _best_fit(
        [bin for tree, scale in zip(trees, scales, strict=True) for bin in _bins(tree, scale, config)], config
    )
    needed = -(-sum(len(tree.tokens) for tree in trees) // config.row_length)
    if padded_rows(needed, config.rows, shards) == padded_rows(len(whole), config.rows, shards):
        return whole
    full = _cut_to_fill(trees, scales, config)
    return min(whole, full, key=lambda rows: padded_rows(len(rows), config.rows, shards))


def padded_rows(count: int, per_shard: int, shards: int) -> int:
    """Rows of the micro-batches that hold ``count`` rows."""
    return sum(shards * size for size in batch_sizes(count, per_shard, shards))


def batch_sizes(count: int, per_shard: int, shards: int) -> list[int]:
    """Rows a shard of each micro-batch: all have ``per_shard``, but the last may do with a half or a quarter of it."""
    full, rest = divmod(count, per_shard * shards)
    sizes = [per_shard] * full
    if rest:
        sizes.append(next(size for part in (4, 2, 1) if (size := -(-per_shard // part)) * shards >= rest))
    return sizes


def balance(rows: Sequence[Row], per_shard: int, shards: int) -> list[list[list[Row]]]:
    """The rows of each shard of each micro-batch, such that the shards of a micro-batch cost about the same.

    Shards wait for each other at the end of a micro-batch: rows of like cost go into the same one, and within it the
    dearest free row goes to the cheapest shard. Empty rows fill up.
    """
    cost = {id(row): sum(bin.cost for bin in row) for row in rows}
    queue = iter(sorted(rows, key=lambda row: -cost[id(row)]))
    batches = []
    for size in batch_sizes(len(rows), per_shard, shards):
        slots: list[list[Row]] = [[] for _ in range(shards)]
        loads = [0.0] * shards
        for row in itertools.islice(queue, size * shards):
            shard = min((s for s in range(shards) if len(slots[s]) < size), key=loads.__getitem__)
            slots[shard].append(row)
            loads[shard] += cost[id(row)]
        batches.append([slot + [[] for _ in range(size - len(slot))] for slot in slots])
    return batches


def _bins(tree: PrefixTree, scale: float, config: PackConfig) -> list[Bin]:
    """The tree, or trees of ranges of its samples where it is too large for a row."""
    bin = Bin.of(tree, scale, config)
    tokens, edges, terms = bin.size
    if max(tokens, edges) <= config.row_length and terms <= config.term_limit:
        return [bin]
    ranges = cut(tree.samples, tree.shared, config.row_length, config.term_limit)
    return [Bin.of(build_tree(tree.samples[start:stop]), scale, config) for start, stop in ranges]


def _best_fit(bins: Sequence[Bin], config: PackConfig) -> list[Row]:
    """Best-fit decreasing: each bin goes into the fullest row that has room for it."""
    free = np.empty((len(bins), 3), np.int64)
    rows: list[Row] = []
    for bin in sorted(bins, key=lambda bin: -len(bin.tree.tokens)):
        room = np.flatnonzero((free[: len(rows)] >= bin.size).all(axis=1))
        if len(room):
            row = int(room[free[room, 0].argmin()])
        else:
            row = len(rows)
            rows.append([])
            free[row] = config.row_length, config.row_length, config.term_limit
        rows[row].append(bin)
        free[row] -= bin.size
    return rows


def _cut_to_fill(trees: Sequence[PrefixTree], scales: Sequence[float], config: PackConfig) -> list[Row]:
    """The fewest rows of samples in the order of the trees, each tree cut where a row ends."""
    samples = [sample for tree in trees for sample in tree.samples]
    shared = np.concatenate([tree.shared for tree in trees])
    begin = np.concatenate([[0], np.cumsum([len(tree.samples) for tree in trees])])
    rows = []
    for start, stop in cut(samples, shared, config.row_length, config.term_limit, fewest="ranges"):
        first, last = np.searchsorted(begin, (start, stop - 1), side="right") - 1
        row = []
        for index in range(first, last + 1):
            low, high = max(start, begin[index]), min(stop, begin[index + 1])
            tree = trees[index]
            if high - low < len(tree.samples):
                tree = build_tree(samples[low:high])
            row.append(Bin.of(tree, scales[index], config))
        rows.append(row)
    return rows

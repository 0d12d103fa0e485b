"""Which samples go into which row, and which rows into which micro-batch and shard."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from forgejax.learner.packing.config import PackConfig
from forgejax.learner.packing.cutting import cut
from forgejax.learner.packing.forest import Forest, Range
from forgejax.learner.packing.tree import PrefixTree


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Bin:
    """A tree that goes into one row whole, and the loss weight of each of its samples' terms."""

    tree: PrefixTree
    weights: Float[np.ndarray, " S"]
    pairs: int

    @staticmethod
    def of(forest: Forest, start: int, stop: int) -> Bin:
        """The tree of samples start to stop."""
        tree = forest.part(start, stop)
        return Bin(tree=tree, weights=forest.weights[start:stop], pairs=tree.attention_pairs)


Row = list[Bin]


def fill(forest: Forest, config: PackConfig, shards: int) -> list[list[Range]]:
    """Spreads a forest over rows that hold ``row_length`` tokens, as many edges, and ``term_limit`` terms.

    Trees stay whole where they can. Where that leaves so much room that cutting them at the ends of rows, which repeats
    some ancestors, saves rows of the padded micro-batches, they are cut. Linear in the number of samples, and ranges
    times rows.
    """
    rows = _best_fit(forest, _whole(forest, config), config)
    needed = -(-len(forest.tree.tokens) // config.row_length)
    if padded_rows(needed, config.rows, shards) < padded_rows(len(rows), config.rows, shards):
        whole = (0, len(forest.tree.samples))
        everything = cut(forest, whole, config.row_length, config.term_limit, fewest="ranges")
        rows = min(rows, [[one] for one in everything], key=lambda rows: padded_rows(len(rows), config.rows, shards))
    return [_joined(row) for row in rows]


def padded_rows(count: int, per_shard: int, shards: int) -> int:
    """Rows of the micro-batches that hold ``count`` rows."""
    return sum(shards * size for size in batch_sizes(count, per_shard, shards))


def batch_sizes(count: int, per_shard: int, shards: int) -> list[int]:
    """Rows a shard of each micro-batch: all have ``per_shard``, but the last may do with a half or a quarter of it."""
    full, rest = divmod(count, per_shard * shards)
    sizes = [per_shard] * full
    if rest:
        sizes.append(min(size for part in (4, 2, 1) if (size := -(-per_shard // part)) * shards >= rest))
    return sizes


def balance(rows: Sequence[Row], config: PackConfig, shards: int) -> list[list[list[Row]]]:
    """The rows of each shard of each micro-batch, such that the shards of a micro-batch cost about the same.

    Shards wait for each other at the end of a micro-batch: rows of like cost go into the same one, and within it the
    dearest free row goes to the cheapest shard. Empty rows fill up.
    """
    cost = {
        id(row): sum(config.token_cost * len(bin.tree.tokens) + config.pair_cost * bin.pairs for bin in row)
        for row in rows
    }
    queue = iter(sorted(rows, key=lambda row: -cost[id(row)]))
    batches = []
    for size in batch_sizes(len(rows), config.rows, shards):
        slots: list[list[Row]] = [[] for _ in range(shards)]
        loads = [0.0] * shards
        for row in itertools.islice(queue, size * shards):
            shard = min((s for s in range(shards) if len(slots[s]) < size), key=loads.__getitem__)
            slots[shard].append(row)
            loads[shard] += cost[id(row)]
        batches.append([slot + [[] for _ in range(size - len(slot))] for slot in slots])
    return batches


def _whole(forest: Forest, config: PackConfig) -> list[Range]:
    """The samples of each tree, in ranges that fit into a row where the tree does not."""
    ranges = []
    for start, stop in forest.roots:
        if fits(forest.size(start, stop), config):
            ranges.append((start, stop))
            continue
        ranges += cut(forest, (start, stop), config.row_length, config.term_limit)
    return ranges


def fits(size: tuple[int, int, int], config: PackConfig) -> bool:
    """Whether a row holds so many nodes, edges and terms."""
    nodes, edges, terms = size
    return max(nodes, edges) <= config.row_length and terms <= config.term_limit


def _best_fit(forest: Forest, ranges: Sequence[Range], config: PackConfig) -> list[list[Range]]:
    """Best-fit decreasing: each range goes into the fullest row that has room for it."""
    free = np.empty((len(ranges), 3), np.int64)
    rows: list[list[Range]] = []
    sizes = {one: forest.size(*one) for one in ranges}
    for one in sorted(ranges, key=lambda one: -sizes[one][0]):
        room = np.flatnonzero((free[: len(rows)] >= sizes[one]).all(axis=1))
        if len(room):
            row = int(room[free[room, 0].argmin()])
        else:
            row = len(rows)
            rows.append([])
            free[row] = config.row_length, config.row_length, config.term_limit
        rows[row].append(one)
        free[row] -= sizes[one]
    return rows


def _joined(row: Sequence[Range]) -> list[Range]:
    """The ranges of a row, neighbours as one: what they have in common lies there once."""
    joined: list[Range] = []
    for start, stop in sorted(row):
        adjacent = joined and joined[-1][1] == start
        joined.append((joined.pop()[0] if adjacent else start, stop))
    return joined

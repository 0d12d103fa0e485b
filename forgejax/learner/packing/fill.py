"""Which samples go into which row: ranges of a forest, spread over as few rows as they need."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forgejax.learner.packing.config import PackConfig
from forgejax.learner.packing.cut import cut_samples
from forgejax.learner.packing.forest import Forest, Range


def fill_rows(forest: Forest, config: PackConfig, shards: int) -> list[list[Range]]:
    """Spreads a forest over rows that hold ``row_length`` tokens, as many edges, and ``term_limit`` terms.

    Trees stay whole where they can. Where that leaves so much room that cutting them at the ends of rows, which repeats
    some ancestors, saves rows of the padded micro-batches, they are cut. Linear in the number of samples, and ranges
    times rows.
    """
    rows = _place_best_fit(forest, _keep_whole(forest, config), config)
    needed = -(-len(forest.tree.tokens_T) // config.row_length)
    if count_padded_rows(needed, config.rows, shards) < count_padded_rows(len(rows), config.rows, shards):
        whole = (0, len(forest.tree.samples))
        everything = cut_samples(forest, whole, config.row_length, config.term_limit, fewest="ranges")
        rows = min(
            rows, [[one] for one in everything], key=lambda rows: count_padded_rows(len(rows), config.rows, shards)
        )
    return [_join_neighbours(row) for row in rows]


def count_padded_rows(count: int, per_shard: int, shards: int) -> int:
    """Rows of the micro-batches that hold ``count`` rows."""
    return sum(shards * size for size in split_into_batches(count, per_shard, shards))


def split_into_batches(count: int, per_shard: int, shards: int) -> list[int]:
    """Rows a shard of each micro-batch: all have ``per_shard``, but the last may do with a half or a quarter of it."""
    full, rest = divmod(count, per_shard * shards)
    sizes = [per_shard] * full
    if rest:
        sizes.append(min(size for part in (4, 2, 1) if (size := -(-per_shard // part)) * shards >= rest))
    return sizes


def fits_row(size: tuple[int, int, int], config: PackConfig) -> bool:
    """Whether a row holds so many nodes, edges and terms."""
    nodes, edges, terms = size
    return max(nodes, edges) <= config.row_length and terms <= config.term_limit


def _keep_whole(forest: Forest, config: PackConfig) -> list[Range]:
    """The samples of each tree, in ranges that fit into a row where the tree does not."""
    ranges = []
    for start, stop in forest.roots:
        if fits_row(forest.size(start, stop), config):
            ranges.append((start, stop))
            continue
        ranges += cut_samples(forest, (start, stop), config.row_length, config.term_limit)
    return ranges


def _place_best_fit(forest: Forest, ranges: Sequence[Range], config: PackConfig) -> list[list[Range]]:
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


def _join_neighbours(row: Sequence[Range]) -> list[Range]:
    """The ranges of a row, neighbours as one: what they have in common lies there once."""
    joined: list[Range] = []
    for start, stop in sorted(row):
        adjacent = joined and joined[-1][1] == start
        joined.append((joined.pop()[0] if adjacent else start, stop))
    return joined

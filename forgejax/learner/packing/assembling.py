"""Rows of trees as the arrays of a micro-batch. Everything here is numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forgejax.learner.packing.batch import PackedBatch, Placement
from forgejax.learner.packing.config import EDGE_BUCKETS, TERM_BUCKETS, PackConfig
from forgejax.learner.packing.filling import Row
from forgejax.ops import tree_meta


def shape_of(rows: Sequence[Row], config: PackConfig) -> tuple[int, int]:
    """E and M: the smallest buckets that hold every row, of at least one.

    Raises:
        ValueError: a row has more edges or terms than the largest bucket.
    """
    edges = max((sum(len(bin.tree.edge_src) for bin in row) for row in rows), default=0)
    terms = max((sum(len(bin.tree.term_edge) for bin in row) for row in rows), default=0)
    T = config.row_length
    edge_sizes = [max(1, int(share * T)) for share in EDGE_BUCKETS]
    term_sizes = [share * T for share in TERM_BUCKETS]
    return _smallest(edge_sizes, edges, "edges"), _smallest(term_sizes, terms, "terms")


def _smallest(sizes: Sequence[int], needed: int, of: str) -> int:
    enough = [size for size in sizes if size >= needed]
    if not enough:
        raise ValueError(f"a row has {needed} {of}; the largest bucket holds {sizes[-1]}: fill it with fewer samples")
    return enough[0]


def assemble(
    rows: Sequence[Row], index: int, shape: tuple[int, int], config: PackConfig
) -> tuple[PackedBatch, list[Placement]]:
    """Copies the trees of each row behind one another.

    Args:
        rows: the rows of all shards; each fits.
        index: of the micro-batch, for the placements.
        shape: E and M.
        config: the length of rows and blocks.
    """
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
        attention=tree_meta(end, lengths, config.block),
        edge_temperature=edge_temperature,
        term_sample=term_sample,
        term_mask=term_mask,
    )
    return batch, placements

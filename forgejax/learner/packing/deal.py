"""Rows dealt to the devices that share them, on the host.

A mesh may split the tokens of a row. A causal row cut into even pieces would give the last device most of attention,
so a row's blocks are dealt one by one: each shard gets as many as the others, and about as many query-key pairs.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jaxtyping import Int

from forgejax.learner.packing.batch import PackedBatch
from forgejax.learner.packing.config import EDGE_BUCKETS
from forgejax.ops import SplitMeta, TreeMeta, split_meta


def deal_rows(batch: PackedBatch, shards: int) -> PackedBatch:
    """The batch as it is stored on ``shards`` devices a row, a shard's tokens and edges behind those of the one before.

    ``attention`` becomes a ``SplitMeta``. Each shard has the edges that it stores the source of, ``edge_src`` counts
    within the shard, and E is the same for all: at least what the batch had, and more only where the dealing must.
    Terms stay where they are and tell their edge by its new place.

    Args:
        batch: rows in logical order.
        shards: divides the number of blocks in a row.

    Raises:
        ValueError: the blocks of a row cannot be dealt evenly.
    """
    meta, (B, T) = batch.attention, batch.tokens_BT.shape
    block, n_blocks = meta.block_size, T // meta.block_size
    if n_blocks % shards:
        raise ValueError(
            f"rows of {T} tokens are {n_blocks} blocks of {block}, which do not deal evenly to {shards} shards: "
            f"make packing.row_length a multiple of {shards} x packing.block_size = {shards * block}"
        )
    edges = [np.unique(of_row[mask]) for of_row, mask in zip(batch.term_edge_BM, batch.term_mask_BM, strict=True)]
    sources = [of_row[used] for of_row, used in zip(batch.edge_src_BE, edges, strict=True)]
    room = -(-batch.edge_src_BE.shape[1] // shards)
    logical_at_BN = np.stack([_deal_blocks(meta, row, sources[row], shards, room) for row in range(B)])
    split = split_meta(meta, logical_at_BN, shards)

    local_T = T // shards
    stored = [split.stored_at[row, at // block] * block + at % block for row, at in enumerate(sources)]
    most = max((int(np.bincount(at // local_T).max(initial=0)) for at in stored), default=0)
    # A node has any number of edges, and so has a shard: in steps of a bucket, so that shapes stay few.
    bucket = max(1, int(EDGE_BUCKETS[0] * local_T))
    room = max(room, -(-most // bucket) * bucket)
    edge_at = [_assign_places(at // local_T, shards, room) for at in stored]

    arrays = {
        name: _permute_blocks(getattr(batch, name), logical_at_BN)
        for name in ("tokens_BT", "positions_BT", "samples_through_BT")
    }
    placed = [np.zeros((B, shards * room), np.int32) for _ in range(2)] + [np.ones((B, shards * room), np.float32)]
    edge_src_BE, edge_tgt_BE, edge_temperature_BE = placed
    term_edge_BM = np.zeros_like(batch.term_edge_BM)
    for row, (used, at, place) in enumerate(zip(edges, stored, edge_at, strict=True)):
        edge_src_BE[row, place] = at % local_T
        edge_tgt_BE[row, place] = batch.edge_tgt_BE[row, used]
        edge_temperature_BE[row, place] = batch.edge_temperature_BE[row, used]
        mask = batch.term_mask_BM[row]
        term_edge_BM[row, mask] = place[np.searchsorted(used, batch.term_edge_BM[row, mask])]
    return dataclasses.replace(
        batch,
        **arrays,
        attention=split,
        edge_src_BE=edge_src_BE,
        edge_tgt_BE=edge_tgt_BE,
        edge_temperature_BE=edge_temperature_BE,
        term_edge_BM=term_edge_BM,
    )


def batch_axes(batch: PackedBatch) -> PackedBatch:
    """The logical axes of every array's first dimensions: rows, and of what shards of a row have of their own length
    too."""
    by_row, by_shard = ("rows",), ("rows", "length")
    split = jax.tree.map(lambda _: by_row, batch)
    if not isinstance(batch.attention, SplitMeta):
        return split
    names = ("tokens_BT", "positions_BT", "samples_through_BT", "edge_src_BE", "edge_tgt_BE", "edge_temperature_BE")
    own = jax.tree.map(lambda _: by_shard, batch.attention.shards)
    return dataclasses.replace(
        split, **dict.fromkeys(names, by_shard), attention=dataclasses.replace(split.attention, shards=own)
    )


def _deal_blocks(
    meta: TreeMeta, row: int, sources: Int[np.ndarray, " n_edges"], shards: int, room: int
) -> Int[np.ndarray, " n_blocks"]:
    """The row's blocks in the order in which they are stored.

    The blocks with most pairs go first, each to the shard with the fewest so far, among those that have room for it
    and, if there is one, for its edges. Within a shard blocks keep their order.
    """
    pairs = np.diff(meta.first_pair[row])
    edges = np.bincount(sources // meta.block_size, minlength=len(pairs))
    each = len(pairs) // shards
    dealt: list[list[int]] = [[] for _ in range(shards)]
    total, filled = [0] * shards, [0] * shards
    for block in np.argsort(-pairs, kind="stable").tolist():
        open_ = [shard for shard in range(shards) if len(dealt[shard]) < each]
        roomy = [shard for shard in open_ if filled[shard] + edges[block] <= room]
        to = min(roomy or open_, key=lambda shard: (total[shard], len(dealt[shard]), shard))
        dealt[to].append(block)
        total[to] += int(pairs[block])
        filled[to] += int(edges[block])
    return np.array([block for own in dealt for block in sorted(own)])


def _assign_places(shard_of: Int[np.ndarray, " n_edges"], shards: int, room: int) -> Int[np.ndarray, " n_edges"]:
    """Where each edge goes among ``room`` places a shard, in order."""
    order = np.argsort(shard_of, kind="stable")
    first = np.searchsorted(shard_of[order], np.arange(shards))
    places = np.empty(len(order), np.int64)
    places[order] = shard_of[order] * room + np.arange(len(order)) - first[shard_of[order]]
    return places


def _permute_blocks(values_BT: np.ndarray, logical_at_BN: Int[np.ndarray, "B n_blocks"]) -> np.ndarray:
    blocks = values_BT.reshape(*logical_at_BN.shape, -1)
    return np.take_along_axis(blocks, logical_at_BN[:, :, None], axis=1).reshape(values_BT.shape)

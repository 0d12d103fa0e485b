"""Which token sees which in rows of packed prefix trees, as numbers a kernel can loop over; built on the host.

The nodes of a tree lie in DFS pre-order, and ``end[j]`` is the index after the subtree of j. Query i sees key j iff
``j <= i < end[j]``: j is i itself or an ancestor of it. One integer a key covers branching, many trees in a row and
padding (``end[i] = i + 1``). A sliding window takes one integer a query, see ``tree_window``.

Keys lie in this logical order. Queries may be fewer, and their blocks in any order: a device of several that share a
row has some of its query blocks and all keys; leaves behind a trunk have the trunk's keys before their own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int
from numpy.typing import NDArray

from forgejax.ops.tree.window import blocks_in_windows, windows

QUERY_SHIFT = 16  # pairs_by_key: the query block above these bits, the key block in them
KEY_BITS = (1 << QUERY_SHIFT) - 1
_MAX_BLOCKS = 1 << (31 - QUERY_SHIFT)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "end",
        "query_at",
        "q_block",
        "kv_block",
        "n_pairs",
        "first_pair",
        "pairs_by_key",
        "first_by_key",
        "full_until",
        "first_seen",
        "full_from",
    ],
    meta_fields=["block_size"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeMeta:
    """Visibility of B rows of S keys to T packed queries: a pytree of int32 arrays and one static block size.

    Query blocks are numbered as they are stored, key blocks in logical order. The lists have the static size N of
    the most pairs that T causal queries can have, so that one shape serves every tree; what lies past ``n_pairs`` is
    not read. Where every key has its query they take 6 n_blocks² bytes a row: 0.9 MB at 200k tokens and blocks of 512.

    Attributes:
        end: [B, S], see the module.
        query_at: [B, T / block_size] the logical block that each query block is.
        q_block: [B, N] query block of each active block pair, ascending; entries past ``n_pairs`` are 0.
        kv_block: [B, N] key block of the pair, ascending within a query block.
        n_pairs: [B] how many pairs of the row are active; the work done is proportional to it.
        first_pair: [B, T / block_size + 1] where the pairs of each query block begin in the lists.
        pairs_by_key: [B, N] the same pairs as ``q_block << 16 | kv_block``, key block ascending, then query block.
        first_by_key: [B, S / block_size + 1] where the pairs of each key block begin in ``pairs_by_key``.
        full_until: [B, S / block_size] a pair of key block b needs no mask iff ``b < query_at < full_until[b]`` and,
            with a window, ``full_from[query_at] <= b``.
        first_seen: [B, S] the first key that each token sees, by logical index; None without a window, so that
            programs without one are what they are.
        full_from: [B, S / block_size] the first key block that no window of a logical block's tokens cuts; None
            without a window.
        block_size: tokens in a block; divides T and S.
    """

    end: Any  # jax or numpy arrays, or what a tree transformation puts in their place
    query_at: Any
    q_block: Any
    kv_block: Any
    n_pairs: Any
    first_pair: Any
    pairs_by_key: Any
    first_by_key: Any
    full_until: Any
    first_seen: Any
    full_from: Any
    block_size: int


def tree_meta(
    end_BS: Int[np.ndarray, "B S"],
    lengths_B: Int[np.ndarray, " B"],
    block_size: int,
    *,
    query_blocks: Int[np.ndarray, "B n_query_blocks"] | None = None,
    q_offset: int = 0,
    window: int | None = None,
    positions: Int[np.ndarray, "B S"] | None = None,
) -> TreeMeta:
    """Lists the block pairs in which at least one of the row's first ``lengths_B`` tokens sees another.

    Nothing visible is left out and nothing empty is kept. Blocks of nothing but padding have no pair; their attention
    output is 0.

    Args:
        end_BS: of every key, see the module.
        lengths_B: tokens of each row that are no padding.
        block_size: tokens in a block.
        query_blocks: the logical block that each query block is, in any order; left out, the queries are the tokens
            from ``q_offset`` on, in order.
        q_offset: a multiple of ``block_size``.
        window: how many tokens of its path a query sees, itself included: key j only if ``pos[i] - pos[j] < window``.
            None is all of them.
        positions: of every key, and read only with a window: the depth in the tree, which may begin above 0 and rises
            by 1 from a token to its children. Those of what is no query may be anything, unless a query's parent.

    Raises:
        ValueError: S or ``q_offset`` is not a multiple of ``block_size``, S makes more than 32,768 blocks, the window
            is less than 1, or it has no positions or some that are no depths.
    """
    B, S = end_BS.shape
    if block_size < 1 or S % block_size or q_offset % block_size:
        offset = f" after the first {q_offset}" if q_offset else ""
        raise ValueError(
            f"row length {S}{offset} is not a multiple of block size {block_size}; choose a divisor of both"
        )
    n_blocks = S // block_size
    if n_blocks > _MAX_BLOCKS:
        raise ValueError(
            f"{S} tokens in blocks of {block_size} are {n_blocks} blocks; choose a block size that makes "
            f"at most {_MAX_BLOCKS}"
        )
    if query_blocks is None:
        query_blocks = np.tile(np.arange(q_offset // block_size, n_blocks), (B, 1))
    first_seen_BS = None
    if window is not None:
        queries_BS = _queries(query_blocks, lengths_B, n_blocks, block_size)
        first_seen_BS = windows(end_BS, window, positions, queries_BS)
    seen_BNN = _seen_by_block(end_BS, first_seen_BS, lengths_B, block_size)
    return _listed(end_BS, first_seen_BS, seen_BNN, query_blocks, block_size)


def for_queries(meta: TreeMeta, query_blocks: Int[np.ndarray, "B n_query_blocks"]) -> TreeMeta:
    """The same visibility for other query blocks, logical ones in any order; ``meta`` has all of them, in order."""
    B, n_blocks = meta.query_at.shape
    seen_BNN = np.zeros((B, n_blocks, n_blocks), np.bool_)
    for row, n in enumerate(meta.n_pairs):
        seen_BNN[row, meta.q_block[row, :n], meta.kv_block[row, :n]] = True
    return _listed(meta.end, meta.first_seen, seen_BNN, query_blocks, meta.block_size)


def _queries(
    query_blocks: Int[np.ndarray, "B n_query_blocks"], lengths_B: Int[np.ndarray, " B"], n_blocks: int, block_size: int
) -> Bool[np.ndarray, "B S"]:
    """Which tokens of a row are queries and no padding."""
    queried_BN = np.zeros((len(query_blocks), n_blocks), np.bool_)
    np.put_along_axis(queried_BN, query_blocks, True, axis=1)
    return np.repeat(queried_BN, block_size, axis=1) & (np.arange(n_blocks * block_size) < lengths_B[:, None])


def _seen_by_block(
    end_BS: Int[np.ndarray, "B S"],
    first_seen_BS: Int[np.ndarray, "B S"] | None,
    lengths_B: Int[np.ndarray, " B"],
    block_size: int,
) -> Bool[np.ndarray, "B N N"]:
    """[a, b] of each row: whether a token of block a sees one of block b; both are logical.

    Without a window that is so iff b <= a and some key of b reaches beyond the start of a.
    """
    B, S = end_BS.shape
    index_N = np.arange(S // block_size)
    used_BN = index_N[None, :] * block_size < lengths_B[:, None]
    n_used_B1 = used_BN.sum(axis=1, keepdims=True)
    # The logical block after the last that sees any of the block's keys.
    reach_BN = -(-end_BS.reshape(B, -1, block_size).max(axis=2) // block_size)
    reach_BN = np.where(used_BN, np.minimum(reach_BN, n_used_B1), 0)
    seen_BNN: NDArray[np.bool_] = (index_N[None, :] <= index_N[:, None]) & (index_N[:, None] < reach_BN[:, None, :])
    if first_seen_BS is not None:
        for row in range(B):
            seen_BNN[row] &= blocks_in_windows(end_BS[row], first_seen_BS[row], block_size)
    return seen_BNN


def _listed(
    end_BS: Int[np.ndarray, "B S"],
    first_seen_BS: Int[np.ndarray, "B S"] | None,
    seen_BNN: Bool[np.ndarray, "B N N"],
    query_blocks: Int[np.ndarray, "B n_query_blocks"],
    block_size: int,
) -> TreeMeta:
    """The lists of what the query blocks see."""
    B, n_blocks, _ = seen_BNN.shape
    n_queries = query_blocks.shape[1]
    size = n_queries * n_blocks - n_queries * (n_queries - 1) // 2  # of the last query blocks: they see the most
    q_block, kv_block, pairs_by_key = (np.zeros((B, size), np.int32) for _ in range(3))
    first_pair: NDArray[np.int32] = np.zeros((B, n_queries + 1), np.int32)
    first_by_key: NDArray[np.int32] = np.zeros((B, n_blocks + 1), np.int32)
    for row in range(B):
        sees_QN = seen_BNN[row, query_blocks[row]]
        queries, keys = np.nonzero(sees_QN)
        n = len(queries)
        q_block[row, :n], kv_block[row, :n] = queries, keys
        keys, queries = np.nonzero(sees_QN.T)
        pairs_by_key[row, :n] = queries << QUERY_SHIFT | keys
        np.cumsum(sees_QN.sum(axis=1), out=first_pair[row, 1:])
        np.cumsum(sees_QN.sum(axis=0), out=first_by_key[row, 1:])
    full_from_BN = None
    if first_seen_BS is not None:
        full_from_BN = -(-first_seen_BS.reshape(B, n_blocks, block_size).max(axis=2) // block_size)
    return TreeMeta(
        end=end_BS.astype(np.int32),
        query_at=query_blocks.astype(np.int32),
        q_block=q_block,
        kv_block=kv_block,
        n_pairs=first_pair[:, -1].copy(),
        first_pair=first_pair,
        pairs_by_key=pairs_by_key,
        first_by_key=first_by_key,
        full_until=(end_BS.reshape(B, n_blocks, block_size).min(axis=2) // block_size).astype(np.int32),
        first_seen=first_seen_BS,
        full_from=full_from_BN,
        block_size=block_size,
    )

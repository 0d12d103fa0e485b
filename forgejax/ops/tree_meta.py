"""Which token sees which in rows of packed prefix trees, as numbers a kernel can loop over; built on the host.

The nodes of a tree lie in DFS pre-order, and ``end[j]`` is the index after the subtree of j. Query i sees key j iff
``j <= i < end[j]``: j is i itself or an ancestor of it. One integer a key covers branching, many trees in a row and
padding (``end[i] = i + 1``).

Keys lie in this logical order. Queries may be fewer, and their blocks in any order: a device of several that share a
row has some of its query blocks and all keys; leaves behind a trunk have the trunk's keys before their own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

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
        full_until: [B, S / block_size] a pair of key block b needs no mask iff ``b < query_at < full_until[b]``.
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
    block_size: int


def tree_meta(
    end_BS: Int[np.ndarray, "B S"],
    lengths_B: Int[np.ndarray, " B"],
    block_size: int,
    *,
    query_blocks: Int[np.ndarray, "B n_query_blocks"] | None = None,
    q_offset: int = 0,
) -> TreeMeta:
    """Lists the block pairs in which at least one of the row's first ``lengths_B`` tokens sees another.

    A pair of blocks q >= k is active iff some key of k reaches beyond the start of q: nothing visible is left out and
    nothing empty is kept. Blocks of nothing but padding have no pair; their attention output is 0.

    Args:
        end_BS: of every key, see the module.
        lengths_B: tokens of each row that are no padding.
        block_size: tokens in a block.
        query_blocks: the logical block that each query block is, in any order; left out, the queries are the tokens
            from ``q_offset`` on, in order.
        q_offset: a multiple of ``block_size``.

    Raises:
        ValueError: S or ``q_offset`` is not a multiple of ``block_size``, or S makes more than 32,768 blocks.
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
    index_N = np.arange(n_blocks)
    if query_blocks is None:
        query_blocks = np.broadcast_to(index_N[q_offset // block_size :], (B, n_blocks - q_offset // block_size))
    n_queries = query_blocks.shape[1]
    end_BNS = end_BS.reshape(B, n_blocks, block_size)
    used_BN = index_N[None, :] * block_size < lengths_B[:, None]
    n_used_B1 = used_BN.sum(axis=1, keepdims=True)
    # The logical block after the last that sees any of the block's keys.
    reach_BN = np.where(used_BN, np.minimum(-(-end_BNS.max(axis=2) // block_size), n_used_B1), 0)

    size = n_queries * n_blocks - n_queries * (n_queries - 1) // 2  # of the last query blocks: they see the most
    q_block, kv_block, pairs_by_key = (np.zeros((B, size), np.int32) for _ in range(3))
    first_pair: NDArray[np.int32] = np.zeros((B, n_queries + 1), np.int32)
    first_by_key: NDArray[np.int32] = np.zeros((B, n_blocks + 1), np.int32)
    for row in range(B):
        query_Q = query_blocks[row]
        sees_NQ = (index_N[:, None] <= query_Q[None, :]) & (query_Q[None, :] < reach_BN[row][:, None])
        queries, keys = np.nonzero(sees_NQ.T)
        n = len(queries)
        q_block[row, :n], kv_block[row, :n] = queries, keys
        keys, queries = np.nonzero(sees_NQ)
        pairs_by_key[row, :n] = queries << QUERY_SHIFT | keys
        np.cumsum(sees_NQ.sum(axis=0), out=first_pair[row, 1:])
        np.cumsum(sees_NQ.sum(axis=1), out=first_by_key[row, 1:])
    return TreeMeta(
        end=end_BS.astype(np.int32),
        query_at=query_blocks.astype(np.int32),
        q_block=q_block,
        kv_block=kv_block,
        n_pairs=first_pair[:, -1].copy(),
        first_pair=first_pair,
        pairs_by_key=pairs_by_key,
        first_by_key=first_by_key,
        full_until=(end_BNS.min(axis=2) // block_size).astype(np.int32),
        block_size=block_size,
    )

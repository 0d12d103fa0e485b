"""Which token sees which in rows of packed prefix trees, as numbers a kernel can loop over; built on the host.

The nodes of a tree lie in DFS pre-order, and ``end[j]`` is the index after the subtree of j. Query i sees key j iff
``j <= i < end[j]``: j is i itself or an ancestor of it. One integer a key covers branching, many trees in a row and
padding (``end[i] = i + 1``).
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
        "q_block",
        "kv_block",
        "n_pairs",
        "first_pair",
        "pairs_by_key",
        "reach",
        "full_until",
    ],
    meta_fields=["block_size"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeMeta:
    """Visibility of B rows of T packed tokens: a pytree of int32 arrays and one static block size.

    A pair of a query block a and a key block b is active iff ``b <= a < reach[b]``, and needs no mask iff
    ``b < a < full_until[b]``. The lists have the static size N of a full causal row, so that one shape serves every
    tree; what lies past ``n_pairs`` is not read. They take 6 n_blocks² bytes a row: 0.9 MB at 200k tokens and blocks
    of 512.

    Attributes:
        end: [B, T], see the module.
        q_block: [B, N] query block of each active block pair, ascending; entries past ``n_pairs`` are 0.
        kv_block: [B, N] key block of the pair, ascending within a query block.
        n_pairs: [B] how many pairs of the row are active; the work done is proportional to it.
        first_pair: [B, n_blocks + 1] where the pairs of each query block begin in the lists.
        pairs_by_key: [B, N] the same pairs as ``q_block << 16 | kv_block``, key block ascending, then query block.
        reach: [B, n_blocks] the query block after the last that sees the key block; 0 for a block of padding alone.
        full_until: [B, n_blocks] every query of the blocks from after the key block to before this one sees all of it.
        block_size: tokens in a block; divides T.
    """

    end: Any  # jax or numpy arrays, or what a tree transformation puts in their place
    q_block: Any
    kv_block: Any
    n_pairs: Any
    first_pair: Any
    pairs_by_key: Any
    reach: Any
    full_until: Any
    block_size: int


def tree_meta(end_BT: Int[np.ndarray, "B T"], lengths_B: Int[np.ndarray, " B"], block_size: int) -> TreeMeta:
    """Lists the block pairs in which at least one of the row's first ``lengths_B`` tokens sees another.

    A pair of blocks q >= k is active iff some key of k reaches beyond the start of q: nothing visible is left out and
    nothing empty is kept. Blocks of nothing but padding have no pair; their attention output is 0.

    Raises:
        ValueError: T is not a multiple of ``block_size``, or makes more than 32,768 blocks.
    """
    B, T = end_BT.shape
    if block_size < 1 or T % block_size:
        raise ValueError(f"row length {T} is not a multiple of block size {block_size}; choose a divisor of {T}")
    n_blocks = T // block_size
    if n_blocks > _MAX_BLOCKS:
        raise ValueError(
            f"{T} tokens in blocks of {block_size} are {n_blocks} blocks; choose a block size that makes "
            f"at most {_MAX_BLOCKS}"
        )
    index_N = np.arange(n_blocks)
    end_BNS = end_BT.reshape(B, n_blocks, block_size)
    used_BN = index_N[None, :] * block_size < lengths_B[:, None]
    n_used_B1 = used_BN.sum(axis=1, keepdims=True)
    reach_BN = np.where(used_BN, np.minimum(-(-end_BNS.max(axis=2) // block_size), n_used_B1), 0)

    size = n_blocks * (n_blocks + 1) // 2
    q_block, kv_block, pairs_by_key = (np.zeros((B, size), np.int32) for _ in range(3))
    first_pair: NDArray[np.int32] = np.zeros((B, n_blocks + 1), np.int32)
    for row in range(B):
        sees_NN = (index_N[:, None] <= index_N[None, :]) & (index_N[None, :] < reach_BN[row][:, None])  # [key, query]
        queries, keys = np.nonzero(sees_NN.T)
        n = len(queries)
        q_block[row, :n], kv_block[row, :n] = queries, keys
        keys, queries = np.nonzero(sees_NN)
        pairs_by_key[row, :n] = queries << QUERY_SHIFT | keys
        np.cumsum(sees_NN.sum(axis=0), out=first_pair[row, 1:])
    return TreeMeta(
        end=end_BT.astype(np.int32),
        q_block=q_block,
        kv_block=kv_block,
        n_pairs=first_pair[:, -1].copy(),
        first_pair=first_pair,
        pairs_by_key=pairs_by_key,
        reach=reach_BN.astype(np.int32),
        full_until=(end_BNS.min(axis=2) // block_size).astype(np.int32),
        block_size=block_size,
    )

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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["end", "q_block", "kv_block", "n_pairs"],
    meta_fields=["block_size"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeMeta:
    """Visibility of B rows of T packed tokens: a pytree of int32 arrays and one static block size.

    Attributes:
        end: [B, T], see the module.
        q_block: [B, N] query block of each active block pair, ascending; entries past ``n_pairs`` are 0 and not read.
        kv_block: [B, N] key block of the pair.
        n_pairs: [B] how many pairs of the row are active; the work done is proportional to it.
        block_size: tokens in a block; divides T.
    """

    end: Any  # jax or numpy arrays, or what a tree transformation puts in their place
    q_block: Any
    kv_block: Any
    n_pairs: Any
    block_size: int


def tree_meta(end_BT: Int[np.ndarray, "B T"], lengths_B: Int[np.ndarray, " B"], block_size: int) -> TreeMeta:
    """Lists the block pairs in which at least one of the row's first ``lengths_B`` tokens sees another.

    A pair of blocks q >= k is active iff some key of k reaches beyond the start of q: nothing visible is left out and
    nothing empty is kept. Blocks of nothing but padding have no pair; their attention output is 0. The lists have the
    static size of a full causal row, so that one shape serves every tree.

    Raises:
        ValueError: T is not a multiple of ``block_size``.
    """
    B, T = end_BT.shape
    if block_size < 1 or T % block_size:
        raise ValueError(f"row length {T} is not a multiple of block size {block_size}; choose a divisor of {T}")
    n_blocks = T // block_size
    starts_N = np.arange(n_blocks) * block_size
    reach_BN = end_BT.reshape(B, n_blocks, block_size).max(axis=2)
    active_BNN = starts_N[None, :, None] >= starts_N[None, None, :]
    active_BNN = active_BNN & (starts_N[None, :, None] < reach_BN[:, None, :])
    active_BNN = active_BNN & (starts_N[None, :, None] < lengths_B[:, None, None])

    size = n_blocks * (n_blocks + 1) // 2
    q_block: NDArray[np.int32] = np.zeros((B, size), np.int32)
    kv_block: NDArray[np.int32] = np.zeros((B, size), np.int32)
    for row in range(B):
        q_active, kv_active = np.nonzero(active_BNN[row])
        q_block[row, : len(q_active)] = q_active
        kv_block[row, : len(kv_active)] = kv_active
    n_pairs = active_BNN.sum(axis=(1, 2), dtype=np.int32)
    return TreeMeta(
        end=end_BT.astype(np.int32), q_block=q_block, kv_block=kv_block, n_pairs=n_pairs, block_size=block_size
    )

"""Rows whose tokens lie on several devices: each has some of a row's query blocks, and gets all keys to attend over.

Blocks are dealt to the shards by the caller, so that what they compute is even. Tokens are stored shard after shard.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from forgejax.ops.tree.meta import TreeMeta, for_queries


@functools.partial(jax.tree_util.register_dataclass, data_fields=["shards", "stored_at", "logical_at"], meta_fields=[])
@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitMeta:
    """Visibility of B rows of T tokens, each on ``n_shards`` devices; arrays of ``shards`` begin with [B, n_shards].

    Attributes:
        shards: the ``TreeMeta`` of each shard, whose queries are its own blocks and whose keys are those of the row.
        stored_at: [B, T / block_size] where each logical block is stored.
        logical_at: [B, T / block_size] the logical block that each stored block is.
    """

    shards: TreeMeta | Any
    stored_at: Any
    logical_at: Any

    @property
    def n_shards(self) -> int:
        """How many devices share a row."""
        shards: int = self.shards.end.shape[1]
        return shards

    def local(self) -> TreeMeta:
        """The only shard that a device of the mesh has."""
        mine: TreeMeta = jax.tree.map(lambda x: x[:, 0], self.shards)
        return mine


def split_meta(meta: TreeMeta, logical_at_BN: Int[np.ndarray, "B n_blocks"], n_shards: int) -> SplitMeta:
    """The same visibility where block ``logical_at[a]`` is stored at a, and each shard stores as many as the others.

    Args:
        meta: of whole rows: every key has its query, in order.
        logical_at_BN: a permutation of the blocks of each row.
        n_shards: divides the number of blocks.
    """
    own_BSN = logical_at_BN.reshape(len(logical_at_BN), n_shards, -1)
    each = [for_queries(meta, own_BSN[:, s]) for s in range(n_shards)]
    return SplitMeta(
        shards=jax.tree.map(lambda *arrays: np.stack(arrays, axis=1), *each),
        stored_at=np.argsort(logical_at_BN, axis=1).astype(np.int32),
        logical_at=logical_at_BN.astype(np.int32),
    )


def whole_rows(x_BTKC: Float[Array, "B T K C"], meta: SplitMeta, axis: str) -> Float[Array, "B S K C"]:
    """Gathers what the shards along a mesh axis have of each row, in logical order; inside a ``shard_map``.

    Its gradient is a reduce-scatter: each shard gets the sum for its own tokens.
    """
    stored = lax.all_gather(x_BTKC, axis, axis=1, tiled=True)
    return _permuted(stored, meta.stored_at, meta.logical_at)


@jax.custom_vjp
def _permuted(x_BTKC: jax.Array, source_BN: jax.Array, target_BN: jax.Array) -> jax.Array:
    """Block a of the result is block ``source[a]``; by ``target``, the inverse, the gradient is a gather too."""
    B, N = source_BN.shape
    blocks = x_BTKC.reshape(B, N, -1, *x_BTKC.shape[2:])
    taken = jax.vmap(lambda row, at: row.at[at].get(mode="promise_in_bounds", unique_indices=True))(blocks, source_BN)
    return taken.reshape(x_BTKC.shape)


def _permuted_forward(x: jax.Array, source: jax.Array, target: jax.Array) -> tuple[jax.Array, tuple[Any, Any]]:
    return _permuted(x, source, target), (source, target)


def _permuted_backward(saved: tuple[Any, Any], d_out: jax.Array) -> tuple[jax.Array, None, None]:
    source, target = saved
    return _permuted(d_out, target, source), None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)

"""Paged attention on TPU: JAX's own kernel, ``ragged_paged_attention``, over the pages of all layers at once."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.typing import DTypeLike

from forgejax.ops.paged.batch import NOBODY, PagedBatch, TokenPlaces

_LANES = 128


@dataclasses.dataclass(frozen=True)
class TpuPagedKernel:
    """The TPU backend of ``paged_attention``.

    A pool is one array [L, P, W, 2 K, C], of which each head's keys and values are neighbours, with C filled up to
    whole lanes of 128 numbers. A layer's pages are named by their places in the pages of all layers, so that no
    program copies a layer out of the pool.

    Attributes:
        block_keys: keys that are brought from HBM at a time, in whole pages.
        block_queries: queries whose softmax is kept at a time.
        vmem_bytes: the vector memory that a program may use.
    """

    block_keys: int = 512
    block_queries: int = 32
    vmem_bytes: int = 64 * 2**20

    def make_pool(
        self, *, layers: int, pages: int, page_tokens: int, kv_heads: int, head_size: int, dtype: DTypeLike
    ) -> jax.Array:
        """Zeros. Raises ValueError for pages that are not whole sublanes, and for numbers that it cannot read."""
        if page_tokens % 16:
            raise ValueError(f"engine.page_tokens is {page_tokens}; expected a multiple of 16 on TPU")
        if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
            raise ValueError(f"keys and values in {jnp.dtype(dtype)}; expected bfloat16 or float32 on TPU")
        return jnp.zeros((layers, pages, page_tokens, 2 * kv_heads, _fill_lanes(head_size)), dtype)

    def write(
        self, pool: jax.Array, layer: jax.Array, k_TKC: jax.Array, v_TKC: jax.Array, places: TokenPlaces
    ) -> jax.Array:
        """See ``PagedKernel``."""
        T, K, C = k_TKC.shape
        new_TXC = jnp.stack([k_TKC, v_TKC], axis=2).reshape(T, 2 * K, C)
        new_TXC = jnp.pad(new_TXC, ((0, 0), (0, 0), (0, pool.shape[-1] - C)))
        page_T = jnp.where(places.page_T == NOBODY, pool.shape[1], places.page_T)
        return pool.at[layer, page_T, places.offset_T].set(new_TXC, mode="drop", unique_indices=True)

    def attend(
        self, q_THC: jax.Array, pool: jax.Array, layer: jax.Array, batch: PagedBatch, *, window: int | None
    ) -> jax.Array:
        """See ``PagedKernel``."""
        (T, _, C), (_, P, W, X, _) = q_THC.shape, pool.shape
        out_THC = ragged_paged_attention(
            jnp.pad(q_THC, ((0, 0), (0, 0), (0, pool.shape[-1] - C))),
            pool.reshape(-1, W, X, pool.shape[-1]),
            batch.lengths_N,
            batch.tables_NM + layer * P,
            batch.starts_O,
            jnp.maximum(batch.count, batch.singles)[None],
            sm_scale=C**-0.5,
            sliding_window=window,
            num_kv_pages_per_block=min(max(self.block_keys // W, 1), batch.tables_NM.shape[1]),
            num_queries_per_block=min(self.block_queries, T),
            vmem_limit_bytes=self.vmem_bytes,
        )
        # What stands behind the last run was never written.
        real_T = jnp.arange(T) < batch.starts_O[-1]
        return jnp.where(real_T[:, None, None], out_THC[..., :C], jnp.zeros((), q_THC.dtype))


def _fill_lanes(size: int) -> int:
    return -(-size // _LANES) * _LANES

"""Tree attention in plain JAX: a loop over the active block pairs of each row.

The online softmax of FlashAttention (arXiv 2205.14135). The trip count is a runtime value, so the cost follows the
active pairs of the tree. Queries that share a key head lie in one block, [block, G * block_size, C], so that keys and
values are never repeated and each product is one of two matrices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from forgejax.ops.tree_meta import TreeMeta

_NEVER = -1e30  # the score of what is not visible
_LOWEST = -1e25  # below every score, and so far above _NEVER that exp(_NEVER - _LOWEST) is 0


@dataclasses.dataclass(frozen=True)
class CpuKernel:
    """The CPU backend of ``tree_attention``; rows and heads run one after another. Takes any block size, and FP64."""

    def check(self, meta: TreeMeta, dtype: Any, head_size: int) -> None:
        """Nothing is refused."""

    def forward(
        self,
        q_BTHC: Float[Array, "B T H C"],
        k_BSKC: Float[Array, "B S K C"],
        v_BSKC: Float[Array, "B S K C"],
        meta: TreeMeta,
    ) -> tuple[Float[Array, "B T H C"], Any]:
        """The output, and what ``backward`` needs."""
        block = meta.block_size
        q = _queries_to_blocks(q_BTHC, k_BSKC.shape[2], block)
        out, residuals = _forward(q, _keys_to_blocks(k_BSKC, block), _keys_to_blocks(v_BSKC, block), meta)
        return _blocks_to_queries(out, q_BTHC.shape, block).astype(q_BTHC.dtype), residuals

    def backward(self, residuals: Any, d_out_BTHC: Float[Array, "B T H C"]) -> tuple[Array, Array, Array]:
        """The gradients of q [B, T, H, C], k and v [B, S, K, C]."""
        _, k, _, meta, _, _ = residuals
        block = meta.block_size
        d_q, d_k, d_v = _backward(residuals, _queries_to_blocks(d_out_BTHC, k.shape[1], block))
        return _blocks_to_queries(d_q, d_out_BTHC.shape, block), _blocks_to_keys(d_k), _blocks_to_keys(d_v)


def _queries_to_blocks(q_BTHC: jax.Array, kv_heads: int, block: int) -> jax.Array:
    B, T, H, C = q_BTHC.shape
    split = q_BTHC.reshape(B, T // block, block, kv_heads, H // kv_heads, C)
    return split.transpose(0, 3, 1, 4, 2, 5).reshape(B, kv_heads, T // block, H // kv_heads * block, C)


def _keys_to_blocks(k_BSKC: jax.Array, block: int) -> jax.Array:
    B, T, K, C = k_BSKC.shape
    return k_BSKC.reshape(B, T // block, block, K, C).transpose(0, 3, 1, 2, 4)


def _blocks_to_queries(out: jax.Array, shape: tuple[int, ...], block: int) -> jax.Array:
    B, T, H, C = shape
    K = out.shape[1]
    split = out.reshape(B, K, T // block, H // K, block, C)
    return split.transpose(0, 2, 4, 1, 3, 5).reshape(B, T, H, C)


def _blocks_to_keys(k_BKNSC: jax.Array) -> jax.Array:
    B, K, N, S, C = k_BKNSC.shape
    return k_BKNSC.transpose(0, 2, 3, 1, 4).reshape(B, N * S, K, C)


def _by_head(function: Callable[..., tuple[jax.Array, ...]], meta: TreeMeta, *of_heads: jax.Array) -> tuple:
    """``function(row's meta, *head's arrays)`` of every key head of every row; arrays begin with [B, K].

    One after another: XLA:CPU multiplies single matrices faster than stacks of small ones.
    """
    B, K = of_heads[0].shape[:2]

    def one(xs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        row, *arrays = xs
        return function(jax.tree.map(lambda x: jnp.asarray(x)[row], meta), *arrays)

    found = lax.map(one, (jnp.arange(B * K) // K, *(x.reshape(B * K, *x.shape[2:]) for x in of_heads)))
    return tuple(x.reshape(B, K, *x.shape[1:]) for x in found)


def _at(blocks: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(blocks, index, keepdims=False)


def _put(blocks: jax.Array, value: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(blocks, value, index, axis=0)


def _real(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _visible(meta: TreeMeta, a: jax.Array, b: jax.Array) -> jax.Array:
    """[block, block]: which queries of query block a see which keys of block b."""
    block = meta.block_size
    i = meta.query_at[a] * block + jnp.arange(block)[:, None]
    j = b * block + jnp.arange(block)[None, :]
    visible = (j <= i) & (i < lax.dynamic_slice_in_dim(meta.end, b * block, block)[None, :])
    if meta.first_seen is None:
        return visible
    first_seen = lax.dynamic_slice_in_dim(meta.first_seen, meta.query_at[a] * block, block)
    return visible & (first_seen[:, None] <= j)


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, meta: TreeMeta) -> tuple[jax.Array, tuple]:
    group, real, scale = q.shape[-2] // meta.block_size, _real(q), q.shape[-1] ** -0.5

    def head(meta: TreeMeta, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        def pair(p: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            out, top, total = carry
            a, b = meta.q_block[p], meta.kv_block[p]
            scores = jnp.einsum("QC,SC->QS", _at(q, a), _at(k, b), preferred_element_type=real) * scale
            scores = jnp.where(jnp.tile(_visible(meta, a, b), (group, 1)), scores, _NEVER)
            old_top = _at(top, a)
            new_top = jnp.maximum(old_top, scores.max(axis=-1))
            weights = jnp.exp(scores - new_top[:, None])  # 0 where not visible: new_top is no less than _LOWEST
            decay = jnp.exp(old_top - new_top)
            out = _put(out, _at(out, a) * decay[:, None] + weights @ _at(v, b).astype(real), a)
            total = _put(total, _at(total, a) * decay + weights.sum(axis=-1), a)
            return out, _put(top, new_top, a), total

        start = jnp.zeros(q.shape, real), jnp.full(q.shape[:-1], _LOWEST, real), jnp.zeros(q.shape[:-1], real)
        out, top, total = lax.fori_loop(0, meta.n_pairs, pair, start)
        total = jnp.where(total == 0.0, 1.0, total)  # a block of padding alone was never visited
        return out / total[..., None], top + jnp.log(total)

    out, lse = checkpoint_name(_by_head(head, meta, q, k, v), "attended")
    return out, (q, k, v, meta, out, lse)


def _backward(residuals: tuple, d_out: jax.Array) -> tuple:
    """Scores stand transposed, keys by queries: two of the three products that take them then read them as they lie."""
    q, k, v, meta, out, lse = residuals
    group, real, scale = q.shape[-2] // meta.block_size, _real(q), q.shape[-1] ** -0.5
    d_out = d_out.astype(real)

    def head(meta: TreeMeta, *of_head: jax.Array) -> tuple[jax.Array, ...]:
        q, k, v, d_out, lse, delta = of_head

        def pair(p: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_q, d_k, d_v = carry
            a, b = meta.q_block[p], meta.kv_block[p]
            q_a, k_b, d_a = _at(q, a), _at(k, b), _at(d_out, a)
            scores = jnp.einsum("SC,QC->SQ", k_b, q_a, preferred_element_type=real) * scale
            visible_SQ = jnp.tile(_visible(meta, a, b).T, (1, group))
            weights = jnp.where(visible_SQ, jnp.exp(scores - _at(lse, a)[None]), 0.0)
            d_weights = jnp.einsum("SC,QC->SQ", _at(v, b).astype(real), d_a)
            d_scores = weights * (d_weights - _at(delta, a)[None]) * scale
            d_q = _put(d_q, _at(d_q, a) + jnp.einsum("SQ,SC->QC", d_scores, k_b.astype(real)), a)
            d_k = _put(d_k, _at(d_k, b) + d_scores @ q_a.astype(real), b)
            d_v = _put(d_v, _at(d_v, b) + weights @ d_a, b)
            return d_q, d_k, d_v

        start = (jnp.zeros(q.shape, real), jnp.zeros(k.shape, real), jnp.zeros(v.shape, real))
        return lax.fori_loop(0, meta.n_pairs, pair, start)

    # Not a product and then its sum: XLA:CPU sums the rows of [1, ...] thirty times slower.
    delta = jnp.einsum("...C,...C->...", d_out, out)
    d_q, d_k, d_v = _by_head(head, meta, q, k, v, d_out, lse, delta)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)

"""Tree attention in plain JAX: a loop over the active block pairs of each row.

The online softmax of FlashAttention (arXiv 2205.14135). The trip count is a runtime value, so the cost follows the
active pairs of the tree. Queries that share a key head lie in one block, [K, block, G * block_size, C], so that keys
and values are never repeated and each product is one matrix product a key head.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from forgejax.ops.tree_meta import TreeMeta

_NEVER = -1e30  # below every score, and finite: exp(_NEVER - _NEVER) must not be NaN


@dataclasses.dataclass(frozen=True)
class CpuKernel:
    """The CPU backend of ``tree_attention``; rows run one after another. Takes any block size, and FP64."""

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


def _at(blocks: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(blocks, index, axis=1, keepdims=False)


def _put(blocks: jax.Array, value: jax.Array, index: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(blocks, value, index, axis=1)


def _scores(
    q: jax.Array, k: jax.Array, end_S: jax.Array, *, a: jax.Array, b: jax.Array, block: int
) -> tuple[jax.Array, jax.Array]:
    """Scaled scores [K, G * block, block] of logical query block a against key block b, and which of them count."""
    scores = jnp.einsum("KQC,KSC->KQS", q, k, preferred_element_type=_real(q)) * q.shape[-1] ** -0.5
    i = a * block + jnp.arange(block)[:, None]
    j = b * block + jnp.arange(block)[None, :]
    end_S = lax.dynamic_slice_in_dim(end_S, b * block, block)
    visible = (j <= i) & (i < end_S[None, :])
    return scores, jnp.tile(visible, (q.shape[1] // block, 1))[None]


def _real(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, meta: TreeMeta) -> tuple[jax.Array, tuple]:
    block, real = meta.block_size, _real(q)

    def row(xs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q_row, k_row, v_row, end_S, at, q_block, kv_block, n_pairs = xs

        def pair(p: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            out, top, total = carry
            a, b = q_block[p], kv_block[p]
            scores, visible = _scores(_at(q_row, a), _at(k_row, b), end_S, a=at[a], b=b, block=block)
            scores = jnp.where(visible, scores, _NEVER)
            old_top = _at(top, a)
            new_top = jnp.maximum(old_top, scores.max(axis=-1))
            weights = jnp.where(visible, jnp.exp(scores - new_top[..., None]), 0.0)
            decay = jnp.exp(old_top - new_top)
            update = jnp.einsum("KQS,KSC->KQC", weights, _at(v_row, b).astype(real))
            out = _put(out, _at(out, a) * decay[..., None] + update, a)
            total = _put(total, _at(total, a) * decay + weights.sum(axis=-1), a)
            return out, _put(top, new_top, a), total

        start = (
            jnp.zeros(q_row.shape, real),
            jnp.full(q_row.shape[:-1], _NEVER, real),
            jnp.zeros(q_row.shape[:-1], real),
        )
        out, top, total = lax.fori_loop(0, n_pairs, pair, start)
        total = jnp.where(total == 0.0, 1.0, total)  # a block of padding alone was never visited
        return out / total[..., None], top + jnp.log(total)

    out, lse = checkpoint_name(
        lax.map(row, (q, k, v, meta.end, meta.query_at, meta.q_block, meta.kv_block, meta.n_pairs)), "attended"
    )
    return out, (q, k, v, meta, out, lse)


def _backward(residuals: tuple, d_out: jax.Array) -> tuple:
    q, k, v, meta, out, lse = residuals
    block, real = meta.block_size, _real(q)
    d_out = d_out.astype(real)

    def row(xs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        q_row, k_row, v_row, d_row, lse_row, delta_row, end_S, at, q_block, kv_block, n_pairs = xs

        def pair(p: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_q, d_k, d_v = carry
            a, b = q_block[p], kv_block[p]
            q_a, k_b, d_a = _at(q_row, a), _at(k_row, b), _at(d_row, a)
            scores, visible = _scores(q_a, k_b, end_S, a=at[a], b=b, block=block)
            weights = jnp.where(visible, jnp.exp(scores - _at(lse_row, a)[..., None]), 0.0)
            d_weights = jnp.einsum("KQC,KSC->KQS", d_a, _at(v_row, b).astype(real))
            d_scores = weights * (d_weights - _at(delta_row, a)[..., None]) * q.shape[-1] ** -0.5
            d_q = _put(d_q, _at(d_q, a) + jnp.einsum("KQS,KSC->KQC", d_scores, k_b.astype(real)), a)
            d_k = _put(d_k, _at(d_k, b) + jnp.einsum("KQS,KQC->KSC", d_scores, q_a.astype(real)), b)
            d_v = _put(d_v, _at(d_v, b) + jnp.einsum("KQS,KQC->KSC", weights, d_a), b)
            return d_q, d_k, d_v

        start = (jnp.zeros(q_row.shape, real), jnp.zeros(k_row.shape, real), jnp.zeros(v_row.shape, real))
        return lax.fori_loop(0, n_pairs, pair, start)

    delta = (d_out * out).sum(axis=-1)
    xs = (q, k, v, d_out, lse, delta, meta.end, meta.query_at, meta.q_block, meta.kv_block, meta.n_pairs)
    d_q, d_k, d_v = lax.map(row, xs)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)

"""Tree attention in plain JAX: a loop over the active block pairs of each row and key head.

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

from forgejax.ops.rounding import real_of, with_exact_sums
from forgejax.ops.softmax import NEVER, RunningSoftmax
from forgejax.ops.tree.meta import TreeMeta


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
        meta, block = jax.tree.map(jnp.asarray, meta), meta.block_size
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


_Carry = tuple[jax.Array, ...]
_Index = tuple[jax.Array, ...]


def _each_pair(
    visit: Callable[[_Index, _Index, jax.Array, _Carry], _Carry], meta: TreeMeta, kv_heads: int, start: _Carry
) -> _Carry:
    """``visit(queries, keys, visible, carry)`` of every active pair of every key head of every row, one by one.

    ``queries`` and ``keys`` index arrays that begin with [B, K, N]; ``visible`` is [block, block]. XLA:CPU multiplies
    single matrices faster than stacks of small ones; and the arrays that pairs read and write stay whole, for those of
    a row or a head cut out for a loop of their own would be copied.
    """

    def row_of_pairs(row: jax.Array, carry: _Carry) -> _Carry:
        count = _at(meta.n_pairs, row)

        def pair(step: jax.Array, carry: _Carry) -> _Carry:
            head, p = lax.div(step, count), lax.rem(step, count)
            a, b = _at(meta.q_block, row, p), _at(meta.kv_block, row, p)
            return visit((row, head, a), (row, head, b), _visible(meta, row, a, b), carry)

        return lax.fori_loop(0, kv_heads * count, pair, carry)

    return lax.fori_loop(0, len(meta.n_pairs), row_of_pairs, start)


def _at(x: jax.Array, *index: jax.Array) -> jax.Array:
    """``x[index]``, which is inside."""
    rest = x.shape[len(index) :]
    sizes = (*(1,) * len(index), *rest)
    return lax.dynamic_slice(x, _first(x, index), sizes, allow_negative_indices=False).reshape(rest)


def _put(x: jax.Array, value: jax.Array, index: _Index) -> jax.Array:
    value = value.reshape(*(1,) * len(index), *value.shape)
    return lax.dynamic_update_slice(x, value, _first(x, index), allow_negative_indices=False)


def _first(x: jax.Array, index: _Index) -> tuple[jax.Array, ...]:
    """Of one integer type, whatever the loops count in."""
    return tuple(jnp.asarray(i, jnp.int32) for i in (*index, *(0,) * (x.ndim - len(index))))


def _visible(meta: TreeMeta, row: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """[block, block]: which queries of the row's query block a see which keys of its block b."""
    block, at = meta.block_size, _at(meta.query_at, row, a)

    def of_block(x_BS: jax.Array, at: jax.Array) -> jax.Array:
        return _at(x_BS.reshape(len(x_BS), -1, block), row, at)

    i, j = (at * block + jnp.arange(block))[:, None], (b * block + jnp.arange(block))[None, :]
    visible = (j <= i) & (i < of_block(meta.end, b)[None, :])
    return visible if meta.first_seen is None else visible & (of_block(meta.first_seen, at)[:, None] <= j)


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, meta: TreeMeta) -> tuple[jax.Array, tuple]:
    out, lse = checkpoint_name(with_exact_sums(_over_pairs, q, k, v, meta), "attended")
    return out, (q, k, v, meta, out, lse)


def _over_pairs(sums: Any, q: jax.Array, k: jax.Array, v: jax.Array, meta: TreeMeta) -> tuple[jax.Array, jax.Array]:
    """The output and the logarithm of each query's sum, taken in ``sums`` and given in FP32 (FP64)."""
    group, scale = q.shape[-2] // meta.block_size, q.shape[-1] ** -0.5

    def visit(queries: _Index, keys: _Index, visible: jax.Array, carry: _Carry) -> _Carry:
        q_a, k_b, v_b = (_at(x, *index).astype(sums) for x, index in ((q, queries), (k, keys), (v, keys)))
        scores = jnp.einsum("QC,SC->QS", q_a, k_b) * scale
        scores = jnp.where(jnp.tile(visible, (group, 1)), scores, NEVER)
        own = RunningSoftmax(*(_at(x, *queries) for x in carry)).add(scores, v_b)
        return tuple(_put(x, value, queries) for x, value in zip(carry, own, strict=True))

    out, top, total = _each_pair(visit, meta, k.shape[1], tuple(RunningSoftmax.nothing(q.shape, sums)))
    total = jnp.where(total == 0.0, 1.0, total)  # a block of padding alone was never visited
    real = real_of(q)
    return (out / total[..., None]).astype(real), (top + jnp.log(total)).astype(real)


def _backward(residuals: tuple, d_out: jax.Array) -> _Carry:
    """Scores stand transposed, keys by queries: two of the three products that take them then read them as they lie."""
    q, k, v, meta, out, lse = residuals
    group, real, scale = q.shape[-2] // meta.block_size, real_of(q), q.shape[-1] ** -0.5
    d_out = d_out.astype(real)
    # Not a product and then its sum: XLA:CPU sums the rows of [1, ...] thirty times slower.
    delta = jnp.einsum("...C,...C->...", d_out, out)

    def visit(queries: _Index, keys: _Index, visible: jax.Array, carry: _Carry) -> _Carry:
        d_q, d_k, d_v = carry
        q_a, d_a, k_b, v_b = _at(q, *queries), _at(d_out, *queries), _at(k, *keys), _at(v, *keys)
        scores = jnp.einsum("SC,QC->SQ", k_b, q_a, preferred_element_type=real) * scale
        weights = jnp.where(jnp.tile(visible.T, (1, group)), jnp.exp(scores - _at(lse, *queries)[None]), 0.0)
        d_weights = jnp.einsum("SC,QC->SQ", v_b.astype(real), d_a)
        d_scores = weights * (d_weights - _at(delta, *queries)[None]) * scale
        d_q = _put(d_q, _at(d_q, *queries) + jnp.einsum("SQ,SC->QC", d_scores, k_b.astype(real)), queries)
        d_k = _put(d_k, _at(d_k, *keys) + d_scores @ q_a.astype(real), keys)
        d_v = _put(d_v, _at(d_v, *keys) + weights @ d_a, keys)
        return d_q, d_k, d_v

    start = (jnp.zeros(q.shape, real), jnp.zeros(k.shape, real), jnp.zeros(v.shape, real))
    d_q, d_k, d_v = _each_pair(visit, meta, k.shape[1], start)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)

"""The bodies of the TPU kernels of tree attention: forward, dQ and dK/dV, one active block pair a grid step.

Inside a kernel arrays are references: the prefetched scalars, the blocks of this step, the accumulators in VMEM that
outlive it. A walk visits the pairs of one block in a row, so that its sums start at its first and are written at its
last. G query heads share a key head; softmax statistics hold one value a query on all 128 lanes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from forgejax.ops.rounding import precision_of
from forgejax.ops.softmax import round_up_top
from forgejax.ops.tree.meta import KEY_BITS, QUERY_SHIFT

LANES = 128
_NEVER = -1e30  # below every score, and finite: exp(_NEVER - _NEVER) must not be NaN
_NT = (((1,), (1,)), ((), ()))  # A @ B.T
_NN = (((1,), (0,)), ((), ()))  # A @ B


@dataclasses.dataclass(frozen=True)
class Walk:
    """How a kernel finds its pair: lists of ``size`` a row, grouped by key block or by query block."""

    size: int
    key_blocks: int
    query_blocks: int
    by_key: bool

    def step(self, scalars: tuple[Any, ...]) -> tuple[Any, Any, Any, Any, Any, Any]:
        """Whether there is a pair, whether it is its block's first and last, its blocks, whether it needs no mask.

        Both blocks are logical.
        """
        pairs, n_pairs, full_until, query_at, full_from = scalars
        row, p = pl.program_id(0), pl.program_id(2)
        n = n_pairs[row]
        before, here, after = (pair_at(pairs, row, p + offset, n, self.size) for offset in (-1, 0, 1))
        a, b = query_at[row * self.query_blocks + (here >> QUERY_SHIFT)], here & KEY_BITS
        live = p < n
        first = live & ((p == 0) | (self._own(before) != self._own(here)))
        last = live & ((p == n - 1) | (self._own(after) != self._own(here)))
        full = (b < a) & (a < full_until[row * self.key_blocks + b])
        if full_from is not None:
            full &= full_from[row * self.key_blocks + a] <= b
        return live, first, last, a, b, full

    def _own(self, pair: Any) -> Any:
        return pair & KEY_BITS if self.by_key else pair >> QUERY_SHIFT


def pair_at(pairs: Any, row: Any, p: Any, n: Any, size: int) -> Any:
    """Pair p of a row, kept inside its list: the block of an idle step is the last one, already there."""
    return pairs[row * size + jnp.maximum(jnp.minimum(p, n - 1), 0)]


def _dot(x: jax.Array, y: jax.Array, dims: Any) -> jax.Array:
    return lax.dot_general(x, y, dims, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)


def _spread(x_Q128: jax.Array, width: int) -> jax.Array:
    """A statistic that is equal on all 128 lanes, on ``width`` lanes."""
    if width <= LANES:
        return x_Q128[:, :width]
    return jnp.tile(x_Q128, (1, -(-width // LANES)))[:, :width]


def _column(x_1Q: jax.Array) -> jax.Array:
    """A row [1, Q] as a column on all lanes, [Q, 128]."""
    return jnp.broadcast_to(x_1Q, (LANES, x_1Q.shape[1])).T


def _masked(scores: jax.Array, i: Any, j: Any, end_j: jax.Array, first_seen_i: jax.Array | None) -> jax.Array:
    """Scores, never where query i does not see key j; the others spread to their shape, None without a window."""
    visible = (j <= i) & (i < end_j)
    if first_seen_i is not None:
        visible &= first_seen_i <= j
    return jnp.where(visible, scores, _NEVER)


def _both(live: Any, full: Any, heads: Callable[[bool], None]) -> None:
    """Runs ``heads(masked)`` for a live pair: the mask costs as much as the exponential, and most pairs need none."""
    pl.when(live & full)(lambda: heads(False))
    pl.when(live & jnp.logical_not(full))(lambda: heads(True))


def forward_kernel(*refs: Any, walk: Walk, scale: float) -> None:
    scalars, q, k, v, (end, first_seen), out, lse, total_out, top, total, first_column = refs
    live, first, last, a, b, full = walk.step(scalars)
    group, block, C = q.shape

    @pl.when(first)
    def begin() -> None:
        total_out[...] = jnp.zeros_like(total_out)
        top[...] = jnp.full_like(top, _NEVER)
        total[...] = jnp.zeros_like(total)
        if first_seen is not None:
            first_column[...] = _column(first_seen[...])

    def heads(masked: bool) -> None:
        def head(g: Any, _: None) -> None:
            scores = _dot(q[g], k[...], _NT) * scale
            if masked:
                i = a * block + lax.broadcasted_iota(jnp.int32, (block, block), 0)
                j = b * block + lax.broadcasted_iota(jnp.int32, (block, block), 1)
                first_seen_i = None if first_seen is None else _spread(first_column[...], block)
                scores = _masked(scores, i, j, end[...], first_seen_i)
            new_top = jnp.maximum(top[g], scores.max(axis=1, keepdims=True))
            new_top = new_top if v.dtype == scores.dtype else round_up_top(new_top)
            # Of a query that has seen no key yet this is garbage, and the next decay is 0: its own key comes last.
            weights = jnp.exp(scores - _spread(new_top, block))
            decay = jnp.exp(top[g] - new_top)
            total[g] = total[g] * decay + weights.sum(axis=1, keepdims=True)
            total_out[g] = total_out[g] * _spread(decay, C) + _dot(weights.astype(v.dtype), v[...], _NN)
            top[g] = new_top

        lax.fori_loop(0, group, head, None)

    _both(live, full, heads)

    @pl.when(last)
    def finish() -> None:
        for g in range(group):
            out[g] = (total_out[g] / _spread(total[g], C)).astype(out.dtype)
            lse[pl.ds(g, 1), :] = (top[g] + jnp.log(total[g])).T[:1]


def d_query_kernel(*refs: Any, walk: Walk, scale: float) -> None:
    scalars, q, k, v, bounds, d_out, lse, delta, d_q, total, lse_column, delta_column, first_column = refs
    end, first_seen = bounds
    live, first, last, a, b, full = walk.step(scalars)
    group, block, _ = q.shape

    @pl.when(first)
    def begin() -> None:
        total[...] = jnp.zeros_like(total)
        if first_seen is not None:
            first_column[...] = _column(first_seen[...])
        for g in range(group):
            lse_column[g] = _column(lse[pl.ds(g, 1), :])
            delta_column[g] = _column(delta[pl.ds(g, 1), :])

    def heads(masked: bool) -> None:
        def head(g: Any, _: None) -> None:
            scores = _dot(q[g], k[...], _NT) * scale
            if masked:
                i = a * block + lax.broadcasted_iota(jnp.int32, (block, block), 0)
                j = b * block + lax.broadcasted_iota(jnp.int32, (block, block), 1)
                first_seen_i = None if first_seen is None else _spread(first_column[...], block)
                scores = _masked(scores, i, j, end[...], first_seen_i)
            weights = jnp.exp(scores - _spread(lse_column[g], block))
            d_weights = _dot(d_out[g], v[...], _NT)
            d_scores = weights * (d_weights - _spread(delta_column[g], block))
            total[g] += _dot(d_scores.astype(k.dtype), k[...], _NN)

        lax.fori_loop(0, group, head, None)

    _both(live, full, heads)

    @pl.when(last)
    def finish() -> None:
        d_q[...] = (total[...] * scale).astype(d_q.dtype)


def d_key_value_kernel(*refs: Any, walk: Walk, scale: float) -> None:
    """Scores stand transposed, keys by queries: both products then read their operands as they lie."""
    scalars, q, k, v, (end, first_seen), d_out, lse, delta, d_k, d_v, total_k, total_v, end_column = refs
    live, first, last, a, b, full = walk.step(scalars)
    group, block, _ = q.shape

    @pl.when(first)
    def begin() -> None:
        total_k[...] = jnp.zeros_like(total_k)
        total_v[...] = jnp.zeros_like(total_v)
        end_column[...] = _column(end[...])

    def heads(masked: bool) -> None:
        def head(g: Any, _: None) -> None:
            scores = _dot(k[...], q[g], _NT) * scale
            if masked:
                j = b * block + lax.broadcasted_iota(jnp.int32, (block, block), 0)
                i = a * block + lax.broadcasted_iota(jnp.int32, (block, block), 1)
                first_seen_i = None if first_seen is None else first_seen[...]
                scores = _masked(scores, i, j, _spread(end_column[...], block), first_seen_i)
            weights = jnp.exp(scores - lse[pl.ds(g, 1), :])
            total_v[...] += _dot(weights.astype(d_out.dtype), d_out[g], _NN)
            d_weights = _dot(v[...], d_out[g], _NT)
            d_scores = weights * (d_weights - delta[pl.ds(g, 1), :])
            total_k[...] += _dot(d_scores.astype(q.dtype), q[g], _NN)

        lax.fori_loop(0, group, head, None)

    _both(live, full, heads)

    @pl.when(last)
    def finish() -> None:
        d_k[...] = (total_k[...] * scale).astype(d_k.dtype)
        d_v[...] = total_v[...].astype(d_v.dtype)

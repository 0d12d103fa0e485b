"""``KVMemory`` as contiguous rows, and attention over them: one ``Attend`` for prefill and for decode.

Dimension key: L layers, B rows, K kv heads, T cached tokens, C head dim, Q query tokens, G query heads per kv head.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from forgejax.models import Attend, PolicyConfig
from forgejax.rollout.engine.config import ATTENTION_BLOCK

_MASKED = -1e30


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class KVRows:
    """Keys and values of B sequences, contiguous in T; what lies beyond a sequence's end is arbitrary but finite."""

    k_LBKTC: jax.Array
    v_LBKTC: jax.Array

    def attend(self, positions_BQ: jax.Array, length: jax.Array) -> Attend:
        """See ``KVMemory``. Rows beyond B are left alone."""
        return _attend_rows(positions_BQ, length)

    def insert(self, one: KVRows, index: jax.Array) -> KVRows:
        """See ``KVMemory``."""
        return jax.tree.map(
            lambda all_rows, row: jax.lax.dynamic_update_slice_in_dim(all_rows, row, index, axis=1), self, one
        )


def make_rows(policy: PolicyConfig, rows: int, tokens: int) -> KVRows:
    """Empty rows in the policy's compute dtype (keys and values are distinct buffers: they are donated)."""
    shape = (policy.num_layers, rows, policy.num_kv_heads, tokens, policy.head_size)
    dtype = jnp.dtype(policy.compute_dtype)
    return KVRows(k_LBKTC=jnp.zeros(shape, dtype), v_LBKTC=jnp.zeros(shape, dtype))


def _attend_rows(positions_BQ: jax.Array, length: jax.Array) -> Attend:
    """Attention of B x Q queries over the first B rows of a ``KVRows`` memory.

    The softmax runs over blocks of keys in FP32 (Milakov & Gimelshein 2018, arXiv 1805.02867), with a trip count known
    only at run time: the cost follows the longest live sequence, not the row length, and one program serves them all.
    """
    blocks = (length + ATTENTION_BLOCK - 1) // ATTENTION_BLOCK

    def attend(
        layer: jax.Array, q_BQHC: jax.Array, k_BQKC: jax.Array, v_BQKC: jax.Array, memory: KVRows
    ) -> tuple[jax.Array, KVRows]:
        B, Q, H, C = q_BQHC.shape
        K = k_BQKC.shape[2]
        G = H // K
        memory = _write(memory, layer, positions_BQ, k_BQKC, v_BQKC)
        # Scores of one kv head's G queries at all Q positions are one matrix product per row.
        q_BKXC = jnp.einsum("BQKGC->BKQGC", q_BQHC.reshape(B, Q, K, G, C)).reshape(B, K, Q * G, C) * C**-0.5
        last_BX = jnp.repeat(positions_BQ, G, axis=1)

        def block(
            index: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            top_BKX, mass_BKX, out_BKXC = carry
            start = index * ATTENTION_BLOCK
            k_BKTC, v_BKTC = (
                jax.lax.dynamic_slice(x, (layer, 0, 0, start, 0), (1, B, K, ATTENTION_BLOCK, C))[0]
                for x in (memory.k_LBKTC, memory.v_LBKTC)
            )
            score_BKXT = jnp.einsum("BKXC,BKTC->BKXT", q_BKXC, k_BKTC, preferred_element_type=jnp.float32)
            key_T = start + jnp.arange(ATTENTION_BLOCK)
            seen_BXT = key_T[None, None, :] <= last_BX[:, :, None]
            score_BKXT = jnp.where(seen_BXT[:, None], score_BKXT, _MASKED)
            new_top_BKX = jnp.maximum(top_BKX, score_BKXT.max(axis=-1))
            weight_BKXT = jnp.exp(score_BKXT - new_top_BKX[..., None])
            decay_BKX = jnp.exp(top_BKX - new_top_BKX)
            value_BKXC = jnp.einsum(
                "BKXT,BKTC->BKXC", weight_BKXT.astype(v_BKTC.dtype), v_BKTC, preferred_element_type=jnp.float32
            )
            return (
                new_top_BKX,
                mass_BKX * decay_BKX + weight_BKXT.sum(axis=-1),
                out_BKXC * decay_BKX[..., None] + value_BKXC,
            )

        # Position 0 lies in the first block and every query sees it, so no row stays without a real maximum.
        nothing_BKX = jnp.zeros((B, K, Q * G), jnp.float32)
        start_carry = (nothing_BKX + _MASKED, nothing_BKX, jnp.zeros((B, K, Q * G, C), jnp.float32))
        _, mass_BKX, out_BKXC = jax.lax.fori_loop(0, blocks, block, start_carry)
        out_BKQGC = (out_BKXC / mass_BKX[..., None]).reshape(B, K, Q, G, C)
        return jnp.einsum("BKQGC->BQKGC", out_BKQGC).reshape(B, Q, H, C).astype(q_BQHC.dtype), memory

    return attend


def _write(memory: KVRows, layer: jax.Array, positions_BQ: jax.Array, k_BQKC: jax.Array, v_BQKC: jax.Array) -> KVRows:
    row_B1 = jnp.arange(positions_BQ.shape[0])[:, None]

    def put(x_LBKTC: jax.Array, new_BQKC: jax.Array) -> jax.Array:
        return x_LBKTC.at[layer, row_B1, :, positions_BQ].set(
            new_BQKC, mode="drop", unique_indices=True, indices_are_sorted=True
        )

    return KVRows(k_LBKTC=put(memory.k_LBKTC, k_BQKC), v_LBKTC=put(memory.v_LBKTC, v_BQKC))

"""``KVMemory`` as contiguous rows, and attention over them: one ``Attend`` for prefill and for decode.

Dimension key: L layers, B rows, K kv heads, T cached tokens, C head dim, Q query tokens, G query heads per kv head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from forgejax.models import Attend, PolicyConfig
from forgejax.ops.rounding import precision_of, with_exact_sums
from forgejax.ops.softmax import NEVER, RunningSoftmax
from forgejax.rollout.engine.config import ATTENTION_BLOCK


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class KVRows:
    """Keys and values of B sequences, contiguous in T, stored as ``stored_dtype``.

    What lies beyond a sequence's end is arbitrary but finite.
    """

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
    """Empty rows (keys and values are distinct buffers: they are donated)."""
    shape = (policy.num_layers, rows, policy.num_kv_heads, tokens, policy.head_size)
    dtype = stored_dtype(policy)
    return KVRows(k_LBKTC=jnp.zeros(shape, dtype), v_LBKTC=jnp.zeros(shape, dtype))


def stored_dtype(policy: PolicyConfig) -> Any:
    """Of keys and values in memory: the compute dtype's, or unsigned integers that hold the bits of a narrow one.

    XLA:CPU reads and writes a part of a bf16 array by widening the whole of it.
    """
    dtype = jnp.dtype(policy.compute_dtype)
    return dtype if dtype.itemsize >= 4 else jnp.dtype(f"uint{8 * dtype.itemsize}")


def _attend_rows(positions_BQ: jax.Array, length: jax.Array) -> Attend:
    """Attention of B x Q queries over the first B rows of a ``KVRows`` memory."""

    def attend(
        layer: jax.Array, q_BQHC: jax.Array, k_BQKC: jax.Array, v_BQKC: jax.Array, memory: KVRows
    ) -> tuple[jax.Array, KVRows]:
        memory = _write(memory, layer, positions_BQ, k_BQKC, v_BQKC)
        out_BQHC = with_exact_sums(_over_blocks, q_BQHC, memory, positions_BQ, (layer, length))
        return out_BQHC, memory

    return attend


def _over_blocks(
    sums: Any, q_BQHC: jax.Array, memory: KVRows, positions_BQ: jax.Array, layer_and_length: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """The output [B, Q, H, C] in q's dtype; scores and sums are of dtype ``sums``.

    The trip count is known only at run time: the cost follows the longest live sequence, not the row length, and one
    program serves them all.
    """
    (B, Q, H, C), (layer, length) = q_BQHC.shape, layer_and_length
    K = memory.k_LBKTC.shape[2]
    G = H // K
    blocks = (length + ATTENTION_BLOCK - 1) // ATTENTION_BLOCK
    # Scores of one kv head's G queries at all Q positions are one matrix product per row.
    q_BKXC = jnp.einsum("BQKGC->BKQGC", q_BQHC.reshape(B, Q, K, G, C)).reshape(B, K, Q * G, C)
    last_BX = jnp.repeat(positions_BQ, G, axis=1)

    def block(index: jax.Array, softmax: RunningSoftmax) -> RunningSoftmax:
        start, zero = index * ATTENTION_BLOCK, jnp.zeros_like(index)
        k_BKTC, v_BKTC = (
            jax.lax.bitcast_convert_type(
                jax.lax.dynamic_slice(x, (layer, zero, zero, start, zero), (1, B, K, ATTENTION_BLOCK, C))[0],
                q_BQHC.dtype,
            )
            for x in (memory.k_LBKTC, memory.v_LBKTC)
        )
        q, k, v = (x.astype(sums) if sums == jnp.float64 else x for x in (q_BKXC, k_BKTC, v_BKTC))
        score_BKXT = C**-0.5 * jnp.einsum(
            "BKXC,BKTC->BKXT", q, k, precision=precision_of(q.dtype), preferred_element_type=sums
        )
        key_T = start + jnp.arange(ATTENTION_BLOCK, dtype=start.dtype)
        seen_BXT = key_T[None, None, :] <= last_BX[:, :, None]
        return softmax.add(jnp.where(seen_BXT[:, None], score_BKXT, NEVER), v)

    # Position 0 lies in the first block and every query sees it, so no row stays without a real maximum.
    found = jax.lax.fori_loop(0, blocks, block, RunningSoftmax.nothing((B, K, Q * G, C), sums))
    out_BKXC = (found.out / found.total[..., None]).astype(q_BQHC.dtype)
    return jnp.einsum("BKQGC->BQKGC", out_BKXC.reshape(B, K, Q, G, C)).reshape(B, Q, H, C)


def _write(memory: KVRows, layer: jax.Array, positions_BQ: jax.Array, k_BQKC: jax.Array, v_BQKC: jax.Array) -> KVRows:
    row_B1 = jnp.arange(positions_BQ.shape[0])[:, None]

    def put(x_LBKTC: jax.Array, new_BQKC: jax.Array) -> jax.Array:
        return x_LBKTC.at[layer, row_B1, :, positions_BQ].set(
            jax.lax.bitcast_convert_type(new_BQKC, x_LBKTC.dtype),
            mode="drop",
            unique_indices=True,
            indices_are_sorted=True,
        )

    return KVRows(k_LBKTC=put(memory.k_LBKTC, k_BQKC), v_LBKTC=put(memory.v_LBKTC, v_BQKC))

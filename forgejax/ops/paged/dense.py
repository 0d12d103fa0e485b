"""The oracle of paged attention: plain rows of keys and values, the whole mask of every query and key."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def dense_paged_attention(
    q_THC: Float[Array, "T H C"],
    k_NSKC: Float[Array, "N S K C"],
    v_NSKC: Float[Array, "N S K C"],
    sequence_T: Int[Array, " T"],
    position_T: Int[Array, " T"],
    *,
    window: int | None = None,
) -> Float[Array, "T H C"]:
    """Attention of each query over its sequence's first ``position + 1`` tokens, or the last ``window`` of them."""
    T, H, C = q_THC.shape
    K = k_NSKC.shape[2]
    real = jnp.promote_types(q_THC.dtype, jnp.float32)
    q_TKGC = q_THC.reshape(T, K, H // K, C).astype(real)
    k_TSKC, v_TSKC = k_NSKC[sequence_T].astype(real), v_NSKC[sequence_T].astype(real)
    scores_TKGS = jnp.einsum("TKGC,TSKC->TKGS", q_TKGC, k_TSKC, precision="highest") * C**-0.5
    behind_TS = position_T[:, None] - jnp.arange(k_NSKC.shape[1])[None]
    seen_TS = (behind_TS >= 0) & (behind_TS < (window if window is not None else k_NSKC.shape[1]))
    weights_TKGS = jax.nn.softmax(jnp.where(seen_TS[:, None, None], scores_TKGS, -jnp.inf), axis=-1)
    out_TKGC = jnp.einsum("TKGS,TSKC->TKGC", weights_TKGS, v_TSKC, precision="highest")
    return out_TKGC.reshape(T, H, C).astype(q_THC.dtype)

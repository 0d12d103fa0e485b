"""The oracle of tree attention: the whole T x T mask, plain autodiff."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def dense_tree_attention(
    q_BTHC: Float[Array, "B T H C"],
    k_BTKC: Float[Array, "B T K C"],
    v_BTKC: Float[Array, "B T K C"],
    end_BT: Int[Array, "B T"],
) -> Float[Array, "B T H C"]:
    """Attention of every query i over the keys j with ``j <= i < end[j]``; time and memory grow with T squared."""
    B, T, H, C = q_BTHC.shape
    K = k_BTKC.shape[2]
    real = jnp.promote_types(q_BTHC.dtype, jnp.float32)
    q_BTKGC = q_BTHC.reshape(B, T, K, H // K, C)
    scores = jnp.einsum("BTKGC,BSKC->BKGTS", q_BTKGC, k_BTKC, preferred_element_type=real) * C**-0.5
    index_T = jnp.arange(T)
    visible_BTT = (index_T[None, None, :] <= index_T[None, :, None]) & (index_T[None, :, None] < end_BT[:, None, :])
    weights = jax.nn.softmax(jnp.where(visible_BTT[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("BKGTS,BSKC->BTKGC", weights, v_BTKC.astype(real))
    return out.reshape(B, T, H, C).astype(q_BTHC.dtype)

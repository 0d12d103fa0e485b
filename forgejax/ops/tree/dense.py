"""The oracle of tree attention: the whole mask of every query and key, plain autodiff."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def dense_tree_attention(
    q_BTHC: Float[Array, "B T H C"],
    k_BSKC: Float[Array, "B S K C"],
    v_BSKC: Float[Array, "B S K C"],
    end_BS: Int[Array, "B S"],
    index_BT: Int[Array, "B T"] | None = None,
    *,
    window: int | None = None,
    positions_BS: Int[Array, "B S"] | None = None,
) -> Float[Array, "B T H C"]:
    """Attention of every query i over the keys j with ``j <= i < end[j]``; time and memory grow with T S.

    ``index_BT`` is the logical index of each query; left out, query t is token t. With a window i sees only those with
    ``pos[i] - pos[j] < window`` besides; ``positions_BS`` are those of the keys, and needed for it.
    """
    B, T, H, C = q_BTHC.shape
    K = k_BSKC.shape[2]
    real = jnp.promote_types(q_BTHC.dtype, jnp.float32)
    q_BTKGC = q_BTHC.reshape(B, T, K, H // K, C)
    scores = jnp.einsum("BTKGC,BSKC->BKGTS", q_BTKGC, k_BSKC, preferred_element_type=real) * C**-0.5
    index_BT = jnp.arange(T)[None] if index_BT is None else index_BT
    index_S = jnp.arange(k_BSKC.shape[1])
    visible_BTS = (index_S[None, None] <= index_BT[:, :, None]) & (index_BT[:, :, None] < end_BS[:, None])
    if window is not None:
        assert positions_BS is not None
        position_BT = jnp.take_along_axis(positions_BS, jnp.broadcast_to(index_BT, (B, T)), axis=1)
        visible_BTS &= position_BT[:, :, None] - positions_BS[:, None] < window
    weights = jax.nn.softmax(jnp.where(visible_BTS[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("BKGTS,BSKC->BTKGC", weights, v_BSKC.astype(real))
    return out.reshape(B, T, H, C).astype(q_BTHC.dtype)

"""How much the backward pass keeps, and whether a device can keep it."""

from __future__ import annotations

import jax.numpy as jnp

from forgejax.models import PolicyConfig


def activation_bytes(config: PolicyConfig, tokens: int) -> int:
    """Bytes that the layers keep for the backward pass of ``tokens`` tokens where nothing is recomputed.

    Counted per token and layer: eight arrays as wide as the model (the residual stream, both norms' inputs, what they
    give and their parts), the rotated queries, the attention's output in two layouts, keys and values, and three arrays
    as wide as the MLP (gate, up and their product), once per expert that a token visits.
    """
    moe = config.moe
    width = (moe.d_ff or config.d_ff) * moe.experts_per_token if moe.num_experts else config.d_ff
    heads = (3 * config.num_heads + 2 * config.num_kv_heads) * config.head_size
    kept = 8 * config.d_model + heads + 3 * width
    return tokens * config.num_layers * kept * jnp.dtype(config.compute_dtype).itemsize


def recomputes(config: PolicyConfig, tokens: int, budget_gib: float) -> bool:
    """Whether each layer is to be recomputed in the backward pass: its activations exceed the budget of a device.

    Recomputation costs a third more products, so it is done only where it must be.
    """
    return activation_bytes(config, tokens) > budget_gib * 2**30

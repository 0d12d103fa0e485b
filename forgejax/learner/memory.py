"""How much the backward pass keeps, and how much of it a device can keep."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax.sharding import Mesh

from forgejax.models import Kept, PolicyConfig
from forgejax.sharding import Rules, split_axes

_LADDER: tuple[Kept, ...] = ("products", "attention", "nothing")  # each keeps less than the one before


def activation_bytes(config: PolicyConfig, tokens: int, keep: Kept) -> int:
    """Bytes that all layers keep for the backward pass of ``tokens`` tokens.

    Counted per token and layer. ``nothing``: the layer's input. ``attention`` adds queries, keys and values, the
    attention's output and each head's log-sum, and the stream after attention. ``products`` adds the MLP's two inner
    products, once for each expert that a token visits.

    Raises:
        ValueError: for ``all``, which depends on what the compiler makes of a layer, and for ``share``, which depends
            on the mesh.
    """
    if keep not in _LADDER:
        raise ValueError(f"activations are counted for 'products', 'attention' and 'nothing', not for {keep!r}")
    size = jnp.dtype(config.compute_dtype).itemsize
    wide = max(size, 4)
    width = config.d_model
    if keep != "nothing":
        width += (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_size + config.d_model
    if keep == "products":
        moe = config.moe
        width += 2 * (config.expert_width * moe.experts_per_token if moe.num_experts else config.d_ff)
    sums = config.num_heads * wide if keep != "nothing" else 0
    return tokens * config.num_layers * (width * size + sums)


def kept_within(
    config: PolicyConfig, tokens: int, budget_gib: float, *, mesh: Mesh | None = None, rules: Rules | None = None
) -> Kept:
    """The most that layers may keep of ``tokens`` tokens, split over the mesh, within the budget of one device.

    Keeping products costs no product again; ``attention`` costs about two of every nine of a layer's forward pass;
    ``nothing`` all of it, attention included: a third of the step. Heads and widths are counted whole, as if the mesh
    had no tensor axis. Where none fits it is ``share`` on a mesh with such an axis, else ``nothing``.
    """
    least = _LADDER[-1]
    if mesh is not None:
        rows, length, kept = (split_axes(name, mesh, rules or Rules()) for name in ("rows", "length", "kept"))
        tokens = -(-tokens // math.prod(mesh.shape[axis] for axis in rows + length))
        least = "share" if set(kept) > set(length) else least
    fitting = (keep for keep in _LADDER if activation_bytes(config, tokens, keep) <= budget_gib * 2**30)
    return next(fitting, least)

"""How much the backward pass keeps, and how much of it a device can keep."""

from __future__ import annotations

import jax.numpy as jnp

from forgejax.models import Kept, PolicyConfig
from forgejax.sharding import ONE_DEVICE, Layout

_LADDER: tuple[Kept, ...] = ("products", "attention", "nothing")  # each keeps less than the one before


def count_activation_bytes(config: PolicyConfig, tokens: int, keep: Kept, *, layout: Layout = ONE_DEVICE) -> int:
    """Bytes that all layers keep on one device for the backward pass of the ``tokens`` tokens it works on.

    Counted per token and layer. ``nothing``: the layer's input. ``attention`` adds queries, keys and values, the
    attention's output and each head's log-sum, and the stream after attention. ``products`` adds the MLP's two inner
    products, once for each expert that a token visits; a mixture on a mesh makes them again, whatever layers keep. Of
    heads and of the MLP's width a device has its own part.

    Raises:
        ValueError: for ``all``, which depends on what the compiler makes of a layer, and for ``share``, of which
            tokens are not the device's own.
    """
    if keep not in _LADDER:
        raise ValueError(f"activations are counted for 'products', 'attention' and 'nothing', not for {keep!r}")

    def part(count: int, logical: str) -> int:
        """Of heads or widths those of one device, which has all where they are fewer than the shards."""
        shards = layout.shards(logical)
        return -(-count // shards) if count >= shards else count

    size = jnp.dtype(config.compute_dtype).itemsize
    heads, kv_heads = part(config.num_heads, "heads"), part(config.num_kv_heads, "kv_heads")
    width, sums = config.d_model, 0
    if keep != "nothing":
        width += (2 * heads + 2 * kv_heads) * config.head_size + config.d_model
        sums = heads * max(size, 4)
    if keep == "products" and not config.moe.num_experts:
        width += 2 * part(config.d_ff, "mlp")
    elif keep == "products" and not layout.on_mesh:
        width += 2 * config.expert_width * config.moe.experts_per_token
    return tokens * config.num_layers * (width * size + sums)


def choose_kept(config: PolicyConfig, tokens: int, budget_gib: float, *, layout: Layout = ONE_DEVICE) -> Kept:
    """The most that layers may keep of ``tokens`` tokens, split over the mesh, within the budget of one device.

    Keeping products costs no product again; ``attention`` costs about two of every nine of a layer's forward pass;
    ``nothing`` all of it, attention included: a third of the step. Where none fits it is ``share`` on a mesh whose
    devices split heads, else ``nothing``.
    """
    own = -(-tokens // layout.shards("rows", "length"))
    least = "share" if layout.shards("kept") > layout.shards("length") else _LADDER[-1]
    room = budget_gib * 2**30
    return next((keep for keep in _LADDER if count_activation_bytes(config, own, keep, layout=layout) <= room), least)

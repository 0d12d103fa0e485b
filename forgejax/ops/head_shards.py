"""Query and key heads over the devices that share them, for every attention that is split by heads."""

from __future__ import annotations

import jax
from jax import lax
from jax.sharding import Mesh


def splits_keys(query_heads: int, key_heads: int, mesh: Mesh, head_axis: str | None) -> bool:
    """Whether each device has key heads of its own; where there are fewer than devices, each has them all.

    Raises ValueError where heads and devices do not go into each other.
    """
    shards = mesh.shape[head_axis] if head_axis else 1
    if query_heads % shards or (key_heads % shards and shards % key_heads):
        raise ValueError(
            f"{query_heads} query and {key_heads} key heads cannot be split over {shards} head shards: "
            f"choose a count that divides {query_heads} and divides, or is a multiple of, {key_heads}"
        )
    return key_heads % shards == 0


def take_own_key_head(*keys: jax.Array, head_axis: str | None, axis: int) -> tuple[jax.Array, ...]:
    """On one of more devices than key heads: of each array with all of them along ``axis``, the one that the device's
    own queries read."""
    assert head_axis is not None
    first = lax.axis_index(head_axis) * keys[0].shape[axis] // lax.axis_size(head_axis)
    return tuple(lax.dynamic_slice_in_dim(x, first, 1, axis=axis) for x in keys)

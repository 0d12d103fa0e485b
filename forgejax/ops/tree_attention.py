"""Exact attention over packed prefix trees, on one device or inside a mesh."""

from __future__ import annotations

import jax
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from forgejax.ops.tree_attention_cpu import block_tree_attention
from forgejax.ops.tree_meta import TreeMeta


def tree_attention(
    q_BTHC: Float[Array, "B T H C"],
    k_BTKC: Float[Array, "B T K C"],
    v_BTKC: Float[Array, "B T K C"],
    meta: TreeMeta,
    *,
    mesh: Mesh | None = None,
    row_axes: tuple[str, ...] = (),
    head_axis: str | None = None,
) -> Float[Array, "B T H C"]:
    """Attention in which query i sees exactly the keys j with ``j <= i < end[j]``: itself and its ancestors.

    Scores are scaled by ``C ** -0.5``; products accumulate in FP32 (FP64 for FP64 inputs). Differentiable in q, k, v.

    Args:
        q_BTHC: queries; H is a multiple of K, and query head h reads key head ``h // (H // K)``.
        k_BTKC: keys.
        v_BTKC: values.
        meta: visibility, from ``tree_meta``.
        mesh: where given, the work is split inside ``shard_map`` over ``row_axes`` (which divide B) and ``head_axis``.
            The loop over block pairs holds no collective: its trip count differs between the row shards.
        row_axes: mesh axes that shard B, in order.
        head_axis: mesh axis that shards the heads, or None.

    Raises:
        ValueError: H is not a multiple of K, or the heads cannot be split over ``head_axis``.
    """
    H, K = q_BTHC.shape[2], k_BTKC.shape[2]
    if H % K:
        raise ValueError(f"{H} query heads over {K} key heads: expected a multiple")
    if mesh is None:
        return block_tree_attention(q_BTHC, k_BTKC, v_BTKC, meta)

    shards = mesh.shape[head_axis] if head_axis else 1
    if H % shards or (K % shards and shards % K):
        raise ValueError(
            f"{H} query and {K} key heads cannot be split over {shards} head shards: "
            f"choose a count that divides {H} and divides, or is a multiple of, {K}"
        )
    split_keys = K % shards == 0

    def local(q: jax.Array, k: jax.Array, v: jax.Array, meta: TreeMeta) -> jax.Array:
        if not split_keys:  # more shards than key heads: each keeps the one that its queries read
            first = lax.axis_index(head_axis) * K // shards
            k, v = (lax.dynamic_slice_in_dim(x, first, 1, axis=2) for x in (k, v))
        return block_tree_attention(q, k, v, meta)

    rows = row_axes or None
    heads = PartitionSpec(rows, None, head_axis, None)
    keys = heads if split_keys else PartitionSpec(rows, None, None, None)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(heads, keys, keys, PartitionSpec(rows)), out_specs=heads, check_vma=False
    )(q_BTHC, k_BTKC, v_BTKC, meta)

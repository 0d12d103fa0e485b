"""Exact attention over packed prefix trees, on one device or inside a mesh."""

from __future__ import annotations

import functools
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from forgejax.ops.head_shards import splits_keys, take_own_key_head
from forgejax.ops.tree.cpu import CpuKernel
from forgejax.ops.tree.gpu import GpuKernel
from forgejax.ops.tree.meta import TreeMeta
from forgejax.ops.tree.split import SplitMeta, whole_rows
from forgejax.ops.tree.tpu import TpuKernel


@runtime_checkable
class Kernel(Protocol):
    """A backend: a hashable value, the same for every call that shall share a compiled program."""

    def check(self, meta: TreeMeta, dtype: Any, head_size: int) -> None:
        """Raises ValueError, with what to set, for rows, a dtype or heads that the kernel cannot work with.

        ``meta`` is of the rows on one device.
        """
        ...

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array, meta: TreeMeta) -> tuple[jax.Array, Any]:
        """The output [B, T, H, C] in q's dtype, 0 in blocks of padding alone, and residuals of any form."""
        ...

    def backward(self, residuals: Any, d_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The gradients of q, k and v in their dtypes."""
        ...


_KERNELS: dict[str, Kernel] = {
    "cpu": CpuKernel(),
    "tpu": TpuKernel(),
    "gpu": GpuKernel(),
    "cuda": GpuKernel(),
}


def kernel_for(mesh: Mesh | None) -> Kernel:
    """The kernel of the platform that the mesh's devices (without a mesh: JAX's default device) belong to.

    Raises:
        ValueError: there is no kernel for that platform.
    """
    platform = mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
    if platform not in _KERNELS:
        raise ValueError(
            f"no tree attention kernel for platform {platform!r}; there are kernels for {sorted(_KERNELS)}"
        )
    return _KERNELS[platform]


def tree_attention(
    q_BTHC: Float[Array, "B T H C"],
    k_BSKC: Float[Array, "B S K C"],
    v_BSKC: Float[Array, "B S K C"],
    meta: TreeMeta | SplitMeta,
    *,
    mesh: Mesh | None = None,
    row_axes: tuple[str, ...] = (),
    head_axis: str | None = None,
    length_axis: str | None = None,
    kernel: Kernel | None = None,
) -> Float[Array, "B T H C"]:
    """Attention in which query i sees exactly the keys j with ``j <= i < end[j]``: itself and its ancestors.

    With a window in ``meta`` it sees only those of them that are fewer positions before it.

    i and j are logical indices: keys lie in that order, ``meta.query_at`` tells which tokens the queries are. Where all
    tokens are queries, T is S.

    Scores are scaled by ``C ** -0.5``; products accumulate in FP32 (FP64 for FP64 inputs). Differentiable in q, k, v.

    Args:
        q_BTHC: queries; H is a multiple of K, and query head h reads key head ``h // (H // K)``.
        k_BSKC: keys.
        v_BSKC: values.
        meta: visibility, from ``tree_meta``; from ``split_meta`` where there is a ``length_axis``.
        mesh: where given, the work is split inside ``shard_map`` over ``row_axes`` (which divide B), ``head_axis`` and
            ``length_axis``. The loop over block pairs holds no collective: its trip count differs between the shards.
        row_axes: mesh axes that shard B, in order.
        head_axis: mesh axis that shards the heads, or None.
        length_axis: mesh axis that shards T and S, or None. Tokens then lie as ``meta`` says they are stored, keys as
            well as queries, and each shard gathers the keys and values of its rows before it begins.
        kernel: the backend; None takes ``kernel_for(mesh)``, decided as the caller is traced.

    Raises:
        ValueError: H is not a multiple of K, the heads cannot be split over ``head_axis``, ``meta`` is of other rows
            or of another number of shards, or the kernel cannot work with ``meta.block_size`` (multiples of 128 on
            TPU; 16, 32, 64 or 128 on GPU).
    """
    _check_meta(
        q_BTHC.shape[1], k_BSKC.shape[1], meta, mesh.shape[length_axis] if mesh is not None and length_axis else None
    )
    if q_BTHC.shape[2] % k_BSKC.shape[2]:
        raise ValueError(f"{q_BTHC.shape[2]} query heads over {k_BSKC.shape[2]} key heads: expected a multiple")
    kernel = kernel or kernel_for(mesh)
    if mesh is None:
        assert isinstance(meta, TreeMeta)
        return _attend(kernel, q_BTHC, k_BSKC, v_BSKC, meta)

    return _attend_on_mesh(
        kernel,
        (q_BTHC, k_BSKC, v_BSKC),
        meta,
        mesh=mesh,
        row_axes=row_axes,
        head_axis=head_axis,
        length_axis=length_axis,
    )


def _attend_on_mesh(
    kernel: Kernel,
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    meta: TreeMeta | SplitMeta,
    *,
    mesh: Mesh,
    row_axes: tuple[str, ...],
    head_axis: str | None,
    length_axis: str | None,
) -> jax.Array:
    """Each device attends over its own rows, heads and queries; see ``tree_attention``."""
    split_keys = splits_keys(qkv[0].shape[2], qkv[1].shape[2], mesh, head_axis)

    def local(q: jax.Array, k: jax.Array, v: jax.Array, meta: TreeMeta | SplitMeta) -> jax.Array:
        if not split_keys:
            k, v = take_own_key_head(k, v, head_axis=head_axis, axis=2)
        if isinstance(meta, TreeMeta):
            return _attend(kernel, q, k, v, meta)
        assert length_axis is not None
        k, v = (whole_rows(x, meta, length_axis) for x in (k, v))
        return _attend(kernel, q, k, v, meta.local())

    rows = row_axes or None
    heads = PartitionSpec(rows, length_axis, head_axis, None)
    keys = heads if split_keys else PartitionSpec(rows, length_axis, None, None)
    whole: Any = PartitionSpec(rows)
    if isinstance(meta, SplitMeta):
        whole = SplitMeta(shards=PartitionSpec(rows, length_axis), stored_at=whole, logical_at=whole)
    return jax.shard_map(local, mesh=mesh, in_specs=(heads, keys, keys, whole), out_specs=heads, check_vma=False)(
        *qkv, meta
    )


def _check_meta(queries: int, keys: int, meta: TreeMeta | SplitMeta, shards: int | None) -> None:
    """``shards``: of the length, None where nothing splits it."""
    found = meta.n_shards if isinstance(meta, SplitMeta) else None
    if found != shards:
        raise ValueError(
            f"visibility of rows on {found or 'whole'} shards where the mesh has {shards or 'whole rows'}: "
            "build it with split_meta for as many shards as the length axis has"
        )
    if isinstance(meta, SplitMeta):
        seen = (meta.logical_at.shape[1] * meta.shards.block_size, meta.shards.end.shape[2])
    else:
        seen = (meta.query_at.shape[1] * meta.block_size, meta.end.shape[1])
    if (queries, keys) != seen:
        raise ValueError(f"{queries} queries over {keys} keys with the visibility of {seen[0]} over {seen[1]}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(kernel: Kernel, q: jax.Array, k: jax.Array, v: jax.Array, meta: TreeMeta) -> jax.Array:
    return kernel.forward(q, k, v, meta)[0]


def _attend_forward(kernel: Kernel, q: jax.Array, k: jax.Array, v: jax.Array, meta: TreeMeta) -> tuple[jax.Array, Any]:
    return kernel.forward(q, k, v, meta)


def _attend_backward(kernel: Kernel, residuals: Any, d_out: jax.Array) -> tuple[jax.Array | None, ...]:
    return *kernel.backward(residuals, d_out), None


_attend.defvjp(_attend_forward, _attend_backward)

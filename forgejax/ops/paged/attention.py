"""Exact causal attention of new tokens over their sequences, whose keys and values lie in pages of one pool."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from forgejax.ops.head_shards import splits_keys, take_own_key_head
from forgejax.ops.paged.batch import PagedBatch, TokenPlaces
from forgejax.ops.paged.cpu import CpuPagedKernel
from forgejax.ops.paged.gpu import GpuPagedKernel
from forgejax.ops.paged.tpu import TpuPagedKernel


@runtime_checkable
class PagedKernel(Protocol):
    """A backend and its layout of the pool: a hashable value, the same for calls that shall share a program.

    A pool is a pytree of arrays [L, P, _, heads, ...]: whoever copies a page or splits the heads over devices need not
    know what else there is. ``heads`` are K, or several for each of K that are neighbours.
    """

    def make_pool(
        self, *, layers: int, pages: int, page_tokens: int, kv_heads: int, head_size: int, dtype: DTypeLike
    ) -> Any:
        """An empty pool, all finite. Raises ValueError, with what to set, for what the kernel cannot work with."""
        ...

    def write(self, pool: Any, layer: jax.Array, k_TKC: jax.Array, v_TKC: jax.Array, places: TokenPlaces) -> Any:
        """The pool with new keys and values in one layer; those for ``NOBODY`` are dropped."""
        ...

    def attend(
        self, q_THC: jax.Array, pool: Any, layer: jax.Array, batch: PagedBatch, *, window: int | None
    ) -> jax.Array:
        """The output [T, H, C] in q's dtype; that of padding is arbitrary but finite."""
        ...


_KERNELS: dict[str, PagedKernel] = {
    "tpu": TpuPagedKernel(),
    **dict.fromkeys(("gpu", "cuda"), GpuPagedKernel()),
}


def pick_paged_kernel(platform: str, *, batch_invariant: bool = False) -> PagedKernel:
    """The kernel of a platform. Raises ValueError where there is none.

    ``batch_invariant``: no bit of a sequence with one new token depends on how long the others of the batch are.
    """
    if platform == "cpu":
        return CpuPagedKernel(batch_invariant=batch_invariant)
    if platform not in _KERNELS:
        raise ValueError(
            f"no paged attention kernel for platform {platform!r}; there are kernels for {sorted(['cpu', *_KERNELS])}"
        )
    return _KERNELS[platform]


def count_kept_heads(kv_heads: int, head_shards: int = 1) -> int:
    """``kv_heads`` of the pool whose heads are split over so many devices: more than K where these exceed K.

    Each device then keeps the one that its queries read, and several keep the same.
    """
    return max(kv_heads, head_shards)


def paged_attention(
    q_THC: Float[Array, "T H C"],
    k_TKC: Float[Array, "T K C"],
    v_TKC: Float[Array, "T K C"],
    pool: Any,
    layer: Int[Array, ""],
    *,
    batch: PagedBatch,
    kernel: PagedKernel,
    window: int | None = None,
    mesh: Mesh | None = None,
    head_axis: str | None = None,
) -> tuple[Float[Array, "T H C"], Any]:
    """Writes the new tokens' keys and values into one layer of the pool, then lets each see its sequence up to itself.

    Scores are scaled by ``C ** -0.5``; products accumulate in FP32, on a CPU in FP64 where q is narrower than FP32. All
    is written before anything is read: a token sees what another sequence of the batch writes into a page they share.

    Args:
        q_THC: queries of all sequences' new tokens; H is a multiple of K, and head h reads key head ``h // (H // K)``.
        k_TKC: their keys.
        v_TKC: their values.
        pool: made by ``kernel``; donate it, and it is changed in place.
        layer: index of the layer.
        batch: which token is whose.
        kernel: the backend, from ``pick_paged_kernel``.
        window: how many tokens a query sees at most, itself included; None is all of them.
        mesh: where given, each device writes and reads its own heads, inside a ``shard_map``; no collective.
        head_axis: the mesh axis that splits H, the pool, which has ``count_kept_heads``, and K where it can; or None.

    Raises:
        ValueError: H is not a multiple of K, the heads cannot be split, or the window is less than 1.
    """
    if q_THC.shape[1] % k_TKC.shape[1]:
        raise ValueError(f"{q_THC.shape[1]} query heads over {k_TKC.shape[1]} key heads: expected a multiple")
    if window is not None and window < 1:
        raise ValueError(f"a window of {window} tokens; expected at least 1, for a token sees itself")
    attend = functools.partial(_write_and_attend, kernel, window)
    if mesh is None:
        return attend((q_THC, k_TKC, v_TKC), pool, layer, batch)
    return _attend_on_mesh(attend, (q_THC, k_TKC, v_TKC), (pool, layer, batch), mesh, head_axis)


def _write_and_attend(
    kernel: PagedKernel, window: int | None, qkv: tuple[jax.Array, ...], pool: Any, *of_layer: Any
) -> tuple[jax.Array, Any]:
    (q, k, v), (layer, batch) = qkv, of_layer
    pool = kernel.write(pool, layer, k, v, batch.place_tokens(len(q)))
    return kernel.attend(q, pool, layer, batch, window=window), pool


def _attend_on_mesh(
    attend: Callable[..., tuple[jax.Array, Any]],
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    rest: tuple[Any, jax.Array, PagedBatch],
    mesh: Mesh,
    head_axis: str | None,
) -> tuple[jax.Array, Any]:
    """Each device writes and reads its own heads; see ``paged_attention``."""
    split_keys = splits_keys(qkv[0].shape[1], qkv[1].shape[1], mesh, head_axis)

    def local(qkv: tuple[jax.Array, jax.Array, jax.Array], *rest: Any) -> tuple[jax.Array, Any]:
        q, k, v = qkv
        if not split_keys:
            k, v = take_own_key_head(k, v, head_axis=head_axis, axis=1)
        return attend((q, k, v), *rest)

    heads, whole, of_pool = PartitionSpec(None, head_axis), PartitionSpec(), PartitionSpec(None, None, None, head_axis)
    keys = heads if split_keys else whole
    in_specs, out_specs = ((heads, keys, keys), of_pool, whole, whole), (heads, of_pool)
    run = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    out_THC, pool = run(qkv, *rest)
    return out_THC, pool


def copy_page(pool: Any, source: Int[Array, ""], target: Int[Array, ""]) -> Any:
    """The pool with one page's keys and values, of all layers, in another page as well."""

    def copy(x: jax.Array) -> jax.Array:
        page = jax.lax.dynamic_slice_in_dim(x, source, 1, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(x, page, target, axis=1)

    return jax.tree.map(copy, pool)

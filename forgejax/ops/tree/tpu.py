"""Tree attention as Pallas kernels for TPUs: forward, dQ and dK/dV, each a walk over the active block pairs.

FlashAttention-2 (arXiv 2307.08691) on a grid [row, key head, pair] whose last bound is a runtime value. The pair lists
arrive by scalar prefetch, as in splash attention, so that the pipeline fetches the blocks of the next active pair
while this one is multiplied, and no tree compiles anew. Splash itself cannot be used: it masks by segment or by a
function of the two indices, and ``end`` would have to become a boolean block of every partial pair.

A step handles all query heads of one key head: keys and values are fetched once for them and never repeated. Operands
keep their dtype, products accumulate in FP32, softmax statistics are FP32 (one value a query, spread over 128 lanes).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from forgejax.ops.tree.meta import KEY_BITS, QUERY_SHIFT, TreeMeta
from forgejax.ops.tree.tpu_kernels import (
    LANES,
    Walk,
    d_key_value_kernel,
    d_query_kernel,
    forward_kernel,
    pair_at,
)

_SMEM_BYTES = 768 * 1024  # of 1 MiB on v4 and later


@dataclasses.dataclass(frozen=True)
class TpuKernel:
    """The TPU backend of ``tree_attention``; ``interpret`` runs the kernels on any device, slowly."""

    interpret: bool = False

    def check(self, meta: TreeMeta, dtype: Any, head_size: int) -> None:
        """Raises ValueError as the protocol says."""
        if dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"tree attention on TPU got {dtype}; set policy.compute_dtype to float32 or bfloat16")
        if meta.block_size % LANES:
            raise ValueError(
                f"tree attention on TPU got blocks of {meta.block_size} tokens; set packing.block_size to a multiple "
                f"of {LANES} (512 is a good one)"
            )
        rows, size = meta.q_block.shape
        if 4 * rows * size > _SMEM_BYTES:
            raise ValueError(
                f"the block pairs of {rows} rows take {4 * rows * size} bytes of a TPU core's scalar memory, which has "
                f"room for {_SMEM_BYTES}; raise packing.block_size (now {meta.block_size}) or put fewer rows on a "
                "device"
            )

    def forward(
        self,
        q_BTHC: Float[Array, "B T H C"],
        k_BSKC: Float[Array, "B S K C"],
        v_BSKC: Float[Array, "B S K C"],
        meta: TreeMeta,
    ) -> tuple[Float[Array, "B T H C"], Any]:
        """The output, and what ``backward`` needs.

        Raises:
            ValueError: ``meta.block_size`` is no multiple of 128, the pair lists exceed the scalar memory, or the
                dtype is not one of the kernels'.
        """
        self.check(meta, q_BTHC.dtype, q_BTHC.shape[-1])
        q, k, v = _by_key_head(q_BTHC, k_BSKC.shape[2]), k_BSKC.swapaxes(1, 2), v_BSKC.swapaxes(1, 2)
        out, lse = checkpoint_name(_Call(meta, q.shape, q.dtype, self.interpret).forward(q, k, v), "attended")
        return _by_query(_used(out, meta.first_pair, axis=3)), (q, k, v, meta, out, lse)

    def backward(self, residuals: Any, d_out_BTHC: Float[Array, "B T H C"]) -> tuple[Array, Array, Array]:
        """The gradients of q [B, T, H, C], k and v [B, S, K, C]."""
        q, k, v, meta, out, lse = residuals
        call = _Call(meta, q.shape, q.dtype, self.interpret)
        d_out = _by_key_head(d_out_BTHC.astype(q.dtype), k.shape[1])
        delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
        d_q = call.d_query(q, k, v, d_out, lse, delta)
        d_k, d_v = call.d_key_value(q, k, v, d_out, lse, delta)
        d_k, d_v = (_used(x, meta.first_by_key, axis=2).swapaxes(1, 2) for x in (d_k, d_v))
        return _by_query(_used(d_q, meta.first_pair, axis=3)), d_k, d_v


def _by_key_head(x_BTHC: jax.Array, kv_heads: int) -> jax.Array:
    B, T, H, C = x_BTHC.shape
    return x_BTHC.reshape(B, T, kv_heads, H // kv_heads, C).transpose(0, 2, 3, 1, 4)


def _by_query(x_BKGTC: jax.Array) -> jax.Array:
    B, K, G, T, C = x_BKGTC.shape
    return x_BKGTC.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, C)


def _used(x: jax.Array, first_pair: Any, axis: int) -> jax.Array:
    """x with zeros in the blocks that no pair visits: nothing writes them."""
    visited = jnp.diff(jnp.asarray(first_pair)) > 0
    shape = [1] * x.ndim
    shape[0], shape[axis] = x.shape[0], x.shape[axis]
    return jnp.where(jnp.repeat(visited, x.shape[axis] // visited.shape[1], axis=1).reshape(shape), x, 0)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The three kernel calls for one shape [B, K, G, T, C] of grouped queries."""

    meta: TreeMeta
    shape: tuple[int, ...]
    dtype: Any
    interpret: bool

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        B, K, G, T, _ = self.shape
        outs = [(self.shape, self.dtype, self._queries()), ((B, K, G, T), jnp.float32, self._per_query())]
        scratch = [self._wide(), self._lanes(), self._lanes(), self._window_column()]
        ins = [self._queries(), self._keys(), self._keys(), self._bounds()]
        return self._run(forward_kernel, False, ins, outs, scratch)(q, k, v, self._bound_rows())

    def d_query(self, q: jax.Array, k: jax.Array, v: jax.Array, *of_queries: jax.Array) -> jax.Array:
        ins = [self._queries(), self._keys(), self._keys(), self._bounds(), self._queries()]
        ins += [self._per_query(), self._per_query()]
        outs = [(self.shape, self.dtype, self._queries())]
        scratch = [self._wide(), self._lanes(), self._lanes(), self._window_column()]
        return self._run(d_query_kernel, False, ins, outs, scratch)(q, k, v, self._bound_rows(), *of_queries)[0]

    def d_key_value(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *of_queries: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        block, C = self.meta.block_size, self.shape[-1]
        ins = [self._queries(), self._keys(), self._keys(), self._bounds(), self._queries()]
        ins += [self._per_query(), self._per_query()]
        outs = [(k.shape, k.dtype, self._keys()), (v.shape, v.dtype, self._keys())]
        scratch = [pltpu.VMEM((block, C), jnp.float32)] * 2 + [pltpu.VMEM((block, LANES), jnp.int32)]
        return self._run(d_key_value_kernel, True, ins, outs, scratch)(q, k, v, self._bound_rows(), *of_queries)

    def _run(
        self,
        kernel: Callable[..., None],
        by_key: bool,
        ins: list[Any],
        outs: list[tuple[tuple[int, ...], Any, pl.BlockSpec]],
        scratch: list[Any],
    ) -> Callable[..., Any]:
        meta, (B, K, G, _, C) = self.meta, self.shape
        pairs_BN = meta.pairs_by_key if by_key else meta.q_block << QUERY_SHIFT | meta.kv_block
        scalars = (pairs_BN, meta.n_pairs, meta.full_until, meta.query_at, meta.full_from)
        prefetched = jax.tree.map(jnp.ravel, scalars)  # a kernel gets None for full_from where that is None
        # The longest row sets the bound; a shorter one idles through its rest without fetching anything.
        grid = (B, K, jnp.maximum(jnp.max(meta.n_pairs), 1))
        call = pl.pallas_call(
            functools.partial(
                kernel,
                walk=Walk(
                    size=pairs_BN.shape[1],
                    key_blocks=meta.full_until.shape[1],
                    query_blocks=meta.query_at.shape[1],
                    by_key=by_key,
                ),
                scale=C**-0.5,
            ),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=grid,
                in_specs=ins,
                out_specs=[spec for _, _, spec in outs],
                scratch_shapes=scratch,
            ),
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=_vmem_bytes(G, meta.block_size, C),
            ),
            interpret=self.interpret,
            name=f"tree_attention_{kernel.__name__}",
        )
        return functools.partial(call, prefetched)

    def _spec(
        self, shape: tuple[int | None, ...], index: Callable[..., tuple[Any, ...]], *, logical: bool = False
    ) -> pl.BlockSpec:
        """A block whose place depends on row, key head and the pair's query (as stored, or logical) and key block."""
        size = self.meta.q_block.shape[1]

        def place(row: Any, head: Any, p: Any, prefetched: tuple[Any, ...]) -> tuple[Any, ...]:
            pairs, n_pairs, _, query_at, _ = prefetched
            pair = pair_at(pairs, row, p, n_pairs[row], size)
            a = pair >> QUERY_SHIFT
            if logical:
                a = query_at[row * self.meta.query_at.shape[1] + a]
            return index(row, head, a, pair & KEY_BITS)

        return pl.BlockSpec(shape, place)

    def _queries(self) -> pl.BlockSpec:
        shape = (None, None, self.shape[2], self.meta.block_size, self.shape[4])
        return self._spec(shape, lambda row, head, a, b: (row, head, 0, a, 0))

    def _per_query(self) -> pl.BlockSpec:
        shape = (None, None, self.shape[2], self.meta.block_size)
        return self._spec(shape, lambda row, head, a, b: (row, head, 0, a))

    def _keys(self) -> pl.BlockSpec:
        shape = (None, None, self.meta.block_size, self.shape[4])
        return self._spec(shape, lambda row, head, a, b: (row, head, b, 0))

    def _bounds(self) -> tuple[pl.BlockSpec, pl.BlockSpec | None]:
        """Of ``end`` by key block and, with a window, ``first_seen`` by query block."""
        shape = (None, 1, self.meta.block_size)
        end = self._spec(shape, lambda row, head, a, b: (row, 0, b))
        if self.meta.first_seen is None:
            return end, None
        return end, self._spec(shape, lambda row, head, a, b: (row, 0, a), logical=True)

    def _bound_rows(self) -> tuple[jax.Array, jax.Array | None]:
        bounds = (self.meta.end, self.meta.first_seen)
        rows: tuple[jax.Array, jax.Array | None] = jax.tree.map(
            lambda x: jnp.asarray(x)[:, None, :],  # a dimension of 1 that blocks may cut
            bounds,
        )
        return rows

    def _window_column(self) -> Any:
        return None if self.meta.first_seen is None else pltpu.VMEM((self.meta.block_size, LANES), jnp.int32)

    def _wide(self) -> Any:
        return pltpu.VMEM((self.shape[2], self.meta.block_size, self.shape[4]), jnp.float32)

    def _lanes(self) -> Any:
        return pltpu.VMEM((self.shape[2], self.meta.block_size, LANES), jnp.float32)


def _vmem_bytes(group: int, block: int, width: int) -> int:
    """Room for the double-buffered blocks, the statistics and the score-sized intermediates of the largest kernel."""
    lanes = -(-width // LANES) * LANES
    a_query_block = 4 * group * block * lanes
    return max(16 << 20, 7 * a_query_block + 2 * 4 * group * block * LANES + 12 * 4 * block * block)

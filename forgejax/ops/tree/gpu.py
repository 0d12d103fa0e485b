"""Tree attention as Pallas kernels for GPUs, through Triton: forward, dQ and dK/dV.

FlashAttention-2 (arXiv 2307.08691). A program of the forward and dQ kernels owns one query block of one head and walks
the list of key blocks active for it; a program of the dK/dV kernel owns one key block of one key head and walks the
list of query blocks active for that, for each query head that reads it. Keys and values are never repeated and nothing
is accumulated across programs. Operands keep their dtype (FP32 ones are multiplied as
three TF32 products each), products accumulate in FP32. Arrays are read as they lie, [B, T, H, C].
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from forgejax.ops.tree.meta import QUERY_SHIFT, TreeMeta

_NEVER = -1e30  # below every score, and finite: exp2(_NEVER - _NEVER) must not be NaN
_LOG2_E = math.log2(math.e)  # GPUs have exp2 in hardware: scores and statistics are kept in its units
_BLOCKS = (16, 32, 64, 128)
_BLOCK_BYTES = 32 * 1024  # of one operand: the compiled kernels then take at most 180 KiB of shared memory
_FORWARD_TILE = 64  # keys at a time: larger tiles spill registers at head sizes of 128
_BACKWARD_TILE = 32
_BY_QUERY = ("end", "first_seen", "query_at", "kv_block", "first_pair")


@dataclasses.dataclass(frozen=True)
class GpuKernel:
    """The GPU backend of ``tree_attention``; ``interpret`` runs the kernels on any device, slowly."""

    interpret: bool = False

    def check(self, meta: TreeMeta, dtype: Any, head_size: int) -> None:
        """Raises ValueError as the protocol says."""
        if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(f"tree attention on GPU got {dtype}; set policy.compute_dtype to float32 or bfloat16")
        largest = _BLOCK_BYTES // (_padded(head_size) * dtype.itemsize)
        if meta.block_size not in _BLOCKS or meta.block_size > largest:
            raise ValueError(
                f"tree attention on GPU got blocks of {meta.block_size} tokens; for {dtype} heads of {head_size} set "
                f"packing.block_size to one of {[block for block in _BLOCKS if block <= largest]}, the largest is best"
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
            ValueError: ``meta.block_size`` is not 16, 32, 64 or 128, a block of queries is larger than 32 KiB, or the
                dtype is not one of the kernels'.
        """
        self.check(meta, q_BTHC.dtype, q_BTHC.shape[-1])
        call = _Call(meta, q_BTHC.shape, q_BTHC.dtype, k_BSKC.shape[2], self.interpret)
        out_BTHC, lse_BHT = checkpoint_name(call.forward(q_BTHC, k_BSKC, v_BSKC), "attended")
        return out_BTHC, (q_BTHC, k_BSKC, v_BSKC, meta, out_BTHC, lse_BHT)

    def backward(self, residuals: Any, d_out_BTHC: Float[Array, "B T H C"]) -> tuple[Array, Array, Array]:
        """The gradients of q [B, T, H, C], k and v [B, S, K, C]."""
        q, k, v, meta, out, lse_BHT = residuals
        call = _Call(meta, q.shape, q.dtype, k.shape[2], self.interpret)
        delta_BTH = jnp.sum(d_out_BTHC.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
        inputs = (q, k, v, d_out_BTHC.astype(q.dtype), lse_BHT, delta_BTH.swapaxes(1, 2))
        return call.d_query(*inputs), *call.d_key_value(*inputs)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The three kernel calls for one shape [B, T, H, C] of queries over ``kv_heads`` key heads."""

    meta: TreeMeta
    shape: tuple[int, ...]
    dtype: Any
    kv_heads: int
    interpret: bool

    def forward(self, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        B, T, H, _ = self.shape
        outs = [(self.shape, self.dtype, self._head(own=True)), ((B, H, T), jnp.float32, self._per_query(own=True))]
        lists = self._lists(*_BY_QUERY)
        ins = [self._head(own=True), self._key_head(), self._key_head(), *(spec for _, spec in lists)]
        run = self._run(_forward_kernel, self._queries, ins, outs, _FORWARD_TILE)
        return run(q, k, v, *(values for values, _ in lists))

    def d_query(self, q: jax.Array, k: jax.Array, v: jax.Array, *of_queries: jax.Array) -> jax.Array:
        lists = self._lists(*_BY_QUERY)
        ins = [self._head(own=True), self._key_head(), self._key_head(), *(spec for _, spec in lists)]
        ins += [self._head(own=True), self._per_query(own=True), self._per_query(own=True)]
        outs = [(self.shape, self.dtype, self._head(own=True))]
        run = self._run(_d_query_kernel, self._queries, ins, outs, _BACKWARD_TILE)
        return run(q, k, v, *(values for values, _ in lists), *of_queries)[0]

    def d_key_value(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *of_queries: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        lists = self._lists("end", "first_seen", "query_at", "pairs_by_key", "first_by_key")
        ins = [self._head(own=False), self._own_keys(), self._own_keys(), *(spec for _, spec in lists)]
        ins += [self._head(own=False), self._per_query(own=False), self._per_query(own=False)]
        outs = [(k.shape, k.dtype, self._own_keys()), (v.shape, v.dtype, self._own_keys())]
        keys = self.meta.end.shape[1] // self.meta.block_size, self.kv_heads
        run = self._run(_d_key_value_kernel, keys, ins, outs, _BACKWARD_TILE)
        return run(q, k, v, *(values for values, _ in lists), *of_queries)

    def _run(
        self,
        kernel: Callable[..., None],
        programs: tuple[int, int],
        ins: list[pl.BlockSpec | None],
        outs: list[tuple[tuple[int, ...], Any, pl.BlockSpec]],
        tile: int,
    ) -> Callable[..., Any]:
        B, _, _, C = self.shape
        block = self.meta.block_size
        return pl.pallas_call(
            functools.partial(kernel, plan=_Plan(block, min(tile, block), C, self._precision())),
            grid=(*programs, B),
            in_specs=ins,
            out_specs=[spec for _, _, spec in outs],
            out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outs],
            compiler_params=plgpu.CompilerParams(
                num_warps=4 if C <= 64 else 8,
                # The split of FP32 into TF32 operands needs the shared memory that fetching ahead would take.
                num_stages=1 if self.dtype == jnp.float32 else 2,
            ),
            interpret=self.interpret,
            name=f"tree_attention{kernel.__name__}",
        )

    def _precision(self) -> lax.Precision | lax.DotAlgorithmPreset:
        if self.dtype != jnp.float32:
            return lax.Precision.DEFAULT
        # Plain FP32 leaves the tensor cores idle and spills; three TF32 products keep 21 bits of every operand.
        return lax.Precision.HIGHEST if self.interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3

    @property
    def _queries(self) -> tuple[int, int]:
        """Query blocks and heads: a program each."""
        return self.shape[1] // self.meta.block_size, self.shape[2]

    @property
    def _group(self) -> int:
        return self.shape[2] // self.kv_heads

    def _head(self, *, own: bool) -> pl.BlockSpec:
        """Queries: the program's own block of its head, or the whole row of all heads that read its key head."""
        _, T, _, C = self.shape
        if own:
            return pl.BlockSpec((None, self.meta.block_size, None, _padded(C)), lambda a, h, row: (row, a, h, 0))
        return pl.BlockSpec((None, T, self._group, _padded(C)), lambda b, h, row: (row, 0, h, 0))

    def _per_query(self, *, own: bool) -> pl.BlockSpec:
        if own:
            return pl.BlockSpec((None, None, self.meta.block_size), lambda a, h, row: (row, h, a))
        return pl.BlockSpec((None, self._group, self.shape[1]), lambda b, h, row: (row, h, 0))

    def _key_head(self) -> pl.BlockSpec:
        """The whole row of the key head that query head h reads."""
        group = self._group
        shape = (None, self.meta.end.shape[1], None, _padded(self.shape[3]))
        return pl.BlockSpec(shape, lambda a, h, row: (row, 0, h // group, 0))

    def _own_keys(self) -> pl.BlockSpec:
        shape = (None, self.meta.block_size, None, _padded(self.shape[3]))
        return pl.BlockSpec(shape, lambda b, h, row: (row, b, h, 0))

    def _lists(self, *names: str) -> list[tuple[jax.Array | None, pl.BlockSpec | None]]:
        """Arrays of the meta, of which a program reads its whole row; a kernel gets None for one that is None."""
        arrays = [jax.tree.map(jnp.asarray, getattr(self.meta, name)) for name in names]
        return [(x, x if x is None else pl.BlockSpec((None, x.shape[1]), lambda a, h, row: (row, 0))) for x in arrays]


def _padded(width: int) -> int:
    """A tile of a matrix product needs a power of two, 16 at least."""
    return max(16, pl.next_power_of_2(width))


def _load(ref: Any, width: int) -> jax.Array:
    """A tile [S, C], with zeros where it is wider than the heads."""
    padded = ref.shape[-1]
    if padded == width:
        return plgpu.load(ref)
    return plgpu.load(ref, mask=(jnp.arange(padded) < width)[None, :], other=0.0)


def _store(ref: Any, value: jax.Array, width: int) -> None:
    padded = ref.shape[-1]
    mask = None if padded == width else (jnp.arange(padded) < width)[None, :]
    plgpu.store(ref, value.astype(ref.dtype), mask=mask)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a kernel is compiled for: tokens in a block, of them in a tile, the head size, how FP32 is multiplied."""

    block: int
    tile: int
    width: int
    precision: lax.Precision | lax.DotAlgorithmPreset

    def dot(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.dot(x, y, precision=self.precision, preferred_element_type=jnp.float32)

    def scores(
        self,
        q_QC: jax.Array,
        k_SC: jax.Array,
        *,
        i: jax.Array,
        j: jax.Array,
        end_S: jax.Array,
        first_Q: jax.Array | None,
    ) -> jax.Array:
        """Scores [Q, S] of queries i and keys j in units of log2, never where the key is not visible."""
        scores = self.dot(q_QC, k_SC.T) * (self.width**-0.5 * _LOG2_E)
        visible = (j[None, :] <= i[:, None]) & (i[:, None] < end_S[None, :])
        if first_Q is not None:
            visible &= first_Q[:, None] <= j[None, :]
        return jnp.where(visible, scores, _NEVER)


def _key_tile(step: Any, first: Any, key_block: Any, plan: _Plan) -> Any:
    """Where the tile of a step begins; a pair takes block / tile steps."""
    per_pair = plan.block // plan.tile
    return key_block[first + lax.div(step, per_pair)] * plan.block + lax.rem(step, per_pair) * plan.tile


def _first_keys(first_seen: Any, query: Any, count: int) -> jax.Array | None:
    """The first key that each of ``count`` queries sees, None without a window."""
    return None if first_seen is None else first_seen[pl.ds(query, count)]


def _forward_kernel(*refs: Any, plan: _Plan) -> None:
    q, k, v, end, first_seen, query_at, key_block, first_pair, out, lse = refs
    a, block, tile, width = pl.program_id(0), plan.block, plan.tile, plan.width
    q_QC, i_Q = _load(q, width), query_at[a] * block + jnp.arange(block)
    first, first_Q = first_pair[a], _first_keys(first_seen, query_at[a] * block, block)

    def step(s: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total_out, top, total = carry
        keys = pl.ds(_key_tile(s, first, key_block, plan), tile)
        k_SC, j_S = _load(k.at[keys], width), keys.start + jnp.arange(tile)
        scores = plan.scores(q_QC, k_SC, i=i_Q, j=j_S, end_S=end[keys], first_Q=first_Q)
        new_top = jnp.maximum(top, scores.max(axis=1))
        new_top = new_top if v.dtype == scores.dtype else jnp.ceil(new_top)  # ``round_up_top``, in units of log2
        # Of a query that has seen no key yet this is garbage, and the next decay is 0: its own key comes last.
        weights = jnp.exp2(scores - new_top[:, None])
        decay = jnp.exp2(top - new_top)
        total_out = total_out * decay[:, None] + plan.dot(weights.astype(v.dtype), _load(v.at[keys], width))
        return total_out, new_top, total * decay + weights.sum(axis=1)

    start = (jnp.zeros(q_QC.shape, jnp.float32), jnp.full((block,), _NEVER), jnp.zeros((block,), jnp.float32))
    steps = (first_pair[a + 1] - first) * (block // tile)
    total_out, top, total = lax.fori_loop(0, steps, step, start)
    total = jnp.where(total == 0.0, 1.0, total)  # a block of padding alone has no pair
    _store(out, total_out / total[:, None], width)
    lse[...] = top + jnp.log2(total)


def _d_query_kernel(*refs: Any, plan: _Plan) -> None:
    q, k, v, end, first_seen, query_at, key_block, first_pair, d_out, lse, delta, d_q = refs
    a, block, tile, width = pl.program_id(0), plan.block, plan.tile, plan.width
    q_QC, d_QC, i_Q = _load(q, width), _load(d_out, width), query_at[a] * block + jnp.arange(block)
    lse_Q, delta_Q = lse[...], delta[...]
    first, first_Q = first_pair[a], _first_keys(first_seen, query_at[a] * block, block)

    def step(s: Any, total: jax.Array) -> jax.Array:
        keys = pl.ds(_key_tile(s, first, key_block, plan), tile)
        k_SC, j_S = _load(k.at[keys], width), keys.start + jnp.arange(tile)
        scores = plan.scores(q_QC, k_SC, i=i_Q, j=j_S, end_S=end[keys], first_Q=first_Q)
        weights = jnp.exp2(scores - lse_Q[:, None])
        d_scores = weights * (plan.dot(d_QC, _load(v.at[keys], width).T) - delta_Q[:, None])
        return total + plan.dot(d_scores.astype(k_SC.dtype), k_SC)

    steps = (first_pair[a + 1] - first) * (block // tile)
    total = lax.fori_loop(0, steps, step, jnp.zeros(q_QC.shape, jnp.float32))
    _store(d_q, total * width**-0.5, width)


def _d_key_value_kernel(*refs: Any, plan: _Plan) -> None:
    q, k, v, end, first_seen, query_at, pairs, first_by_key, d_out, lse, delta, d_k, d_v = refs
    b, block, tile, width = pl.program_id(0), plan.block, plan.tile, plan.width
    k_SC, v_SC, j_S = _load(k, width), _load(v, width), b * block + jnp.arange(block)
    end_S = end[pl.ds(b * block, block)]
    tiles, first = block // tile, first_by_key[b]

    def head(g: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def step(s: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            total_k, total_v = carry
            a, part = pairs[first + lax.div(s, tiles)] >> QUERY_SHIFT, lax.rem(s, tiles) * tile
            queries = pl.ds(a * block + part, tile)
            q_QC, d_QC = _load(q.at[queries, g], width), _load(d_out.at[queries, g], width)
            at = query_at[a] * block + part
            first_Q = _first_keys(first_seen, at, tile)
            scores = plan.scores(q_QC, k_SC, i=at + jnp.arange(tile), j=j_S, end_S=end_S, first_Q=first_Q)
            weights = jnp.exp2(scores - lse[g, queries][:, None])
            total_v += plan.dot(weights.astype(d_QC.dtype).T, d_QC)
            d_scores = weights * (plan.dot(d_QC, v_SC.T) - delta[g, queries][:, None])
            return total_k + plan.dot(d_scores.astype(q_QC.dtype).T, q_QC), total_v

        return lax.fori_loop(0, (first_by_key[b + 1] - first) * tiles, step, carry)

    nothing = jnp.zeros(k_SC.shape, jnp.float32)
    total_k, total_v = lax.fori_loop(0, q.shape[1], head, (nothing, nothing))
    _store(d_k, total_k * width**-0.5, width)
    _store(d_v, total_v, width)

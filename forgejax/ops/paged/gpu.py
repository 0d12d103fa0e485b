"""Paged attention as a Pallas kernel for GPUs, through Triton.

A program owns some queries of one sequence, all those that read one key head, and walks the sequence's keys in tiles
that it gathers from their pages. Sequences with one new token each have few queries and many keys: where there are not
enough of them to fill the device, several programs share a sequence's keys and what they found is added up afterwards
(Flash-Decoding). Operands keep their dtype, FP32 ones are multiplied as three TF32 products each, sums are FP32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from forgejax.ops.paged.batch import NOBODY, PagedBatch, TokenPlaces

_NEVER = -1e30  # below every score, and finite: exp2(_NEVER - _NEVER) must not be NaN
_LOG2_E = math.log2(math.e)
_KEYS = 64  # of a tile
_RUN_QUERIES = 16  # tokens of a longer run that one program takes, each with all heads of its key head
_PROGRAMS = 256  # that fill a device
_SHARE_KEYS = 1024  # of which a program that shares a sequence's keys has at least as many


@dataclasses.dataclass(frozen=True)
class GpuPagedKernel:
    """The GPU backend of ``paged_attention``; ``interpret`` runs the kernel on any device, slowly.

    A pool is one array [L, P, 2, K, W, C], keys before values. A layer's pages are named by their places in the pages
    of all layers, so that no program copies a layer out of the pool.
    """

    interpret: bool = False

    def make_pool(
        self, *, layers: int, pages: int, page_tokens: int, kv_heads: int, head_size: int, dtype: DTypeLike
    ) -> jax.Array:
        """Zeros. Raises ValueError for numbers that the kernel cannot multiply."""
        if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(f"keys and values in {jnp.dtype(dtype)}; set policy.compute_dtype to float32 or bfloat16")
        return jnp.zeros((layers, pages, 2, kv_heads, page_tokens, head_size), dtype)

    def write(
        self, pool: jax.Array, layer: jax.Array, k_TKC: jax.Array, v_TKC: jax.Array, places: TokenPlaces
    ) -> jax.Array:
        """See ``PagedKernel``."""
        page_T = jnp.where(places.page_T == NOBODY, pool.shape[1], places.page_T)
        new_T2KC = jnp.stack([k_TKC, v_TKC], axis=1)
        return pool.at[layer, page_T, :, :, places.offset_T].set(new_T2KC, mode="drop", unique_indices=True)

    def attend(
        self, q_THC: jax.Array, pool: jax.Array, layer: jax.Array, batch: PagedBatch, *, window: int | None
    ) -> jax.Array:
        """See ``PagedKernel``."""
        D, P = batch.singles, pool.shape[1]
        pages = pool.reshape(-1, *pool.shape[2:])
        work = (batch.tables_NM + layer * P, batch.lengths_N, batch.starts_O)
        parts = []
        if D:
            shares = _count_shares(D * pool.shape[3], batch.tables_NM.shape[1] * batch.page_tokens)
            call = _Call(queries=1, shares=shares, window=window, interpret=self.interpret)
            parts.append(call.attend(q_THC[:D], pages, work, jnp.arange(D, dtype=jnp.int32), jnp.int32(0)))
        if len(q_THC) > D:
            parts.append(self._attend_to_runs(q_THC[D:], pages, work, batch, window))
        return jnp.concatenate(parts)

    def _attend_to_runs(
        self, q_THC: jax.Array, pages: jax.Array, work: tuple[jax.Array, ...], batch: PagedBatch, window: int | None
    ) -> jax.Array:
        """The output of the tokens behind the singles; that of padding is 0."""
        (N, _), D, T = batch.tables_NM.shape, batch.singles, len(q_THC)
        tables_NM, lengths_N, starts_O = work
        real_N = (jnp.arange(N) >= D) & (jnp.arange(N) < batch.count)
        blocks_N = jnp.where(real_N, -(-jnp.diff(starts_O) // _RUN_QUERIES), 0)
        last_N = jnp.cumsum(blocks_N)
        block_A = jnp.arange(-(-T // _RUN_QUERIES) + N - D, dtype=jnp.int32)  # as many as there can be
        sequence_A = jnp.sum(block_A[:, None] >= last_N[None], axis=1, dtype=jnp.int32)
        none_A = sequence_A >= N
        sequence_A = jnp.minimum(sequence_A, N - 1)
        first_A = (block_A - (last_N - blocks_N)[sequence_A]) * _RUN_QUERIES
        first_A = jnp.where(none_A, jnp.iinfo(jnp.int32).max // 2, first_A)  # behind the end of every run
        call = _Call(queries=_RUN_QUERIES, shares=1, window=window, interpret=self.interpret)
        out_THC = call.attend(q_THC, pages, (tables_NM, lengths_N, starts_O - D), sequence_A, first_A)
        behind_T = jnp.arange(T) >= starts_O[-1] - D
        return jnp.where(behind_T[:, None, None], jnp.zeros((), q_THC.dtype), out_THC)


def _count_shares(programs: int, keys: int) -> int:
    """Into how many parts the keys of each sequence are cut, a power of two."""
    wanted = min(_PROGRAMS // max(programs, 1), keys // _SHARE_KEYS)
    return 1 << max(wanted, 1).bit_length() - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of the kernel: ``queries`` new tokens for a program, ``shares`` programs for their keys."""

    queries: int
    shares: int
    window: int | None
    interpret: bool

    def attend(
        self,
        q_THC: jax.Array,
        pages: jax.Array,
        work: tuple[jax.Array, ...],
        sequence_A: jax.Array,
        first_A: jax.Array,
    ) -> jax.Array:
        """The output [T, H, C] of the runs that blocks A cover: each of a sequence, from one of its new tokens on."""
        (T, H, C), K = q_THC.shape, pages.shape[2]
        first_A = jnp.broadcast_to(first_A, sequence_A.shape)
        stats = jax.ShapeDtypeStruct((self.shares, T, H), jnp.float32)
        shape = jax.ShapeDtypeStruct((self.shares, T, H, C), q_THC.dtype if self.shares == 1 else jnp.float32)
        out, lse = pl.pallas_call(
            functools.partial(_kernel, call=self, precision=self._precision(q_THC.dtype)),
            grid=(sequence_A.shape[0], K, self.shares),
            out_shape=[shape, stats],
            compiler_params=plgpu.CompilerParams(
                num_warps=4 if C <= 64 else 8, num_stages=1 if q_THC.dtype == jnp.float32 else 2
            ),
            interpret=self.interpret,
            name="paged_attention",
        )(q_THC, pages, *work, sequence_A, first_A)
        if self.shares == 1:
            return out[0]
        weights = jnp.exp2(lse - jnp.max(lse, axis=0, keepdims=True))
        total = jnp.sum(weights[..., None] * out, axis=0) / jnp.sum(weights, axis=0)[..., None]
        return total.astype(q_THC.dtype)

    def _precision(self, dtype: Any) -> lax.Precision | lax.DotAlgorithmPreset:
        if dtype != jnp.float32:
            return lax.Precision.DEFAULT
        return lax.Precision.HIGHEST if self.interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def _kernel(*refs: Any, call: _Call, precision: Any) -> None:
    q, pages, tables, lengths, starts, sequences, firsts, out, lse = refs
    C, W, G = q.shape[2], pages.shape[3], q.shape[1] // pages.shape[2]
    a, head, share = (pl.program_id(axis) for axis in range(3))
    n, first = sequences[a], firsts[a]
    start, length = starts[n], lengths[n]
    new = starts[n + 1] - start
    # Rows are (token, head of the group); a tile of a product needs a power of two of them, and of columns, 16 at
    # least. What is too many is the last one once more, and stores what that one stores.
    R, columns = (max(16, pl.next_power_of_2(size)) for size in (call.queries * G, C))
    row_R, width_C = jnp.minimum(jnp.arange(R), call.queries * G - 1), jnp.minimum(jnp.arange(columns), C - 1)
    own_R = jnp.minimum(first + lax.div(row_R, G), new - 1)
    token_R, head_R, position_R = start + own_R, head * G + lax.rem(row_R, G), length - new + own_R
    there = first < new
    q_RC = plgpu.load(
        q.at[token_R[:, None], head_R[:, None], width_C[None]],
        mask=jnp.broadcast_to(there & (jnp.arange(columns) < C)[None], (R, columns)),
        other=0.0,
    )

    last = jnp.minimum(length - new + jnp.minimum(first + call.queries, new), length)  # keys that are seen end here
    begin = 0 if call.window is None else jnp.maximum(length - new + first - call.window + 1, 0)
    begin = lax.div(jnp.int32(begin), _KEYS)
    behind = jnp.where(there, lax.div(last + _KEYS - 1, _KEYS), 0)
    mine = lax.div(behind - begin + call.shares - 1, call.shares)
    begin += share * mine
    end = jnp.minimum(begin + mine, behind)

    def step(tile: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total_out, top, total = carry
        key_S = tile * _KEYS + jnp.arange(_KEYS)
        there_S = key_S < length
        page_S = plgpu.load(tables.at[n, lax.div(key_S, W)], mask=there_S, other=0)
        at = (head, lax.rem(key_S, W)[:, None], width_C[None])
        mask = jnp.broadcast_to(there_S[:, None], (_KEYS, columns))
        k_SC, v_SC = (plgpu.load(pages.at[page_S[:, None], half, *at], mask=mask, other=0.0) for half in (0, 1))
        scores = jnp.dot(q_RC, k_SC.T, precision=precision, preferred_element_type=jnp.float32)
        seen = key_S[None] <= position_R[:, None]
        if call.window is not None:
            seen &= key_S[None] > position_R[:, None] - call.window
        scores = jnp.where(seen, scores * (C**-0.5 * _LOG2_E), _NEVER)
        new_top = jnp.maximum(top, scores.max(axis=1))
        new_top = new_top if v_SC.dtype == scores.dtype else jnp.ceil(new_top)  # ``round_up_top``, in units of log2
        weights = jnp.where(seen, jnp.exp2(scores - new_top[:, None]), 0.0)
        decay = jnp.exp2(top - new_top)
        found = jnp.dot(weights.astype(v_SC.dtype), v_SC, precision=precision, preferred_element_type=jnp.float32)
        return total_out * decay[:, None] + found, new_top, total * decay + weights.sum(axis=1)

    nothing = (jnp.zeros((R, columns), jnp.float32), jnp.full((R,), _NEVER), jnp.zeros((R,), jnp.float32))
    total_out, top, total = lax.fori_loop(begin, end, step, nothing)
    safe = jnp.where(total == 0.0, 1.0, total)
    plgpu.store(
        out.at[share, token_R[:, None], head_R[:, None], width_C[None]],
        (total_out / safe[:, None]).astype(out.dtype),
        mask=jnp.broadcast_to(there, (R, columns)),
    )
    plgpu.store(lse.at[share, token_R, head_R], top + jnp.log2(safe), mask=jnp.broadcast_to(there, (R,)))

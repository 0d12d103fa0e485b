"""Paged attention in plain JAX: loops over blocks of keys, gathered from the pages they lie in.

Trip counts are runtime values: the cost follows the sequences' true lengths. Sequences with one new token are taken
side by side for as many blocks as half of them have, which costs at most twice what they need, and one by one in
larger blocks from there on; longer runs of new tokens are taken one by one, as blocks of queries over blocks of keys.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from forgejax.ops.paged.batch import NOBODY, PagedBatch, TokenPlaces
from forgejax.ops.rounding import precision_of, with_exact_sums
from forgejax.ops.softmax import NEVER, RunningSoftmax

# Keys of a block: of many sequences side by side, of one sequence alone, of a block of queries. Queries of a block.
_SHARED_KEYS, _LONE_KEYS, _RUN_KEYS, _RUN_QUERIES = 64, 512, 128, 128


@dataclasses.dataclass(frozen=True)
class CpuPagedKernel:
    """The CPU backend of ``paged_attention``; it takes any page size, and FP64.

    A pool is one array [L, P, 2, K, W, C], keys before values. Numbers narrower than FP32 are kept as their bits, for
    XLA:CPU reads and writes a part of a bf16 array by widening the whole of it.

    ``batch_invariant``: sequences with one new token each are side by side for as many blocks as the longest has, so
    that no bit of one depends on the lengths of others, as long as there are as many.
    """

    batch_invariant: bool = False

    def make_pool(
        self, *, layers: int, pages: int, page_tokens: int, kv_heads: int, head_size: int, dtype: DTypeLike
    ) -> jax.Array:
        """Zeros."""
        given = jnp.dtype(dtype)
        stored = given if given.itemsize >= 4 else jnp.dtype(f"uint{8 * given.itemsize}")
        return jnp.zeros((layers, pages, 2, kv_heads, page_tokens, head_size), stored)

    def write(
        self, pool: jax.Array, layer: jax.Array, k_TKC: jax.Array, v_TKC: jax.Array, places: TokenPlaces
    ) -> jax.Array:
        """See ``PagedKernel``."""
        new_T2KC = lax.bitcast_convert_type(jnp.stack([k_TKC, v_TKC], axis=1), pool.dtype)
        page_T = jnp.where(places.page_T == NOBODY, pool.shape[1], places.page_T)
        return pool.at[layer, page_T, :, :, places.offset_T].set(new_T2KC, mode="drop", unique_indices=True)

    def attend(
        self, q_THC: jax.Array, pool: jax.Array, layer: jax.Array, batch: PagedBatch, *, window: int | None
    ) -> jax.Array:
        """See ``PagedKernel``."""
        return with_exact_sums(functools.partial(self._attend, window), q_THC, pool, (layer, batch))

    def _attend(
        self, window: int | None, sums: Any, q_THC: jax.Array, pool: jax.Array, layer_and_batch: Any
    ) -> jax.Array:
        (T, H, C), (layer, batch) = q_THC.shape, layer_and_batch
        K, D = pool.shape[3], batch.singles
        q_TKGC = q_THC.reshape(T, K, H // K, C)
        reader = _Reader(pool=pool, layer=layer, batch=batch, dtype=q_THC.dtype, sums=sums, window=window)
        parts = []
        if D:
            parts.append(_singles(reader, q_TKGC[:D], batch_invariant=self.batch_invariant))
        if T > D:
            parts.append(_runs(reader, q_TKGC[D:]))
        return jnp.concatenate(parts).reshape(T, H, C)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reader:
    """Blocks of keys and values of a batch's sequences, and softmax over them, in one layer."""

    pool: jax.Array
    layer: jax.Array
    batch: PagedBatch
    dtype: Any  # of queries, keys and values
    sums: Any
    window: int | None

    def gather(self, sequences: jax.Array, first: jax.Array, keys: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values [..., K, keys, C] of sequences [...] from the pages on that begin at token ``first`` [...].

        ``first`` and ``keys`` are whole pages. Values that are no part of the sequence are 0.
        """
        W, M = self.batch.page_tokens, self.batch.tables_NM.shape[1]
        index = _count_from(first // W, keys // W)
        pages = self.batch.tables_NM[sequences[..., None], jnp.minimum(index, M - 1)]
        stored = lax.bitcast_convert_type(self.pool[self.layer, pages], self.dtype)  # [..., n, 2, K, W, C]
        k, v = (self._join(stored[..., half, :, :, :]) for half in (0, 1))
        there = _count_from(first, keys) < self.batch.lengths_N[sequences][..., None]
        return k, jnp.where(there[..., None, :, None], v, jnp.zeros((), v.dtype))

    def first_seen(self, position: jax.Array) -> jax.Array:
        """The first token that a query sees."""
        return jnp.zeros_like(position) if self.window is None else jnp.maximum(position - self.window + 1, 0)

    def add(self, softmax: RunningSoftmax, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> RunningSoftmax:
        """With queries [..., K, X, C] over keys [..., K, S, C], of which ``seen`` [..., X, S] are seen."""
        q, k, v = (x.astype(self.sums) if self.sums == jnp.float64 else x for x in (q, k, v))
        scores = q.shape[-1] ** -0.5 * jnp.einsum(
            "...XC,...SC->...XS", q, k, precision=precision_of(q.dtype), preferred_element_type=self.sums
        )
        return softmax.add(jnp.where(seen[..., None, :, :], scores, NEVER), v)

    def _join(self, x: jax.Array) -> jax.Array:
        """[..., n, K, W, C] to [..., K, n W, C]."""
        *rest, n, K, W, C = x.shape
        return jnp.moveaxis(x, -4, -3).reshape(*rest, K, n * W, C)


def _count_from(first: jax.Array, count: int) -> jax.Array:
    """[..., count] from each of ``first`` on."""
    return first[..., None] + jnp.arange(count, dtype=jnp.int32).reshape(*(1,) * first.ndim, count)


def _block(keys: int, page_tokens: int) -> int:
    """Whole pages of about so many keys."""
    return max(keys // page_tokens, 1) * page_tokens


def _singles(reader: _Reader, q_DKGC: jax.Array, *, batch_invariant: bool) -> jax.Array:
    """The output [D, K, G, C] of sequences with one new token each, their last."""
    D, W, batch = len(q_DKGC), reader.batch.page_tokens, reader.batch
    shared, lone = _block(_SHARED_KEYS, W), _block(_LONE_KEYS, W)
    last_D = batch.lengths_N[:D] - 1
    start_D = reader.first_seen(last_D) // shared * shared
    blocks_D = (last_D - start_D) // shared + 1
    common = jnp.sort(blocks_D)[-1 if batch_invariant else D // 2]
    every_D = jnp.arange(D, dtype=jnp.int32)

    def seen(sequences: jax.Array, first: jax.Array, keys: int) -> jax.Array:
        key, last = _count_from(first, keys), last_D[sequences][..., None]
        return ((key <= last) & (key >= reader.first_seen(last)))[..., None, :]

    def side_by_side(j: jax.Array, softmax: RunningSoftmax) -> RunningSoftmax:
        first_D = start_D + j * shared
        k, v = reader.gather(every_D, first_D, shared)
        return reader.add(softmax, q_DKGC, k, v, seen(every_D, first_D, shared))

    found = lax.fori_loop(jnp.int32(0), common, side_by_side, RunningSoftmax.nothing(q_DKGC.shape, reader.sums))
    longest_first_D = jnp.argsort(-blocks_D).astype(jnp.int32)

    def one_by_one(i: jax.Array, found: RunningSoftmax) -> RunningSoftmax:
        row = longest_first_D[i]
        q_KGC, own = q_DKGC[row], RunningSoftmax(*(x[row] for x in found))
        start = start_D[row] + common * shared

        def block(j: jax.Array, own: RunningSoftmax) -> RunningSoftmax:
            first = start + j * lone
            k, v = reader.gather(row, first, lone)
            return reader.add(own, q_KGC, k, v, seen(row, first, lone))

        own = lax.fori_loop(jnp.int32(0), (last_D[row] - start) // lone + 1, block, own)
        return RunningSoftmax(
            *(lax.dynamic_update_index_in_dim(x, value, row, 0) for x, value in zip(found, own, strict=True))
        )

    n_long = jnp.sum(blocks_D > common, dtype=jnp.int32)
    found = lax.fori_loop(jnp.int32(0), n_long, one_by_one, found)
    return (found.out / found.total[..., None]).astype(reader.dtype)


def _runs(reader: _Reader, q_TKGC: jax.Array) -> jax.Array:
    """The output [T, K, G, C] of the sequences behind the singles, whose tokens these are."""
    (T, K, G, C), batch, D = q_TKGC.shape, reader.batch, reader.batch.singles
    size, keys = min(_RUN_QUERIES, T, batch.longest or T), _block(_RUN_KEYS, batch.page_tokens)
    q_TKGC = jnp.pad(q_TKGC, ((0, size), (0, 0), (0, 0), (0, 0)))

    def run(n: jax.Array, out_TKGC: jax.Array) -> jax.Array:
        start, end, length = batch.starts_O[n] - D, batch.starts_O[n + 1] - D, batch.lengths_N[n]

        def queries(a: jax.Array, out_TKGC: jax.Array) -> jax.Array:
            at = start + a * size
            q_QKGC = lax.dynamic_slice_in_dim(q_TKGC, at, size)
            q_KXC = jnp.einsum("QKGC->KGQC", q_QKGC).reshape(K, G * size, C)
            position_X = jnp.tile(length - (end - at) + jnp.arange(size, dtype=jnp.int32), G)
            final = jnp.minimum(position_X[-1], length - 1)
            first = reader.first_seen(position_X[0]) // keys * keys

            def block(j: jax.Array, softmax: RunningSoftmax) -> RunningSoftmax:
                begin = first + j * keys
                k, v = reader.gather(n, begin, keys)
                key_S = _count_from(begin, keys)[None, :]
                seen_XS = (key_S <= position_X[:, None]) & (key_S >= reader.first_seen(position_X)[:, None])
                return reader.add(softmax, q_KXC, k, v, seen_XS)

            found = lax.fori_loop(
                jnp.int32(0), (final - first) // keys + 1, block, RunningSoftmax.nothing(q_KXC.shape, reader.sums)
            )
            # What a block gives behind its run is given again by the next run.
            total = jnp.where(found.total == 0.0, 1.0, found.total)
            o_KXC = (found.out / total[..., None]).astype(reader.dtype)
            o_QKGC = jnp.einsum("KGQC->QKGC", o_KXC.reshape(K, G, size, C))
            return lax.dynamic_update_slice_in_dim(out_TKGC, o_QKGC, at, axis=0)

        return lax.fori_loop(jnp.int32(0), -(-(end - start) // size), queries, out_TKGC)

    return lax.fori_loop(jnp.int32(D), batch.count, run, jnp.zeros_like(q_TKGC))[:T]

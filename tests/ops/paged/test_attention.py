"""Laws of paged attention: whatever lies where, each token sees its own sequence up to itself."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgejax.ops.paged.attention import copy_page, paged_attention, pick_paged_kernel
from forgejax.ops.paged.batch import NOBODY, PagedBatch
from forgejax.ops.paged.dense import dense_paged_attention

LAYERS, LAYER, PAGES, W, M, K, H, C, N, T = 2, 1, 200, 4, 48, 2, 4, 8, 5, 40
KERNEL = pick_paged_kernel("cpu")


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Case:
    """Sequences of (tokens in the pool, new tokens), in pages dealt at random; the first ``singles`` have one each."""

    def __init__(self, sequences: list[tuple[int, int]], singles: int, seed: int = 0):
        deal = np.random.default_rng(seed).permutation(np.arange(1, PAGES))
        self.tables, self.lengths, self.starts = np.zeros((N, M), np.int32), np.ones(N, np.int32), [0]
        for n, (old, new) in enumerate(sequences):
            self.lengths[n] = old + new
            used = -(-(old + new) // W)
            self.tables[n, :used], deal = deal[:used], deal[used:]
            self.starts.append(self.starts[-1] + new)
        self.starts += [self.starts[-1]] * (N + 1 - len(self.starts))
        self.batch = PagedBatch(
            tables_NM=jnp.asarray(self.tables),
            lengths_N=jnp.asarray(self.lengths),
            starts_O=jnp.asarray(self.starts, jnp.int32),
            count=jnp.int32(len(sequences)),
            singles=singles,
            page_tokens=W,
        )
        self.sequence = np.repeat(np.arange(len(sequences)), [new for _, new in sequences])
        self.position = np.concatenate([np.arange(old, old + new) for old, new in sequences])

    def rows(self, pool: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values [N, S, K, C] as the tables say they lie."""
        held = np.asarray(pool)[LAYER][self.tables]  # N M 2 K W C
        k, v = (np.moveaxis(held[:, :, half], 2, 3).reshape(N, M * W, K, C) for half in (0, 1))
        return k, v


_SINGLE = st.tuples(st.integers(0, 180), st.just(1))
_RUN = st.tuples(st.integers(0, 150), st.integers(1, 12))


@jax.jit
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, pool: jax.Array, batch: PagedBatch) -> tuple[jax.Array, ...]:
    return paged_attention(q, k, v, pool, jnp.int32(LAYER), batch=batch, kernel=KERNEL)


@jax.jit
def _attend_window(q: jax.Array, k: jax.Array, v: jax.Array, pool: jax.Array, batch: PagedBatch) -> jax.Array:
    return paged_attention(q, k, v, pool, jnp.int32(LAYER), batch=batch, kernel=KERNEL, window=21)[0]


_DENSE = {window: jax.jit(functools.partial(dense_paged_attention, window=window)) for window in (None, 21)}


@given(st.lists(_SINGLE, min_size=2, max_size=2), st.lists(_RUN, max_size=3), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_rows_that_decode_and_chunks_of_prompts_in_one_call_equal_the_dense_mask(
    singles: list[tuple[int, int]], runs: list[tuple[int, int]], seed: int
) -> None:
    case = Case([*singles, *runs], 2, seed)
    pool = jnp.asarray(_normal(1, LAYERS, PAGES, 2, K, W, C))
    q, k, v = (jnp.asarray(_normal(seed, T, heads, C)) for seed, heads in ((2, H), (3, K), (4, K)))
    out, after = _attend(q, k, v, pool, case.batch)
    n_new = len(case.sequence)
    keys, values = case.rows(after)
    for rows, new in ((keys, k), (values, v)):
        np.testing.assert_array_equal(rows[case.sequence, case.position], new[:n_new])
    written = np.zeros((LAYERS, PAGES, W), bool)
    written[LAYER, case.tables[case.sequence, case.position // W], case.position % W] = True
    changed = (np.asarray(after) != np.asarray(pool)).any(axis=(2, 3, 5))
    np.testing.assert_array_equal(changed, written)  # of the sequences, and nothing else
    for window, found in ((None, out), (21, _attend_window(q, k, v, pool, case.batch))):
        at = (np.pad(x, (0, T - n_new)).astype(np.int32) for x in (case.sequence, case.position))
        expected = _DENSE[window](q, *map(jnp.asarray, (keys, values, *at)))
        np.testing.assert_allclose(found[:n_new], expected[:n_new], atol=2e-6)


def test_in_bf16_a_query_has_the_same_bits_whoever_is_beside_it() -> None:
    shape = {"layers": LAYERS, "pages": PAGES, "page_tokens": W, "kv_heads": K, "head_size": C}
    bits = _normal(1, LAYERS, PAGES, 2, K, W, C)
    pool = KERNEL.make_pool(**shape, dtype="bfloat16")
    assert pool.dtype == jnp.uint16 and pool.shape == bits.shape
    pool = jax.lax.bitcast_convert_type(jnp.asarray(bits, jnp.bfloat16), pool.dtype)
    q, k, v = (jnp.asarray(_normal(seed, T, heads, C), jnp.bfloat16) for seed, heads in ((2, H), (3, K), (4, K)))
    alone = Case([(170, 1), (0, 1)], 2)
    beside = Case([(170, 1), (169, 1), (30, 9)], 2)
    as_run = Case([(169, 2)], 0)  # its last token's query is the second of a run
    one, other = (_attend(q, k, v, pool, case.batch)[0] for case in (alone, beside))
    np.testing.assert_array_equal(one[0], other[0])
    # The run's first token writes what lies in the pool already, so that both sequences are the same.
    held_2KC = jnp.asarray(bits, jnp.bfloat16)[LAYER, as_run.tables[0, 169 // W], :, :, 169 % W]
    q, k, v = (jnp.stack([first, x[0], *x[2:]]) for first, x in ((q[1], q), (held_2KC[0], k), (held_2KC[1], v)))
    np.testing.assert_array_equal(_attend(q, k, v, pool, as_run.batch)[0][1], one[0])


def test_a_page_is_copied_in_all_layers_and_no_other_changes() -> None:
    pool = jnp.asarray(_normal(1, LAYERS, PAGES, 2, K, W, C))
    after = np.asarray(jax.jit(copy_page)(pool, jnp.int32(7), jnp.int32(9)))
    expected = np.array(pool)
    expected[:, 9] = expected[:, 7]
    np.testing.assert_array_equal(after, expected)


def test_what_is_written_for_nobody_is_dropped_and_pages_that_hold_nan_harm_no_one() -> None:
    case = Case([(9, 1), (0, 1)], 2)
    pool = _normal(1, LAYERS, PAGES, 2, K, W, C)
    spoilt = pool.copy()
    spoilt[LAYER, case.tables[0, 2], :, :, 2:] = np.nan  # behind the tenth token
    q, k, v = (jnp.asarray(_normal(seed, T, heads, C)) for seed, heads in ((2, H), (3, K), (4, K)))
    (out, _), (expected, after) = (_attend(q, k, v, jnp.asarray(x), case.batch) for x in (spoilt, pool))
    np.testing.assert_array_equal(out[:2], expected[:2])
    np.testing.assert_array_equal(after[:, NOBODY], pool[:, NOBODY])


def test_impossible_heads_windows_and_platforms_are_refused_in_a_sentence() -> None:
    case, pool = Case([(0, 1)], 1), jnp.zeros((LAYERS, PAGES, 2, K, W, C))
    q, k = jnp.zeros((T, H, C)), jnp.zeros((T, K, C))
    with pytest.raises(ValueError, match="3 query heads over 2 key heads"):
        paged_attention(q[:, :3], k, k, pool, jnp.int32(0), batch=case.batch, kernel=KERNEL)
    with pytest.raises(ValueError, match="a window of 0 tokens"):
        paged_attention(q, k, k, pool, jnp.int32(0), batch=case.batch, kernel=KERNEL, window=0)
    with pytest.raises(ValueError, match="no paged attention kernel for platform 'abacus'"):
        pick_paged_kernel("abacus")

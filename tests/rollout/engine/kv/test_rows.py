"""Laws of contiguous rows, beside a dense softmax in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from forgejax.rollout.engine.kv.rows import KVRows, make_rows
from tests.rollout import tiny

LAYER, B, Q, H, K, T, C = 1, 2, 3, 4, 2, 128, 4


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _filled_rows(rows: int) -> KVRows:
    shape = make_rows(tiny.POLICY, rows, T).k_LBKTC.shape
    assert shape == (2, rows, K, T, C)
    return KVRows(k_LBKTC=jnp.asarray(_normal(1, *shape)), v_LBKTC=jnp.asarray(_normal(2, *shape)))


def test_each_query_sees_its_row_up_to_itself_and_other_rows_and_layers_stay_as_they_were() -> None:
    memory, positions_BQ = _filled_rows(3), np.array([[0, 1, 2], [69, 70, 71]], np.int32)
    q, k, v = _normal(3, B, Q, H, C), _normal(4, B, Q, K, C), _normal(5, B, Q, K, C)
    attend = memory.attend(jnp.asarray(positions_BQ), jnp.int32(72))
    out, after = jax.jit(attend)(jnp.int32(LAYER), *map(jnp.asarray, (q, k, v)), memory)
    k_LBKTC, v_LBKTC = np.array(memory.k_LBKTC), np.array(memory.v_LBKTC)
    for row in range(B):
        k_LBKTC[LAYER, row, :, positions_BQ[row]], v_LBKTC[LAYER, row, :, positions_BQ[row]] = k[row], v[row]
        for query, head in np.ndindex(Q, H):
            seen = slice(0, positions_BQ[row, query] + 1)
            keys, values = (x[LAYER, row, head // 2, seen].astype(np.float64) for x in (k_LBKTC, v_LBKTC))
            weights = np.exp(keys @ q[row, query, head] / np.sqrt(C))
            np.testing.assert_allclose(out[row, query, head], weights @ values / weights.sum(), atol=1e-5)
    np.testing.assert_array_equal(after.k_LBKTC, k_LBKTC)
    np.testing.assert_array_equal(after.v_LBKTC, v_LBKTC)


def test_what_stands_beyond_a_row_is_not_written() -> None:
    memory = _filled_rows(1)
    attend = memory.attend(jnp.array([[126, 127, 128]]), jnp.int32(T))
    q, k, v = _normal(3, 1, Q, H, C), _normal(4, 1, Q, K, C), _normal(5, 1, Q, K, C)
    _, after = jax.jit(attend)(jnp.int32(0), *map(jnp.asarray, (q, k, v)), memory)
    np.testing.assert_array_equal(after.k_LBKTC[0, 0, :, 126:], np.swapaxes(k[0, :2], 0, 1))
    np.testing.assert_array_equal(after.k_LBKTC[0, 0, :, :126], memory.k_LBKTC[0, 0, :, :126])


def test_an_inserted_row_replaces_one_and_no_other() -> None:
    memory, one = _filled_rows(3), _filled_rows(1)
    after = memory.insert(one, jnp.int32(1))
    for new, old, given in ((after.k_LBKTC, memory.k_LBKTC, one.k_LBKTC), (after.v_LBKTC, memory.v_LBKTC, one.v_LBKTC)):
        np.testing.assert_array_equal(new[:, 1:2], given)
        np.testing.assert_array_equal(new[:, ::2], old[:, ::2])

"""Laws of the pool of pages."""

from __future__ import annotations

import jax
import numpy as np

from forgejax.rollout.engine.kv.pages import PagePool
from forgejax.rollout.engine.kv.rows import KVRows
from tests.rollout import tiny


def test_pages_come_back_as_the_beginning_of_a_row_and_the_rest_is_zero() -> None:
    engine = tiny.engine()
    pool = PagePool(tiny.POLICY, engine.config, engine.device)
    shape = (2, 3, 2, engine.config.row_tokens, 4)
    k_LBKTC, v_LBKTC = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    rows = KVRows(**jax.device_put({"k_LBKTC": k_LBKTC, "v_LBKTC": v_LBKTC}, engine.device))
    pool.save(rows, 1, {0: 7, 2: 5})  # pages of four tokens
    pool.save(rows, 2, {1: 6})
    pool.save(rows, 0, {})
    found = pool.load([7, 6, 5])
    for loaded, given in ((found.k_LBKTC, k_LBKTC), (found.v_LBKTC, v_LBKTC)):
        expected = np.zeros((2, 1, *shape[2:]), np.float32)
        expected[:, 0, :, 0:4] = given[:, 1, :, 0:4]
        expected[:, 0, :, 4:8] = given[:, 2, :, 4:8]
        expected[:, 0, :, 8:12] = given[:, 1, :, 8:12]
        np.testing.assert_array_equal(loaded, expected)

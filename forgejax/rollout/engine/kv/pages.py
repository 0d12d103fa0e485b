"""The device memory behind the prefix cache: a pool of KV pages, copied into and out of contiguous rows."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from forgejax.models import PolicyConfig
from forgejax.rollout.engine.config import EngineConfig
from forgejax.rollout.engine.kv.rows import KVRows, stored_dtype

# Dimension key beside the usual one: P pages of the pool, N pages of a row, W tokens of a page.


class PagePool:
    """KV pages on one device. Which page holds what is the prefix cache's business; one thread uses it."""

    def __init__(self, policy: PolicyConfig, config: EngineConfig, device: jax.Device):
        self._row_pages, self._page_tokens, self._device = config.row_pages, config.page_tokens, device
        self._capacity = config.cache_pages
        shape = (
            config.cache_pages,
            policy.num_layers,
            policy.num_kv_heads,
            config.page_tokens,
            policy.head_size,
        )
        with jax.default_device(device):
            self._pages = tuple(jax.device_put(jnp.zeros(shape, stored_dtype(policy)), device) for _ in "kv")

    def load(self, pages: Sequence[int]) -> KVRows:
        """One new row that begins with these pages; the rest of it is zero."""
        return _load(self._pages, self._put_indices(dict(enumerate(pages))))

    def save(self, rows: KVRows, row: int, fresh: Mapping[int, int]) -> None:
        """Copies pages of a row into the pool: {index of the page in the row: page of the pool}."""
        if fresh:
            self._pages = _save(self._pages, rows, np.int32(row), self._put_indices(fresh))

    def _put_indices(self, chosen: Mapping[int, int]) -> jax.Array:
        indices_N = np.full(self._row_pages, self._capacity, np.int32)  # one past the pool: neither read nor written
        for index, page in chosen.items():
            indices_N[index] = page
        return jax.device_put(indices_N, self._device)


@jax.jit
def _load(pages: tuple[jax.Array, ...], indices_N: jax.Array) -> KVRows:
    def one(pages_PLKWC: jax.Array) -> jax.Array:
        found_NLKWC = pages_PLKWC.at[indices_N].get(mode="fill", fill_value=0)
        N, L, K, W, C = found_NLKWC.shape
        return jnp.einsum("NLKWC->LKNWC", found_NLKWC).reshape(L, 1, K, N * W, C)

    k_LBKTC, v_LBKTC = map(one, pages)
    return KVRows(k_LBKTC=k_LBKTC, v_LBKTC=v_LBKTC)


@functools.partial(jax.jit, donate_argnums=0)
def _save(pages: tuple[jax.Array, ...], rows: KVRows, row: jax.Array, indices_N: jax.Array) -> tuple[jax.Array, ...]:
    N = indices_N.shape[0]

    def one(pages_PLKWC: jax.Array, x_LBKTC: jax.Array) -> jax.Array:
        x_LKTC = jax.lax.dynamic_index_in_dim(x_LBKTC, row, axis=1, keepdims=False)
        L, K, T, C = x_LKTC.shape
        split_NLKWC = jnp.einsum("LKNWC->NLKWC", x_LKTC.reshape(L, K, N, T // N, C))
        return pages_PLKWC.at[indices_N].set(split_NLKWC, mode="drop")

    return tuple(map(one, pages, (rows.k_LBKTC, rows.v_LBKTC)))

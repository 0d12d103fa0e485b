"""Laws of the device programs over any ``PagedKernel``: here one with the plainest attention there is."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from forgejax.ops.paged.attention import PagedKernel, pick_paged_kernel
from forgejax.ops.paged.batch import NOBODY, PagedBatch, TokenPlaces
from forgejax.ops.paged.dense import dense_paged_attention
from forgejax.rollout.engine.programs import Programs
from forgejax.rollout.engine.settings import SlotSettings, split_draws
from forgejax.rollout.engine.slots import Slots
from tests.rollout import tiny


@dataclasses.dataclass(frozen=True)
class PlainKernel:
    """Keys and values as [layers, pages, tokens, heads, size]; one softmax over all that a sequence's table names."""

    def make_pool(
        self, *, layers: int, pages: int, page_tokens: int, kv_heads: int, head_size: int, dtype: Any
    ) -> tuple[jax.Array, jax.Array]:
        k, v = (jnp.zeros((layers, pages, page_tokens, kv_heads, head_size), dtype) for _ in "kv")
        return k, v

    def write(self, pool: Any, layer: jax.Array, k_TKC: jax.Array, v_TKC: jax.Array, places: TokenPlaces) -> Any:
        page_T = jnp.where(places.page_T == NOBODY, pool[0].shape[1], places.page_T)
        return tuple(
            x.at[layer, page_T, places.offset_T].set(new, mode="drop")
            for x, new in zip(pool, (k_TKC, v_TKC), strict=True)
        )

    def attend(
        self, q_THC: jax.Array, pool: Any, layer: jax.Array, batch: PagedBatch, *, window: int | None
    ) -> jax.Array:
        N, M = batch.tables_NM.shape
        k, v = (x[layer][batch.tables_NM].reshape(N, M * batch.page_tokens, *x.shape[3:]) for x in pool)
        at_T = jnp.arange(len(q_THC))
        sequence_T = jnp.minimum(jnp.sum(at_T[:, None] >= batch.starts_O[None, 1:], axis=1), N - 1)
        position_T = batch.place_tokens(len(q_THC)).position_T
        return dense_paged_attention(q_THC, k, v, sequence_T, position_T, window=window)


def _draw(kernel: PagedKernel) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and log-probs of a prompt of 13 tokens, fed in two chunks and decoded in slot 2 of 4."""
    config, ids = tiny.engine().config, tiny.prompt(5, 13)
    programs = Programs(
        policy=tiny.POLICY, kernel=kernel, layout=tiny.LAYOUT, page_tokens=config.page_tokens, tokens_per_step=2
    )
    slots = Slots(programs, config)
    weights = tiny.engine().load_params(tiny.params()).current
    assert slots.begin(2, ids) is not None
    for end in (8, 12):
        start = 0 if end == 8 else 8
        assert slots.extend(weights, 2, ids[:end], start) == end - start
    slots.start(2, int(ids[-1]), 12, SlotSettings(budget=20, seed=3))
    runs = []
    for step in range(4):
        assert slots.grow(2, 14 + 2 * step)
        runs += list(split_draws(slots.generate(weights, 4), [2]))
    return np.concatenate([run.token_ids for run in runs]), np.concatenate([run.logprobs for run in runs])


def test_the_programs_draw_the_same_over_the_kernel_of_the_platform_and_over_another() -> None:
    tokens, logprobs = _draw(pick_paged_kernel("cpu"))
    other_tokens, other_logprobs = _draw(PlainKernel())
    np.testing.assert_array_equal(tokens, other_tokens)
    np.testing.assert_allclose(logprobs, other_logprobs, atol=1e-5)
    expected = tiny.dense_logprobs(tiny.params(), tiny.prompt(5, 13), tokens, SlotSettings(budget=1).law)
    np.testing.assert_allclose(logprobs, expected, atol=1e-5)

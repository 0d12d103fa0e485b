"""Which new tokens belong to which sequence, and in which pages each sequence lies."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

NOBODY = 0
"""The page of no sequence: what is written to it is dropped, and what a query reads in it is arbitrary but finite."""


class TokenPlaces(NamedTuple):
    """Where each new token stands in its sequence, and where its keys and values go; padding goes to ``NOBODY``."""

    position_T: jax.Array
    page_T: jax.Array
    offset_T: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["tables_NM", "lengths_N", "starts_O", "count"],
    meta_fields=["singles", "page_tokens", "longest"],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedBatch:
    """Sequences of a batch and their new tokens, which lie one run after another among T; what follows is padding.

    Runs lie as ``jax.experimental.pallas.ops.tpu.ragged_paged_attention`` takes them (``lengths_N`` is its ``kv_lens``,
    ``starts_O`` its ``cu_q_lens``), so that rows that decode and chunks of prompts go through one call.

    Attributes:
        tables_NM: the page that holds tokens [m W, (m + 1) W) of each sequence; ``NOBODY`` where there is none.
        lengths_N: tokens of each sequence, the new ones included; at least 1.
        starts_O: [N + 1] where each run begins; the last one is where the last run ends.
        count: how many of the N sequences there are, the first ones.
        singles: the first so many sequences have one new token each, whatever ``count``.
        page_tokens: W.
        longest: no run has more tokens, where that is known; it bounds what a backend makes room for.
    """

    tables_NM: Int[Array, "N M"]
    lengths_N: Int[Array, " N"]
    starts_O: Int[Array, " O"]
    count: Int[Array, ""]
    singles: int
    page_tokens: int
    longest: int | None = None

    def place_tokens(self, tokens: int) -> TokenPlaces:
        """Of each of T tokens; padding stands at position 0."""
        at_T = jnp.arange(tokens, dtype=jnp.int32)
        N, M = self.tables_NM.shape
        sequence_T = jnp.sum(at_T[:, None] >= self.starts_O[None, 1:], axis=1)
        real_T = sequence_T < jnp.maximum(self.count, self.singles)
        sequence_T = jnp.minimum(sequence_T, N - 1)
        position_T = self.lengths_N[sequence_T] - (self.starts_O[sequence_T + 1] - at_T)
        position_T = jnp.where(real_T, position_T, 0)
        index_T = position_T // self.page_tokens
        page_T = self.tables_NM[sequence_T, jnp.minimum(index_T, M - 1)]
        return TokenPlaces(
            position_T=position_T,
            page_T=jnp.where(real_T & (index_T < M), page_T, NOBODY),
            offset_T=position_T % self.page_tokens,
        )

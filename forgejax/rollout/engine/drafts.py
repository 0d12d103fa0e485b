"""Drafts: tokens that may come next, checked all at once. What is drawn is what would be drawn one by one.

Each place of a draft is drawn from the true law with the sequence's own key. A drafted token counts if it is the very
token that is drawn there, and what is drawn behind one that is not is thrown away.

Dimension key: S slots, D drafted tokens of a slot at most, X = D + 1 places that are drawn, T tokens fed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class Drafts:
    """For each slot the ids that may come next, the first ``count_S`` of them."""

    ids_SD: jax.Array
    count_S: jax.Array


class FedDrafts(NamedTuple):
    """The slots' waiting tokens and drafts as runs, one behind another: how many tokens each slot feeds, and where."""

    tokens_T: jax.Array
    count_S: jax.Array
    starts_O: jax.Array
    row_SX: jax.Array


def lay_drafts(drafts: Drafts, token_S: jax.Array, most_S: jax.Array) -> FedDrafts:
    """The runs of slots that feed ``token_S`` and then their drafts, ``most_S`` tokens at most and one at least."""
    fed_SX = jnp.concatenate([token_S[:, None], drafts.ids_SD], axis=1)
    S, X = fed_SX.shape
    count_S = jnp.clip(drafts.count_S + 1, 1, jnp.maximum(most_S, 1))
    starts_O = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count_S, dtype=jnp.int32)])
    place_X = jnp.arange(X, dtype=jnp.int32)
    row_SX = starts_O[:-1, None] + place_X[None]
    real_SX = place_X[None] < count_S[:, None]
    tokens_T = jnp.zeros(S * X, jnp.int32).at[jnp.where(real_SX, row_SX, S * X)].set(fed_SX, mode="drop")
    return FedDrafts(tokens_T, count_S, starts_O, jnp.minimum(row_SX, S * X - 1))


def count_drawn(drafts: Drafts, fed_S: jax.Array, token_SX: jax.Array, stopped_SX: jax.Array) -> jax.Array:
    """How many of the tokens drawn at all places of a slot count: those up to the first that was not drafted, or that
    ends its generation."""
    place_D = jnp.arange(drafts.ids_SD.shape[1])
    goes_on_SD = (drafts.ids_SD == token_SX[:, :-1]) & ~stopped_SX[:, :-1] & (place_D[None] < fed_S[:, None] - 1)
    return 1 + jnp.cumprod(goes_on_SD.astype(jnp.int32), axis=1).sum(axis=1)

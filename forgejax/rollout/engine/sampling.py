"""Drawing tokens from a sampling law, each slot with its own law and its own random stream."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True, eq=False)
class Laws:
    """One sampling law per slot: ``types.SamplingLaw`` as arrays, and the slot's random key (two words).

    Token ``biased_SN`` has ``bias_SN`` added to its logit; -1 is none.
    """

    temperature_S: jax.Array
    top_p_S: jax.Array
    top_k_S: jax.Array
    min_p_S: jax.Array
    biased_SN: jax.Array
    bias_SN: jax.Array
    key_S2: jax.Array


def draw_tokens(
    logits_SV: jax.Array, laws: Laws, positions_S: jax.Array, mask_SW: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Draws one token per slot; returns ids and log-probs [S].

    The log-prob is that of the whole softmax((logits + bias) / temperature), without the truncation of top_k, top_p and
    min_p; at temperature 0 the most likely token is taken and the log-prob is that of temperature 1. A draw depends on
    the slot's logits, law, key, position and mask alone, never on its neighbours.

    ``mask_SW``: token t may be drawn where bit t % 32 of word t // 32 is set, at least one for each slot. All of this
    is then said of the logits of those tokens alone.
    """
    logits_SV = _add_bias(logits_SV.astype(jnp.float32), laws)
    if mask_SW is not None:
        logits_SV = jnp.where(_unpack_bits(mask_SW, logits_SV.shape[-1]), logits_SV, -jnp.inf)
    greedy_S = laws.temperature_S == 0.0
    scale_S = jnp.where(greedy_S, 1.0, laws.temperature_S)
    # The largest logit is taken off first, which makes it exactly 0 at any temperature: near 0 its rounding error
    # would otherwise be divided into an infinite log-prob.
    logits_SV = logits_SV - logits_SV.max(axis=-1, keepdims=True)
    logp_SV = jax.nn.log_softmax(logits_SV / scale_S[:, None], axis=-1)
    truncated_S = (laws.top_k_S > 0) | (laws.top_p_S < 1.0)
    # Sorting the vocabulary costs more than the rest of the draw; nothing in training needs it.
    weight_SV = jax.lax.cond(
        jnp.any(truncated_S & ~greedy_S),
        lambda: jnp.where(_mark_kept(logp_SV, laws), jnp.exp(logp_SV), 0.0),
        lambda: jnp.exp(logp_SV),
    )
    least_S = logp_SV.max(axis=-1) + jnp.log(laws.min_p_S)  # -inf where min_p is off
    weight_SV = jnp.where(logp_SV >= least_S[:, None], weight_SV, 0.0)
    sampled_S = _choose(weight_SV, _draw_uniforms(laws.key_S2, positions_S))
    token_S = jnp.where(greedy_S, jnp.argmax(logp_SV, axis=-1), sampled_S).astype(jnp.int32)
    return token_S, jnp.take_along_axis(logp_SV, token_S[:, None], axis=-1)[:, 0]


def _add_bias(logits_SV: jax.Array, laws: Laws) -> jax.Array:
    def add(logits_V: jax.Array, biased_N: jax.Array, bias_N: jax.Array) -> jax.Array:
        at_N = jnp.where(biased_N < 0, logits_V.size, biased_N)  # an index below 0 would count from the end
        return logits_V.at[at_N].add(bias_N, mode="drop")

    biased = jnp.any(laws.biased_SN >= 0)
    return jax.lax.cond(biased, lambda: jax.vmap(add)(logits_SV, laws.biased_SN, laws.bias_SN), lambda: logits_SV)


def _unpack_bits(mask_SW: jax.Array, vocab_size: int) -> jax.Array:
    bits_SW32 = (mask_SW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)[None, None, :]) & 1
    return bits_SW32.reshape(len(mask_SW), -1)[:, :vocab_size] == 1


def _draw_uniforms(key_S2: jax.Array, positions_S: jax.Array) -> jax.Array:
    """Two uniforms in [0, 1) per slot, fixed by its key and the position to be drawn."""

    def one(key_2: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key_2), position), (2,))

    return jax.vmap(one)(key_S2, positions_S)


def _choose(weight_SV: jax.Array, uniform_S2: jax.Array) -> jax.Array:
    """An index drawn in proportion to its weight: first a block of the vocabulary, then a token inside it.

    Two draws over about sqrt(V) entries each keep the FP32 error of the cumulative sums, and the 2^-23 grid of the
    uniforms, far below the probability of rare tokens; one draw over a large vocabulary would not.
    """
    S, V = weight_SV.shape
    width = 1 << math.ceil(math.log2(max(V, 2)) / 2)
    blocks = -(-V // width)
    weight_SBW = jnp.pad(weight_SV, ((0, 0), (0, blocks * width - V))).reshape(S, blocks, width)
    block_S = _invert(weight_SBW.sum(axis=-1), uniform_S2[:, 0])
    inside_SW = jnp.take_along_axis(weight_SBW, block_S[:, None, None], axis=1)[:, 0]
    return block_S * width + _invert(inside_SW, uniform_S2[:, 1])


def _invert(weight_SN: jax.Array, uniform_S: jax.Array) -> jax.Array:
    """The first index whose cumulative weight exceeds uniform x total: never one of weight 0."""
    cumulative_SN = jnp.cumsum(weight_SN, axis=-1)
    return jnp.argmax(cumulative_SN > (uniform_S * cumulative_SN[:, -1])[:, None], axis=-1)


def _mark_kept(logp_SV: jax.Array, laws: Laws) -> jax.Array:
    """Which tokens a truncated law may draw: the top_k, and of those (renormalised) the fewest whose mass is top_p.

    Tokens that tie with the last one kept are kept as well.
    """
    V = logp_SV.shape[-1]
    sorted_SV = -jnp.sort(-logp_SV, axis=-1)
    k_S = jnp.where(laws.top_k_S > 0, jnp.minimum(laws.top_k_S, V), V)
    mass_SV = jnp.where(jnp.arange(V)[None, :] < k_S[:, None], jnp.exp(sorted_SV), 0.0)
    cumulative_SV = jnp.cumsum(mass_SV, axis=-1)
    before_SV = cumulative_SV - mass_SV
    count_S = jnp.sum((before_SV < laws.top_p_S[:, None] * cumulative_SV[:, -1:]) & (mass_SV > 0.0), axis=-1)
    least_S1 = jnp.take_along_axis(sorted_SV, jnp.maximum(count_S, 1)[:, None] - 1, axis=-1)
    return logp_SV >= least_S1

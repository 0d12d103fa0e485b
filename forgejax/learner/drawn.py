"""Log-probability of drawn tokens and entropy of the law they were drawn from, with one array kept for both."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@jax.custom_vjp
def drawn_logps(
    logits_BEV: Float[Array, "B E V"], drawn_BE: Int[Array, "B E"], temperature_BE: Float[Array, "B E"]
) -> tuple[Float[Array, "B E"], Float[Array, "B E"]]:
    """log p(drawn) and the entropy of ``p = softmax(logits / temperature)``; the logits' dtype.

    The gradient is that of the log-probability with respect to the logits: none flows through the entropy or to the
    temperature. The backward pass keeps the logits and computes p once more from them.
    """
    return _forward(logits_BEV, drawn_BE, temperature_BE)[0]


def _forward(logits: jax.Array, drawn: jax.Array, temperature: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Saved]:
    scaled = logits / temperature[..., None]
    top = scaled.max(axis=-1, keepdims=True)
    lifted = jnp.exp(scaled - top)
    total = lifted.sum(axis=-1, keepdims=True)
    norm = top + jnp.log(total)
    # A sum over a one-hot instead of a gather: it stays local where the vocabulary is split.
    logp = jnp.where(_is_drawn(logits, drawn), scaled, 0.0).sum(axis=-1) - norm[..., 0]
    entropy = (lifted * (norm - scaled)).sum(axis=-1) / total[..., 0]
    return (logp, entropy), (logits, drawn, temperature, norm)


def _backward(saved: Saved, d_out: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None, None]:
    logits, drawn, temperature, norm = saved
    probability = jnp.exp(logits / temperature[..., None] - norm)
    return (d_out[0] / temperature)[..., None] * (_is_drawn(logits, drawn) - probability), None, None


def _is_drawn(logits: jax.Array, drawn: jax.Array) -> jax.Array:
    return jnp.arange(logits.shape[-1])[None, None, :] == drawn[..., None]


drawn_logps.defvjp(_forward, _backward)

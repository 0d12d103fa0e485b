"""Softmax over blocks of keys, one after another, in the arithmetic that sampler and trainer share.

The running softmax of Milakov & Gimelshein 2018 (arXiv 1805.02867). The two sides cut the same keys into different
blocks, so the result must not depend on the cut, down to the bit that a bf16 policy rounds it at.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

_LN2 = math.log(2.0)
_LOWEST = -1e25  # below every score
NEVER = -1e30
"""The score of a key that is not seen, so far below that its weight is 0 even where no key was seen before."""


class RunningSoftmax(NamedTuple):
    """Sums over the keys so far, of queries [...]: not yet divided by ``total``, and relative to ``exp(top)``."""

    out: jax.Array  # [..., C]
    top: jax.Array
    total: jax.Array

    @staticmethod
    def nothing(shape: tuple[int, ...], dtype: DTypeLike) -> RunningSoftmax:
        """Of no keys yet, for queries of ``shape`` [..., C]."""
        return RunningSoftmax(
            out=jnp.zeros(shape, dtype), top=jnp.full(shape[:-1], _LOWEST, dtype), total=jnp.zeros(shape[:-1], dtype)
        )

    def add(self, scores: jax.Array, values: jax.Array) -> RunningSoftmax:
        """With the keys of ``scores`` [..., Q, S], of which those not seen are ``NEVER``, and ``values`` [..., S, C].

        Values of the scores' dtype are weighted in it. Weights of narrower ones are rounded to the values' dtype first,
        as matrix units want it, relative to a power of two: so a weight is rounded alike whatever came before it.
        """
        narrow = values.dtype != scores.dtype
        top = jnp.maximum(self.top, scores.max(axis=-1))
        top = round_up_top(top) if narrow else top
        weights, decay = jnp.exp(scores - top[..., None]), jnp.exp(self.top - top)
        precision = jax.lax.Precision.DEFAULT if narrow else jax.lax.Precision.HIGHEST
        weighted = jnp.matmul(
            weights.astype(values.dtype), values, precision=precision, preferred_element_type=scores.dtype
        )
        return RunningSoftmax(
            out=self.out * decay[..., None] + weighted, top=top, total=self.total * decay + weights.sum(axis=-1)
        )


def round_up_top(top: jax.Array) -> jax.Array:
    """The next multiple of ln 2, and never less than ``top``: weights relative to it differ by powers of two alone."""
    return jnp.maximum(jnp.ceil(top * (1.0 / _LN2)) * _LN2, top)

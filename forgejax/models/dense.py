"""Dense products and the gated activation, with gradients laid out for the matrix units.

Autodiff would give the same numbers. It would also write each weight gradient as a product whose left operand is the
transposed cotangent over two contracted dimensions, which XLA:CPU makes by running the elementwise pass once more,
strided; keep five arrays for a SwiGLU where its two inputs suffice; and sum over a dimension of [1, T, D], which
XLA:CPU does thirty times slower than over one of [T, D].
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from forgejax.ops.rounding import outer_products, precision_of, product, real_of, with_exact_sums
from forgejax.sharding import current_layout


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, weight: jax.Array, contracted: int = 1) -> jax.Array:
    """Contracts the last ``contracted`` dimensions of x with as many leading ones of the weight, in x's dtype."""
    return product(x, weight, contracted).astype(x.dtype)


def _linear_forward(x: jax.Array, weight: jax.Array, contracted: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return linear(x, weight, contracted), (x, weight)


def _linear_backward(contracted: int, saved: tuple[jax.Array, jax.Array], d_out: jax.Array) -> tuple[jax.Array, ...]:
    x, weight = saved
    shared = x.ndim - contracted
    last = tuple(range(shared, d_out.ndim)), tuple(range(contracted, weight.ndim))
    d_x = jnp.tensordot(
        d_out, weight, axes=last, precision=precision_of(weight.dtype), preferred_element_type=real_of(d_out)
    )
    return d_x.astype(x.dtype), _weight_gradient(x, d_out, shared).astype(weight.dtype)


def _weight_gradient(x: jax.Array, d_out: jax.Array, shared: int) -> jax.Array:
    """The product over the leading ``shared`` dimensions, which rows and tokens are, in FP32 (FP64)."""
    if not _length_is_split():  # else merging rows and tokens would gather the tokens
        x, d_out = (jnp.reshape(y, (-1, *y.shape[shared:])) for y in (x, d_out))
        shared = 1
    return outer_products(x, d_out, shared)


def _length_is_split() -> bool:
    return bool(current_layout().axes("length"))


linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def embed(table_VD: jax.Array, tokens: jax.Array) -> jax.Array:
    """The row of each token. Gradients of a repeated token add up in FP32 at least, then take the table's dtype."""
    return table_VD[tokens]


def _embed_forward(table_VD: jax.Array, tokens: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return table_VD[tokens], (table_VD, tokens)


def _embed_backward(saved: tuple[jax.Array, jax.Array], d_out: jax.Array) -> tuple[jax.Array, None]:
    table, tokens = saved
    wide = jnp.promote_types(table.dtype, jnp.float32)
    return jnp.zeros(table.shape, wide).at[tokens].add(d_out.astype(wide)).astype(table.dtype), None


embed.defvjp(_embed_forward, _embed_backward)


@jax.custom_vjp
def unembed(hidden: jax.Array, head_DV: jax.Array) -> jax.Array:
    """``hidden @ head`` at full precision, accumulated and given in FP32 (FP64 for FP64); both of one dtype."""
    return product(hidden, head_DV)


def _unembed_forward(hidden: jax.Array, head_DV: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return unembed(hidden, head_DV), (hidden, head_DV)


def _unembed_backward(saved: tuple[jax.Array, jax.Array], d_logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    hidden, head_DV = saved
    d_hidden, d_head_DV = unembed_gradients(hidden, head_DV, d_logits)
    return d_hidden.astype(hidden.dtype), d_head_DV.astype(head_DV.dtype)


unembed.defvjp(_unembed_forward, _unembed_backward)


def unembed_gradients(hidden: jax.Array, head_DV: jax.Array, d_logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients of both, in the logits' dtype: those of the head may be summed before they are rounded."""
    highest, wide = jax.lax.Precision.HIGHEST, d_logits.dtype
    d_hidden = jnp.tensordot(d_logits, head_DV.astype(wide), axes=((-1,), (1,)), precision=highest)
    return d_hidden, _weight_gradient(hidden.astype(wide), d_logits, hidden.ndim - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """Root-mean-square norm over the last axis in FP32 (Zhang & Sennrich 2019, arXiv 1910.07467), in x's dtype."""
    normed, _ = _normed(x, eps)
    return (normed * _widened(scale, normed)).astype(x.dtype)


def _normed(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    inverse = with_exact_sums(functools.partial(_inverse_root, eps), x)
    return x.astype(inverse.dtype) * inverse, inverse


def _inverse_root(eps: float, sums: Any, x: jax.Array) -> jax.Array:
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(sums)), axis=-1, keepdims=True) + eps)
    return inverse.astype(real_of(x))


def _widened(scale: jax.Array, normed: jax.Array) -> jax.Array:
    return jnp.expand_dims(scale.astype(normed.dtype), tuple(range(normed.ndim - 1)))


def _rms_norm_forward(x: jax.Array, scale: jax.Array, eps: float) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return rms_norm(x, scale, eps), (x, scale)


def _rms_norm_backward(eps: float, saved: tuple[jax.Array, jax.Array], d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale = saved
    normed, inverse = _normed(x, eps)
    d_out = d_out.astype(normed.dtype)
    d_normed = d_out * _widened(scale, normed)
    along = jnp.einsum("...D,...D->...", d_normed, normed)[..., None] / x.shape[-1]
    d_scale = (d_out * normed).sum(axis=tuple(range(x.ndim - 1)))
    return ((d_normed - normed * along) * inverse).astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@jax.custom_vjp
def silu_gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """``silu(gate) * up`` (SwiGLU, arXiv 2002.05202), taken in FP32 and rounded once.

    The backward pass keeps the two inputs and nothing else.
    """
    wide = real_of(gate)
    return (jax.nn.silu(gate.astype(wide)) * up.astype(wide)).astype(gate.dtype)


def _gated_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return silu_gated(gate, up), (gate, up)


def _gated_backward(saved: tuple[jax.Array, jax.Array], d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    dtype, wide = d_out.dtype, real_of(d_out)
    gate, up, d_out = (x.astype(wide) for x in (*saved, d_out))
    open_ = jax.nn.sigmoid(gate)
    return (d_out * up * open_ * (1 + gate * (1 - open_))).astype(dtype), (d_out * gate * open_).astype(dtype)


silu_gated.defvjp(_gated_forward, _gated_backward)

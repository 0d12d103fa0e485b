"""Dense products and the gated activation, with gradients laid out for the matrix units.

Autodiff would give the same numbers. It would also write each weight gradient as a product whose left operand is the
transposed cotangent over two contracted dimensions, which XLA:CPU makes by running the elementwise pass once more,
strided; keep five arrays for a SwiGLU where its two inputs suffice; and sum over a dimension of [1, T, D], which
XLA:CPU does thirty times slower than over one of [T, D].
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from forgejax.sharding import current_layout


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, weight: jax.Array, contracted: int = 1) -> jax.Array:
    """Contracts the last ``contracted`` dimensions of x with as many leading ones of the weight, in x's dtype."""
    return jnp.tensordot(x, weight, axes=contracted)


def _linear_forward(x: jax.Array, weight: jax.Array, contracted: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.tensordot(x, weight, axes=contracted), (x, weight)


def _linear_backward(contracted: int, saved: tuple[jax.Array, jax.Array], d_out: jax.Array) -> tuple[jax.Array, ...]:
    x, weight = saved
    shared = x.ndim - contracted
    last = tuple(range(shared, d_out.ndim)), tuple(range(contracted, weight.ndim))
    return jnp.tensordot(d_out, weight, axes=last), _weight_gradient(x, d_out, shared)


def _weight_gradient(
    x: jax.Array, d_out: jax.Array, shared: int, precision: jax.lax.Precision | None = None
) -> jax.Array:
    """The product over the leading ``shared`` dimensions, which rows and tokens are."""
    if not _length_is_split():  # else merging rows and tokens would gather the tokens
        x, d_out = (jnp.reshape(y, (-1, *y.shape[shared:])) for y in (x, d_out))
        shared = 1
    return jnp.tensordot(x, d_out, axes=(tuple(range(shared)),) * 2, precision=precision)


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
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    return jnp.tensordot(hidden, head_DV, axes=1, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide)


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
    return d_hidden, _weight_gradient(hidden.astype(wide), d_logits, hidden.ndim - 1, highest)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*B D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*B D"]:
    """Root-mean-square norm over the last axis in FP32 (Zhang & Sennrich 2019, arXiv 1910.07467), in x's dtype."""
    normed, _ = _normed(x, eps)
    return (normed * _widened(scale, normed)).astype(x.dtype)


def _normed(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return x32 * inverse, inverse


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
    """``silu(gate) * up`` (SwiGLU, arXiv 2002.05202); the backward pass keeps the two inputs and nothing else."""
    return jax.nn.silu(gate) * up


def _gated_forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jax.nn.silu(gate) * up, (gate, up)


def _gated_backward(saved: tuple[jax.Array, jax.Array], d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = saved
    open_ = jax.nn.sigmoid(gate)
    return d_out * up * open_ * (1 + gate * (1 - open_)), d_out * gate * open_


silu_gated.defvjp(_gated_forward, _gated_backward)

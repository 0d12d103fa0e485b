"""Where numbers are rounded: the rules that sampler and trainer share.

A policy in bf16 rounds each of its thousands of sums to 8 bits. If sampler and trainer differ in the last bit of a sum
before it is rounded, now and then they round it apart, by 2^-8 of it; within a few layers that has spread to every
number. So what is rounded must be the same bits on both sides, whatever the shapes: operands keep their dtype, sums are
FP32 and rounded once, where the program says so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

AS_WRITTEN: dict[str, Any] = {"xla_allow_excess_precision": False}
"""Compiler options of every program that runs a policy: a rounding is not left out where the compiler fuses what comes
before it with what comes after, as it does in one program and not in another."""


def real_of(*arrays: jax.Array) -> Any:
    """The dtype that products of these accumulate in: FP32, FP64 where one of them is FP64."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def precision_of(dtype: DTypeLike) -> jax.lax.Precision:
    """The precision that a product of such operands names.

    TPUs and GPUs multiply FP32 operands in bf16 or TF32 unless told otherwise. Narrow ones are multiplied exactly.
    """
    wide = jnp.dtype(dtype).itemsize >= 4
    return jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT


def with_exact_sums(function: Callable[..., Any], x: jax.Array, *others: Any) -> Any:
    """``function(dtype, x, *others)``, which sums in ``dtype`` what is then rounded to x's, where that is narrow.

    A CPU adds FP32 numbers in an order that depends on shapes and on what else the compiler fuses into the loop. In
    FP64 the order is nowhere to be seen in what is rounded, at little cost. Elsewhere, and where x is not narrow,
    it is FP32 (FP64 for FP64). ``others`` are pytrees of arrays. What ``function`` gives is FP32 at most.
    """

    def exactly(*arrays: Any) -> Any:
        with jax.enable_x64(True):
            return function(jnp.float64, *arrays)

    if jnp.dtype(x.dtype).itemsize >= 4:
        return function(real_of(x), x, *others)
    return jax.lax.platform_dependent(x, *others, cpu=exactly, default=functools.partial(function, jnp.float32))


def product(x: jax.Array, weight: jax.Array, contracted: int = 1) -> jax.Array:
    """Contracts the last ``contracted`` dimensions of x with as many leading ones of the weight, in FP32 (FP64).

    A row of x gives the same bits among any number of others. XLA:CPU has another routine for a single row, which adds
    in another order: a single narrow row is multiplied beside a copy of itself. Operands are of one dtype.
    """
    rows = x.shape[: x.ndim - contracted]
    single = math.prod(rows) == 1 and jnp.dtype(x.dtype).itemsize < 4
    operand = jnp.concatenate([x, x]) if single and rows else x
    out = jnp.tensordot(
        operand, weight, axes=contracted, precision=precision_of(x.dtype), preferred_element_type=real_of(x)
    )
    return out[:1] if single and rows else out


def outer_products(x: jax.Array, y: jax.Array, shared: int = 1) -> jax.Array:
    """Contracts the first ``shared`` dimensions of both, in FP32 (FP64): a gradient of weights."""
    wide = real_of(x, y)

    def contract(x: jax.Array, y: jax.Array) -> jax.Array:
        axes = (tuple(range(shared)),) * 2
        return jnp.tensordot(x, y, axes=axes, precision=precision_of(x.dtype), preferred_element_type=wide)

    def widened(x: jax.Array, y: jax.Array) -> jax.Array:
        return contract(x.astype(wide), y.astype(wide))

    if x.dtype == wide:
        return widened(x, y)
    # XLA:CPU (of jaxlib 0.10.2) may compile this product of narrow operands to one that it then cannot run.
    return jax.lax.platform_dependent(x, y, cpu=widened, default=contract)


def narrow(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x in a dtype of its own or bf16, up or down: each element is rounded up past a threshold of its own.

    Thresholds are spread evenly over the gap between two bf16 numbers and depend on an element's index alone. Weights
    that all moved by a hundredth of a gap have then moved by that much on average; rounded to the nearest they would
    not have moved at all. What bf16 can hold stays as it is.
    """
    if jnp.dtype(dtype) != jnp.bfloat16 or x.dtype == jnp.bfloat16:
        return x.astype(dtype)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    raised = (bits + _scatter(index)) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(raised, jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)


def _scatter(index: jax.Array) -> jax.Array:
    """16 bits of each index, mixed (the finaliser of MurmurHash3)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        index = (index ^ (index >> shift)) * jnp.uint32(factor)
    return (index ^ (index >> 16)) & jnp.uint32(0xFFFF)

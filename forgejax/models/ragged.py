"""The product of runs of rows with a matrix each: what a mixture of experts is made of.

``jax.lax.ragged_dot`` is that product, and accelerators have an instruction for it. On a CPU it expands to the product
of every row with every matrix; there the rows of a run are cut into blocks and a loop with a runtime count visits the
blocks that exist, so that the cost follows the rows. Both are exact, and nothing is ever dropped.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from forgejax.ops.rounding import outer_products, precision_of, real_of

_SMALLEST_BLOCK, _LARGEST_BLOCK = 8, 128


def ragged_matmul(
    x_AD: Float[Array, "A D"], w_XDF: Float[Array, "X D F"], sizes_X: Int[Array, " X"]
) -> Float[Array, "A F"]:
    """``x[a] @ w[run of a]``, where run 0 is the first ``sizes[0]`` rows, and so on; rows after all runs give zeros.

    Products accumulate in FP32 (FP64 for FP64 inputs) and come in x's dtype. Differentiable in x and w. It holds no
    collective: inside a ``shard_map`` each device may have runs of its own.
    """
    return _ragged_matmul(x_AD, w_XDF, sizes_X)


@jax.custom_vjp
def _ragged_matmul(x_AD: jax.Array, w_XDF: jax.Array, sizes_X: jax.Array) -> jax.Array:
    out_AF = lax.platform_dependent(x_AD, w_XDF, sizes_X, cpu=_rows_by_blocks, default=_rows_by_instruction)
    return _within(out_AF, sizes_X)


def _forward(x_AD: jax.Array, w_XDF: jax.Array, sizes_X: jax.Array) -> tuple[jax.Array, tuple]:
    return _ragged_matmul(x_AD, w_XDF, sizes_X), (x_AD, w_XDF, sizes_X)


def _backward(residuals: tuple, dout_AF: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_AD, w_XDF, sizes_X = residuals
    dout_AF = _within(dout_AF, sizes_X)
    dx_AD = _ragged_matmul(dout_AF, w_XDF.swapaxes(1, 2), sizes_X)
    dw_XDF = lax.platform_dependent(x_AD, dout_AF, sizes_X, cpu=_matrices_by_blocks, default=_matrices_by_instruction)
    return dx_AD, dw_XDF.astype(w_XDF.dtype), None


_ragged_matmul.defvjp(_forward, _backward)


def _within(x_AD: jax.Array, sizes_X: jax.Array) -> jax.Array:
    """Zeros after the last run."""
    inside_A = jnp.arange(x_AD.shape[0]) < sizes_X.sum()
    return jnp.where(inside_A[:, None], x_AD, jnp.zeros((), x_AD.dtype))


def _rows_by_instruction(x_AD: jax.Array, w_XDF: jax.Array, sizes_X: jax.Array) -> jax.Array:
    return lax.ragged_dot(
        x_AD, w_XDF, sizes_X, precision=precision_of(x_AD.dtype), preferred_element_type=real_of(x_AD)
    ).astype(x_AD.dtype)


_OUTER_PRODUCTS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=()
)


def _matrices_by_instruction(x_AD: jax.Array, dout_AF: jax.Array, sizes_X: jax.Array) -> jax.Array:
    return lax.ragged_dot_general(
        x_AD,
        dout_AF,
        sizes_X,
        _OUTER_PRODUCTS,
        precision=precision_of(x_AD.dtype),
        preferred_element_type=real_of(x_AD),
    )


class _Blocks(NamedTuple):
    """The blocks that cover the runs: ``total`` of them, each ``size`` rows from ``start``, ``rows`` of them its own.

    Blocks are in order of rows. What a block writes after its own rows is written again by the next.
    """

    size: int
    total: jax.Array
    run_M: jax.Array
    start_M: jax.Array
    rows_M: jax.Array

    @staticmethod
    def of(rows: int, sizes_X: jax.Array) -> _Blocks:
        runs = sizes_X.shape[0]
        # Near the mean length of a run: larger blocks are mostly padding, smaller ones read the matrices more often.
        size = min(max(1 << (rows // runs).bit_length(), _SMALLEST_BLOCK), _LARGEST_BLOCK)
        blocks_X = -(-sizes_X // size)
        last_X = jnp.cumsum(blocks_X)
        block_M = jnp.arange(rows // size + runs)  # as many as there can be
        run_M = jnp.minimum(jnp.searchsorted(last_X, block_M, side="right"), runs - 1)
        done_M = (block_M - (last_X - blocks_X)[run_M]) * size
        start_M = (jnp.cumsum(sizes_X) - sizes_X)[run_M] + done_M
        return _Blocks(size, last_X[-1], run_M, start_M, jnp.clip(sizes_X[run_M] - done_M, 0, size))


def _padded(x_AD: jax.Array, size: int) -> jax.Array:
    return jnp.pad(x_AD, ((0, size), (0, 0)))


def _rows_by_blocks(x_AD: jax.Array, w_XDF: jax.Array, sizes_X: jax.Array) -> jax.Array:
    blocks = _Blocks.of(x_AD.shape[0], sizes_X)
    padded_AD = _padded(x_AD, blocks.size)

    def one(i: jax.Array, out_AF: jax.Array) -> jax.Array:
        x_SD = lax.dynamic_slice_in_dim(padded_AD, blocks.start_M[i], blocks.size)
        w_DF = lax.dynamic_index_in_dim(w_XDF, blocks.run_M[i], keepdims=False)
        y_SF = jnp.einsum("SD,DF->SF", x_SD, w_DF, preferred_element_type=real_of(x_SD)).astype(x_SD.dtype)
        return lax.dynamic_update_slice_in_dim(out_AF, y_SF, blocks.start_M[i], axis=0)

    out_AF = jnp.zeros((padded_AD.shape[0], w_XDF.shape[2]), x_AD.dtype)
    return lax.fori_loop(0, blocks.total, one, out_AF)[: x_AD.shape[0]]


def _matrices_by_blocks(x_AD: jax.Array, dout_AF: jax.Array, sizes_X: jax.Array) -> jax.Array:
    blocks = _Blocks.of(x_AD.shape[0], sizes_X)
    x_AD, dout_AF = _padded(x_AD, blocks.size), _padded(dout_AF, blocks.size)

    def one(i: jax.Array, sum_XDF: jax.Array) -> jax.Array:
        x_SD, dout_SF = (lax.dynamic_slice_in_dim(rows, blocks.start_M[i], blocks.size) for rows in (x_AD, dout_AF))
        own_S = jnp.arange(blocks.size) < blocks.rows_M[i]
        dout_SF = jnp.where(own_S[:, None], dout_SF, jnp.zeros((), dout_SF.dtype))
        part_DF = outer_products(x_SD, dout_SF)
        return sum_XDF.at[blocks.run_M[i]].add(part_DF)

    sum_XDF = jnp.zeros((sizes_X.shape[0], x_AD.shape[1], dout_AF.shape[1]), real_of(x_AD))
    return lax.fori_loop(0, blocks.total, one, sum_XDF)

"""What is particular to the GPU kernels; test_backends.py compares them with the oracle at other shapes."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from forgejax.ops import tree_meta
from forgejax.ops.tree.gpu import GpuKernel
from tests.ops.tree.trees import QUICKLY, attention, normal, oracle, out_and_grads, real_tokens, rows


def test_head_sizes_that_are_no_power_of_two_are_padded_in_the_kernel() -> None:
    lengths = [128, 70]
    q, k, v, w = normal(0, *[(2, 128, h, 24) for h in (3, 1, 1, 3)])
    end = rows(1, 128, lengths)
    meta = tree_meta(end, np.array(lengths), 64)  # blocks of two tiles in the backward kernels
    weight = w * real_tokens(lengths, 128)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def ours(q: jax.Array, k: jax.Array, v: jax.Array) -> list[jax.Array]:
        return out_and_grads(attention(meta, GpuKernel(interpret=True)), q, k, v, weight)

    for a, b in zip(ours(q, k, v), out_and_grads(oracle(end), q, k, v, weight), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("heads", "kv_heads", "width", "dtype"), [(9, 3, 64, "float32"), (8, 2, 96, "bfloat16")])
def test_forward_and_backward_lower_to_three_triton_kernels(heads: int, kv_heads: int, width: int, dtype: str) -> None:
    q, k, v, w = normal(2, *[(1, 256, h, width) for h in (heads, kv_heads, kv_heads, heads)], dtype=dtype)
    meta = tree_meta(rows(3, 256, [256]), np.array([256]), 128)
    step = jax.jit(lambda q, k, v, w: out_and_grads(attention(meta, GpuKernel()), q, k, v, w))

    text = step.trace(q, k, v, w).lower(lowering_platforms=("cuda",)).as_text()

    assert text.count("__gpu$xla.gpu.triton") == 3


def test_what_the_kernels_cannot_do_is_refused_with_the_setting_to_change() -> None:
    q, k, v = normal(4, *[(1, 512, 1, 128)] * 3)
    end, lengths = rows(5, 512, [512]), np.array([512])

    with pytest.raises(ValueError, match=r"got blocks of 512 tokens; .*packing\.block_size to one of \[16, 32, 64\]"):
        attention(tree_meta(end, lengths, 512), GpuKernel())(q, k, v)
    with pytest.raises(ValueError, match=r"got blocks of 128 tokens; for float32 heads of 128 set"):
        attention(tree_meta(end, lengths, 128), GpuKernel())(q, k, v)
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"got float64; set policy\.compute_dtype"):
        attention(tree_meta(end, lengths, 64), GpuKernel())(*(x.astype("float64") for x in (q, k, v)))

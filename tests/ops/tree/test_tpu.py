"""What is particular to the TPU kernels; test_backends.py compares them with the oracle, tpu_compile compiles them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from forgejax.ops import TreeMeta, tree_attention, tree_meta
from forgejax.ops.tree.tpu import TpuKernel
from tests.ops.tree.trees import QUICKLY, attention, normal, oracle, real_tokens, rows


def test_shards_with_different_pair_counts_walk_their_own_lists() -> None:
    lengths = [384, 100]
    q, k, v = normal(0, (2, 384, 2, 16), (2, 384, 1, 16), (2, 384, 1, 16))
    end = rows(1, 384, lengths)
    mesh = Mesh(np.array(jax.devices()[:2]), ("r",), axis_types=(AxisType.Auto,))
    meta = tree_meta(end, np.array(lengths), 128)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def split(q: jax.Array, k: jax.Array, v: jax.Array, meta: TreeMeta) -> jax.Array:
        return tree_attention(q, k, v, meta, mesh=mesh, row_axes=("r",), kernel=TpuKernel(interpret=True))

    out = split(q, k, v, meta)
    real = real_tokens(lengths, 384)
    np.testing.assert_allclose(out * real, oracle(end)(q, k, v) * real, atol=1e-5)
    assert float(jnp.abs(out[1, 128:]).max()) == 0.0  # blocks that no pair visits


def test_half_precision_accumulates_in_fp32() -> None:
    q, k, v = normal(2, (1, 256, 2, 16), (1, 256, 1, 16), (1, 256, 1, 16), dtype="bfloat16")
    end = rows(3, 256, [256])

    meta = tree_meta(end, np.array([256]), 128)
    out = jax.jit(attention(meta, TpuKernel(interpret=True)), compiler_options=QUICKLY)(q, k, v)

    wide = oracle(end)(q.astype("float32"), k.astype("float32"), v.astype("float32"))
    assert out.dtype == jnp.bfloat16
    assert float(jnp.abs(out.astype("float32") - wide).max()) < 2e-2  # rounded weights and one rounded output


def test_what_a_core_cannot_hold_is_refused_with_the_setting_to_change() -> None:
    q, k, v = normal(4, (1, 192, 1, 16), (1, 192, 1, 16), (1, 192, 1, 16))
    meta = tree_meta(rows(5, 192, [192]), np.array([192]), 64)
    with pytest.raises(ValueError, match=r"got blocks of 64 tokens; set packing\.block_size to a multiple of 128"):
        attention(meta, TpuKernel())(q, k, v)

    length = 128 * 1000
    long = tree_meta(np.full((1, length), length, np.int32), np.array([length]), 128)
    x = jax.ShapeDtypeStruct((1, length, 1, 16), "bfloat16")
    with pytest.raises(ValueError, match=r"raise packing.block_size \(now 128\) or put fewer rows on a device"):
        jax.eval_shape(attention(long, TpuKernel()), x, x, x)

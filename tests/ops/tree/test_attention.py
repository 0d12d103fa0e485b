from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from forgejax.ops import TreeMeta, tree_attention, tree_meta
from forgejax.ops.tree.dense import dense_tree_attention


def _forest(rng: np.random.Generator, length: int, used: int) -> np.ndarray:
    """``end`` of a random forest of ``used`` nodes in pre-order, then padding."""
    parent = [-1]
    for node in range(1, used):
        path, at = [-1], node - 1  # pre-order: a parent lies on the path to the node before
        while at >= 0:
            path.append(at)
            at = parent[at]
        parent.append(int(rng.choice(path)) if rng.random() < 0.2 else node - 1)
    end = np.arange(1, length + 1)
    for node in range(used - 1, 0, -1):
        if parent[node] >= 0:
            end[parent[node]] = max(end[parent[node]], end[node])
    return end


def _case(seed: int, heads: int, kv_heads: int, dtype: str) -> tuple[tuple[jax.Array, ...], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = np.array([64, 50, 9, 33])
    end = np.stack([_forest(rng, 64, n) for n in lengths]).astype(np.int32)
    shapes = [(4, 64, h, 8) for h in (heads, kv_heads, kv_heads, heads)]
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes), end, lengths


def _grads(attend: object, q: jax.Array, k: jax.Array, v: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
    return jax.jit(jax.value_and_grad(lambda q, k, v: (attend(q, k, v) * w).sum(), (0, 1, 2)))(q, k, v)  # type: ignore[operator]


@pytest.mark.parametrize("block", [8, 16, 64])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_blocks_equal_the_dense_mask_to_rounding_in_fp64(block: int, kv_heads: int) -> None:
    with jax.enable_x64(True):
        (q, k, v, w), end, lengths = _case(0, 4, kv_heads, "float64")
        real = jnp.asarray(np.arange(64)[None, :] < lengths[:, None], "float64")[:, :, None, None]
        meta = tree_meta(end, lengths, block)

        ours = _grads(lambda q, k, v: tree_attention(q, k, v, meta), q, k, v, w * real)
        oracle = _grads(lambda q, k, v: dense_tree_attention(q, k, v, jnp.asarray(end)), q, k, v, w * real)

        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(oracle), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_the_work_follows_the_active_pairs() -> None:
    one_chain = np.full((1, 64), 64)
    leaves = np.arange(1, 65)[None]

    assert tree_meta(one_chain, np.array([64]), 8).n_pairs.tolist() == [36]
    assert tree_meta(leaves, np.array([64]), 8).n_pairs.tolist() == [8]
    assert tree_meta(leaves, np.array([20]), 8).n_pairs.tolist() == [3]
    assert tree_meta(leaves, np.array([0]), 8).n_pairs.tolist() == [0]


def test_pairs_hold_every_visible_entry_and_none_is_empty() -> None:
    rng = np.random.default_rng(1)
    end = np.stack([_forest(rng, 64, 64) for _ in range(8)])
    meta = tree_meta(end, np.full(8, 64), 8)

    index = np.arange(64)
    for row in range(8):
        visible = (index[None] <= index[:, None]) & (index[:, None] < end[row][None])
        blocks = visible.reshape(8, 8, 8, 8).any(axis=(1, 3))
        n = meta.n_pairs[row]
        listed = set(zip(meta.q_block[row, :n].tolist(), meta.kv_block[row, :n].tolist(), strict=True))
        assert listed == {(int(a), int(b)) for a, b in np.argwhere(blocks)}
        assert len(listed) == n


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_mesh_of_rows_and_heads_gives_the_same_numbers(kv_heads: int) -> None:
    (q, k, v, w), end, lengths = _case(2, 4, kv_heads, "float32")
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("r", "h"), axis_types=(AxisType.Auto,) * 2)
    meta = tree_meta(end, lengths, 16)

    alone = _grads(lambda q, k, v: tree_attention(q, k, v, meta), q, k, v, w)
    split = _grads(lambda q, k, v: tree_attention(q, k, v, meta, mesh=mesh, row_axes=("r",), head_axis="h"), q, k, v, w)

    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_padding_blocks_are_zero_and_carry_no_nan() -> None:
    (q, k, v, w), end, _ = _case(3, 2, 1, "float32")
    meta = tree_meta(end, np.zeros(4, np.int32), 16)

    value, grads = _grads(lambda q, k, v: tree_attention(q, k, v, meta), q, k, v, w)

    assert float(value) == 0.0
    assert all(float(jnp.abs(grad).max()) == 0.0 for grad in grads)


def test_half_precision_accumulates_in_fp32() -> None:
    (q, k, v, _), end, lengths = _case(4, 4, 2, "bfloat16")
    meta: TreeMeta = tree_meta(end, lengths, 16)

    ours = tree_attention(q, k, v, meta)
    wide = dense_tree_attention(q.astype("float32"), k.astype("float32"), v.astype("float32"), jnp.asarray(end))

    assert ours.dtype == jnp.bfloat16
    error = jnp.abs(ours.astype("float32") - wide)[0]
    assert float(error.max()) < 2e-2  # the rounding of one bf16 output, not of 64 sums


def test_heads_that_do_not_divide_are_refused() -> None:
    (q, k, v, _), end, lengths = _case(5, 4, 2, "float32")
    meta = tree_meta(end, lengths, 16)
    mesh = Mesh(np.array(jax.devices()[:3]), ("h",), axis_types=(AxisType.Auto,))

    with pytest.raises(ValueError, match="expected a multiple"):
        tree_attention(q[:, :, :3], k, v, meta)
    with pytest.raises(ValueError, match="cannot be split over 3 head shards"):
        tree_attention(q, k, v, meta, mesh=mesh, head_axis="h")
